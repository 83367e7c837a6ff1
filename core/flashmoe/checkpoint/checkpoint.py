"""An MLX checkpoint directory: what it holds, and at which bytes each expert lies.

Only config.json, the index and the safetensors headers are read, all as hostile input. Nothing that
a checkpoint contains is executed. MLX is not imported.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, SettingError
from .config import (
    FAMILIES,
    FLOATS,
    Quantization,
    check_packed,
    check_quantization,
    check_text_config,
    inferred_quantization,
)
from .file_identity import FileIdentity
from .safetensors_header import AGAIN, EXPERT_TENSOR, Tensor, read_object, read_tensors, show

PARTS = ("weight", "scales", "biases")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
RAW_EXPERT = re.compile(
    r".*\.mlp\.experts\.(gate_up_proj|down_proj|\d+\.(gate|up|down)_proj)(\.\w+)?"
)


@dataclass(frozen=True)
class ExpertPart:
    """One tensor of the stacked experts. shape (no expert axis) and nbytes are of ONE expert; start
    is the absolute byte in `file` of expert 0; dtype is the safetensors word."""

    projection: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def range(self, expert: int) -> tuple[int, int]:
        """Absolute (start, stop) bytes of one expert in `file`."""
        start = self.start + expert * self.nbytes
        return start, start + self.nbytes


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer.

    parts are ordered gate, up, down x weight, scales, biases (weight alone where a projection is
    not quantised). prefix is the path of the SwitchGLU in mlx-lm's module tree.
    """

    layer: int
    prefix: str
    num_experts: int
    parts: tuple[ExpertPart, ...]
    quantization: dict[str, Quantization | None]

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert, all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. text_config is the part of config that describes the language model,
    with mlx-lm's defaults; expert_layers maps the index of each MoE layer to its experts;
    identities are what the shards were when their headers were read."""

    path: Path
    config: dict
    text_config: dict
    tensors: dict[str, Tensor]
    expert_layers: dict[int, ExpertLayer]
    identities: dict[Path, FileIdentity]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Opens a local directory. Raises CheckpointError with the values and the way out."""
        path = _directory(path)
        config = read_object(path / "config.json")
        text_config = check_text_config(config, path)
        quantization = check_quantization(config, text_config, path)
        tensors, identities = read_tensors(path)
        layers = _expert_layers(config["model_type"], text_config, quantization, tensors, path)
        checkpoint = cls(path, config, text_config, tensors, layers, identities)
        _check_dense(checkpoint.dense, quantization)
        return checkpoint

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        return self.text_config["num_hidden_layers"]

    @property
    def num_experts(self) -> int:
        """Routed experts of each MoE layer."""
        return self.text_config["num_experts"]

    @property
    def top_k(self) -> int:
        """Experts that a token uses, as trained."""
        return self.text_config["num_experts_per_tok"]

    @property
    def max_context(self) -> int:
        """Tokens."""
        return self.text_config["max_position_embeddings"]

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({t.file for t in self.tensors.values()}))

    @cached_property
    def files_identity(self) -> str:
        """A hash that differs once a shard was replaced, resized or written to.

        It covers the names, sizes and modification times of the shards, not their bytes, so copies
        of a checkpoint on two machines differ. config.json is not covered.
        """
        files = [(f.name, i.nbytes, i.mtime_ns) for f, i in sorted(self.identities.items())]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(x.num_experts * x.expert_nbytes for x in self.expert_layers.values())

    @cached_property
    def dense(self) -> tuple[Tensor, ...]:
        """The tensors to keep in memory: no experts, no vision tower, no multi-token prediction."""
        return tuple(
            t for n, t in self.tensors.items() if _is_loaded(n) and not EXPERT_TENSOR.fullmatch(n)
        )

    @property
    def expert_bits(self) -> float:
        """Bits of an expert weight, 16 or 32 when unquantised; a mean where projections differ."""
        bits = [
            (32 if part.dtype == "F32" else 16)
            if layer.quantization[part.projection] is None
            else layer.quantization[part.projection].bits
            for layer in self.expert_layers.values()
            for part in layer.parts
            if part.part == "weight"
        ]
        return sum(bits) / len(bits)

    @property
    def dense_nbytes(self) -> int:
        return sum(t.nbytes for t in self.dense)


def check_experts(k: int | None, checkpoint: Checkpoint) -> int:
    """K as given, or the trained one.

    Raises:
        SettingError: K is not in 1..trained K.
    """
    if k is None:
        return checkpoint.top_k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= checkpoint.top_k:
        raise SettingError(
            f"experts={k!r} is out of range: this model was trained with {checkpoint.top_k} "
            f"experts a token, so experts must be 1 to {checkpoint.top_k}"
        )
    return k


def _is_loaded(name: str) -> bool:
    return not name.startswith(("vision_tower", "model.visual")) and "mtp." not in name


def _directory(path: str | Path) -> Path:
    text, path = str(path), Path(path)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if exists:
        raise CheckpointError(
            f"{show(text)} is not a directory: give the directory that holds config.json"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise CheckpointError(
            f"there is no directory {show(text)}. If it is a name on the Hugging Face hub, "
            f"download it first (flashmoe download hub:{text}) and give hub:{text}"
        )
    raise CheckpointError(f"there is no directory {show(text)}: give the path of a checkpoint")


def _expert_layers(
    model_type: str,
    text_config: dict,
    quantization: dict | None,
    tensors: dict[str, Tensor],
    path: Path,
) -> dict[int, ExpertLayer]:
    raw = next((n for n in tensors if _is_loaded(n) and RAW_EXPERT.fullmatch(n)), None)
    if raw:
        raise CheckpointError(
            f"{path} holds {show(raw)}: it is a Hugging Face checkpoint, not in MLX format. "
            f"Convert it: mlx_lm.convert --hf-path {path} --mlx-path NEW_DIR -q"
        )
    expert_layers = {}
    for layer in range(text_config["num_hidden_layers"]):
        if model_type != "qwen3_5_moe" and (
            layer in text_config["mlp_only_layers"]
            or (layer + 1) % text_config["decoder_sparse_step"]
        ):
            continue
        prefix = f"{FAMILIES[model_type]}layers.{layer}.mlp.switch_mlp"
        parts, settings = [], {}
        for projection in PROJECTIONS:
            settings[projection], of_projection = _projection(
                prefix, projection, text_config, quantization, tensors
            )
            parts += of_projection
        expert_layers[layer] = ExpertLayer(
            layer, prefix, text_config["num_experts"], tuple(parts), settings
        )
    if not expert_layers:
        raise CheckpointError(
            f"{path}: config.json leaves no layer with experts: nothing to stream"
        )
    known = {
        f"{x.prefix}.{part.projection}.{part.part}"
        for x in expert_layers.values()
        for part in x.parts
    }
    for name, tensor in tensors.items():
        if _is_loaded(name) and EXPERT_TENSOR.fullmatch(name) and name not in known:
            raise CheckpointError(
                f"{tensor.file.name} holds {show(name)}, which a {model_type} of "
                f"{text_config['num_hidden_layers']} layers has no use for: convert it again"
            )
    return expert_layers


def _projection(
    prefix: str,
    projection: str,
    text_config: dict,
    config: dict | None,
    tensors: dict[str, Tensor],
) -> tuple[Quantization | None, list[ExpertPart]]:
    """Finds the tensors of one projection and holds them against config.json."""
    path = f"{prefix}.{projection}"
    found = {part: tensors.get(f"{path}.{part}") for part in PARTS}
    weight = found["weight"]
    packed = bool(found["scales"] or found["biases"] or (weight and weight.dtype == "U32"))
    named = None if config is None else config.get(path)
    inner, outer = text_config["hidden_size"], text_config["moe_intermediate_size"]
    if projection == "down_proj":
        inner, outer = outer, inner
    quantization = None
    sizes = {"weight": inner}
    if packed or named:
        check_packed(path, found, config)
        if named is None:
            quantization = inferred_quantization(path, found, inner)
        else:
            settings = config if named is True else named
            quantization = Quantization(settings["bits"], settings["group_size"])
        if inner % quantization.group_size:
            raise CheckpointError(
                f"{path} has rows of {inner} weights, not a multiple of the group size "
                f"{quantization.group_size} that config.json gives: download config.json again"
            )
        groups = inner // quantization.group_size
        sizes = {"weight": inner * quantization.bits // 32, "scales": groups, "biases": groups}
    elif weight is None:
        raise CheckpointError(f"tensor {show(f'{path}.weight')} is missing: {AGAIN}")
    elif weight.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}.weight has dtype {weight.dtype}, needed is one of {', '.join(FLOATS)}: "
            "convert the original weights again"
        )
    for part, size in sizes.items():
        _check_shape(found[part], (text_config["num_experts"], outer, size), quantization)
    return quantization, [_part(projection, part, found[part]) for part in sizes]


def _check_dense(dense: tuple[Tensor, ...], config: dict | None) -> None:
    """Holds what is quantised of the dense tensors against what mlx-lm takes it for: affine."""
    tensors = {t.name: t for t in dense}
    for name in tensors:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            found = {part: tensors.get(f"{path}.{part}") for part in PARTS}
            check_packed(path, found, config)
            scales, biases = found["scales"], found["biases"]
            if scales.shape != biases.shape:
                raise CheckpointError(
                    f"{show(path)} has scales of shape {scales.shape} and biases of shape "
                    f"{biases.shape}, which must be the same: convert the original weights again"
                )


def _check_shape(tensor: Tensor, needed: tuple, quantization: Quantization | None) -> None:
    if tensor.shape == needed:
        return
    how = f"{quantization.bits}-bit, group {quantization.group_size}" if quantization else "plain"
    field = "num_experts, hidden_size, moe_intermediate_size or quantization"
    if tensor.shape[:1] != needed[:1]:
        field = f"num_experts {needed[0]}"
    raise CheckpointError(
        f"{show(tensor.name)} has shape {tensor.shape}, but config.json needs {needed} ({how}): it "
        f"disagrees with {field}; config.json and the weights are of two checkpoints"
    )


def _part(projection: str, part: str, tensor: Tensor) -> ExpertPart:
    num_experts, *shape = tensor.shape
    each = tensor.nbytes // num_experts
    return ExpertPart(projection, part, tensor.dtype, tuple(shape), tensor.file, tensor.start, each)
