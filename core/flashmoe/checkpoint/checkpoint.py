"""Open an MLX checkpoint directory: which tensors it holds, and at which bytes each expert is.

Only config.json, the index and the safetensors headers are read, all as hostile input. Nothing that
a checkpoint contains is executed. MLX is not imported.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SettingError
from .config import (
    FLOATS,
    TENSOR_PREFIXES,
    Quantization,
    check_affine,
    infer_quantization,
    parse_quantization,
    parse_text_config,
)
from .file_identity import FileIdentity
from .safetensors_header import (
    DOWNLOAD_AGAIN,
    EXPERT_TENSOR,
    Tensor,
    read_object,
    read_tensors,
    show,
)

PARTS = ("weight", "scales", "biases")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
RAW_EXPERT = re.compile(
    r".*\.mlp\.experts\.(gate_up_proj|down_proj|\d+\.(gate|up|down)_proj)(\.\w+)?"
)


@dataclass(frozen=True)
class ExpertPart:
    """One tensor of the stacked experts.

    Attributes:
        projection: one of PROJECTIONS.
        part: one of PARTS.
        dtype: the name that safetensors has for it, such as "BF16".
        shape: the shape for ONE expert, without the expert axis.
        start: the absolute byte in `file` of expert 0.
        nbytes: the size for ONE expert.
    """

    projection: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def range(self, expert: int) -> tuple[int, int]:
        """Return the absolute (start, stop) bytes of one expert in `file`."""
        start = self.start + expert * self.nbytes
        return start, start + self.nbytes


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes:
        prefix: the path of the SwitchGLU in mlx-lm's module tree.
        parts: the tensors in the order gate, up, down x weight, scales, biases (weight alone where
            a projection is not quantised).
        quantization: by projection; None: not quantised.
    """

    layer: int
    prefix: str
    num_experts: int
    parts: tuple[ExpertPart, ...]
    quantization: dict[str, Quantization | None]

    @property
    def expert_nbytes(self) -> int:
        """Return the bytes of one expert, all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        path: its directory.
        config: the content of config.json.
        text_config: the part of `config` that describes the language model, with mlx-lm's defaults.
        tensors: all tensors by name.
        expert_layers: the experts of each MoE layer, by the index of the layer.
        identities: what the shards were when their headers were read.
    """

    path: Path
    config: dict[str, Any]
    text_config: dict[str, Any]
    tensors: dict[str, Tensor]
    expert_layers: dict[int, ExpertLayer]
    identities: dict[Path, FileIdentity]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open and check a local directory.

        Raises:
            CheckpointError: says which values are wrong, and the way out.
        """
        path = _directory(path)
        config = read_object(path / "config.json")
        text_config = parse_text_config(config, path)
        quantization = parse_quantization(config, text_config, path)
        tensors, identities = read_tensors(path)
        layers = _expert_layers(config["model_type"], text_config, quantization, tensors, path)
        checkpoint = cls(path, config, text_config, tensors, layers, identities)
        _check_dense(checkpoint.dense, quantization)
        return checkpoint

    @property
    def model_type(self) -> str:
        """Return mlx-lm's name for the kind of model, such as "qwen3_next"."""
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        """Return the number of layers, with and without experts."""
        return self.text_config["num_hidden_layers"]

    @property
    def num_experts(self) -> int:
        """Return the number of routed experts of each MoE layer."""
        return self.text_config["num_experts"]

    @property
    def top_k(self) -> int:
        """Return K, the number of experts per token that the model was trained with."""
        return self.text_config["num_experts_per_tok"]

    @property
    def max_context(self) -> int:
        """Return the longest context that the model supports, in tokens."""
        return self.text_config["max_position_embeddings"]

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files, sorted."""
        return tuple(sorted({t.file for t in self.tensors.values()}))

    @cached_property
    def files_identity(self) -> str:
        """Return a hash that changes when a shard is replaced, resized or written to.

        It covers the names, sizes and modification times of the shards, not their bytes, so copies
        of a checkpoint on two machines differ. config.json is not covered.
        """
        files = [(f.name, i.nbytes, i.mtime_ns) for f, i in sorted(self.identities.items())]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    @property
    def expert_nbytes(self) -> int:
        """Return the bytes of all experts of all layers."""
        return sum(x.num_experts * x.expert_nbytes for x in self.expert_layers.values())

    @cached_property
    def dense(self) -> tuple[Tensor, ...]:
        """Return the tensors to keep in memory.

        These are all but experts, the vision tower and multi-token prediction.
        """
        return tuple(
            t for n, t in self.tensors.items() if _is_loaded(n) and not EXPERT_TENSOR.fullmatch(n)
        )

    @property
    def expert_bits(self) -> float:
        """Return the bits of an expert weight, 16 or 32 when unquantised.

        Where projections differ, it is their mean.
        """
        bits = []
        for layer in self.expert_layers.values():
            for part in layer.parts:
                if part.part == "weight":
                    quantization = layer.quantization[part.projection]
                    unquantised = 32 if part.dtype == "F32" else 16
                    bits.append(unquantised if quantization is None else quantization.bits)
        return sum(bits) / len(bits)

    @property
    def dense_nbytes(self) -> int:
        """Return the bytes of `dense` on disk."""
        return sum(t.nbytes for t in self.dense)


def check_experts(k: int | None, checkpoint: Checkpoint) -> int:
    """Return K, the number of experts per token, as given or else as trained.

    Raises:
        SettingError: K is not in 1..trained K.
    """
    if k is None:
        return checkpoint.top_k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= checkpoint.top_k:
        raise SettingError(
            f"experts={k!r} is out of range: this model was trained with {checkpoint.top_k} "
            f"experts per token, so experts must be between 1 and {checkpoint.top_k}"
        )
    return k


def _is_loaded(name: str) -> bool:
    return not name.startswith(("vision_tower", "model.visual")) and "mtp." not in name


def _directory(path: str | Path) -> Path:
    """Return the path of a directory that exists."""
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
            f"there is no directory {show(text)}. If it is a repository of the Hugging Face hub, "
            f"download it first (flashmoe download hub:{text}) and give hub:{text}"
        )
    raise CheckpointError(f"there is no directory {show(text)}: give the path of a checkpoint")


def _expert_layers(
    model_type: str,
    text_config: dict[str, Any],
    quantization: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    path: Path,
) -> dict[int, ExpertLayer]:
    raw = next((n for n in tensors if _is_loaded(n) and RAW_EXPERT.fullmatch(n)), None)
    if raw:
        raise CheckpointError(
            f"{path} holds {show(raw)}: it is a Hugging Face checkpoint, not one in MLX format. "
            f"Convert it: mlx_lm.convert --hf-path {path} --mlx-path NEW_DIR -q"
        )
    expert_layers: dict[int, ExpertLayer] = {}
    for layer in range(text_config["num_hidden_layers"]):
        if model_type != "qwen3_5_moe" and (
            layer in text_config["mlp_only_layers"]
            or (layer + 1) % text_config["decoder_sparse_step"]
        ):
            continue
        prefix = f"{TENSOR_PREFIXES[model_type]}layers.{layer}.mlp.switch_mlp"
        parts: list[ExpertPart] = []
        by_projection: dict[str, Quantization | None] = {}
        for projection in PROJECTIONS:
            by_projection[projection], new = _projection(
                prefix, projection, text_config, quantization, tensors
            )
            parts += new
        expert_layers[layer] = ExpertLayer(
            layer, prefix, text_config["num_experts"], tuple(parts), by_projection
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
    text_config: dict[str, Any],
    config: dict[str, Any] | None,
    tensors: dict[str, Tensor],
) -> tuple[Quantization | None, list[ExpertPart]]:
    """Check the tensors of one projection against config.json.

    Args:
        config: from `parse_quantization`.
    """
    path = f"{prefix}.{projection}"
    present = {part: t for part in PARTS if (t := tensors.get(f"{path}.{part}"))}
    weight = present.get("weight")
    packed = "scales" in present or "biases" in present or (weight and weight.dtype == "U32")
    named = None if config is None else config.get(path)
    inner, outer = text_config["hidden_size"], text_config["moe_intermediate_size"]
    if projection == "down_proj":
        inner, outer = outer, inner
    quantization = None
    sizes = {"weight": inner}
    if packed or named:
        check_affine(path, {part: present.get(part) for part in PARTS}, config)
        if named is None:
            quantization = infer_quantization(path, present, inner)
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
        raise CheckpointError(f"tensor {show(f'{path}.weight')} is missing: {DOWNLOAD_AGAIN}")
    elif weight.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}.weight has dtype {weight.dtype}, needed is one of {', '.join(FLOATS)}: "
            "convert the original weights again"
        )
    for part, size in sizes.items():
        _check_shape(present[part], (text_config["num_experts"], outer, size), quantization)
    return quantization, [_part(projection, part, present[part]) for part in sizes]


def _check_dense(dense: tuple[Tensor, ...], config: dict[str, Any] | None) -> None:
    """Check that the quantised modules among the dense tensors are affine, as mlx-lm assumes."""
    tensors = {t.name: t for t in dense}
    for name in tensors:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            module = check_affine(path, {p: tensors.get(f"{path}.{p}") for p in PARTS}, config)
            scales, biases = module["scales"], module["biases"]
            if scales.shape != biases.shape:
                raise CheckpointError(
                    f"{show(path)} has scales of shape {scales.shape} and biases of shape "
                    f"{biases.shape}, which must be the same: convert the original weights again"
                )


def _check_shape(
    tensor: Tensor, needed: tuple[int, ...], quantization: Quantization | None
) -> None:
    if tensor.shape == needed:
        return
    how = f"{quantization.bits}-bit, group {quantization.group_size}" if quantization else "plain"
    field = "num_experts, hidden_size, moe_intermediate_size or quantization"
    if tensor.shape[:1] != needed[:1]:
        field = f"num_experts {needed[0]}"
    raise CheckpointError(
        f"{show(tensor.name)} has shape {tensor.shape}, but config.json needs {needed} ({how}): it "
        f"disagrees with {field}; config.json and the weights are from two checkpoints"
    )


def _part(projection: str, part: str, tensor: Tensor) -> ExpertPart:
    num_experts, *shape = tensor.shape
    each = tensor.nbytes // num_experts
    return ExpertPart(projection, part, tensor.dtype, tuple(shape), tensor.file, tensor.start, each)
