"""Find the experts of each layer among the tensors of a checkpoint, and check their shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .config import TENSOR_PREFIXES
from .dense_tensors import PARTS, has_experts
from .json_files import DOWNLOAD_AGAIN, show
from .quantization import FLOATS, Quantization, quantization_of
from .safetensors_header import EXPERT_TENSOR, Tensor, is_loaded

#: The matrices of mlx-lm's SwitchGLU, and those of its SwitchMLP.
GLU = ("gate_proj", "up_proj", "down_proj")
MLP = ("fc1", "fc2")
#: What nvfp4 may have: one float32 for each expert.
GLOBAL_SCALE = "global_scale"
RAW_EXPERT = re.compile(
    r".*\.mlp\.experts\.(gate_up_proj|down_proj|\d+\.(gate|up|down)_proj)(\.\w+)?"
)


@dataclass(frozen=True)
class ExpertPart:
    """One tensor of the stacked experts.

    Attributes:
        projection: one of GLU or MLP.
        part: one of PARTS, GLOBAL_SCALE, or "bias", which is added to the product.
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
        prefix: the path of the SwitchGLU or SwitchMLP in mlx-lm's module tree.
        parts: the tensors in the order of `projections` x weight, scales, biases, global scale,
            bias: those that a projection has, weight alone where it is plain.
        quantization: by projection; None: not quantised.
    """

    layer: int
    prefix: str
    num_experts: int
    parts: tuple[ExpertPart, ...]
    quantization: dict[str, Quantization | None]

    @property
    def projections(self) -> tuple[str, ...]:
        """Return the names of the matrices of an expert, GLU or MLP."""
        return GLU if GLU[0] in self.quantization else MLP

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors."""
        return {f"{self.prefix}.{part.projection}.{part.part}" for part in self.parts}

    @property
    def expert_nbytes(self) -> int:
        """Return the bytes of one expert, all parts."""
        return sum(part.nbytes for part in self.parts)


def find_expert_layers(
    model_type: str,
    text_config: dict[str, Any],
    quantization: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    path: Path,
) -> dict[int, ExpertLayer]:
    """Return the experts of each MoE layer, by the index of the layer.

    Args:
        model_type: a key of `TENSOR_PREFIXES`.
        text_config, quantization: from `parse_text_config` and `parse_quantization`.
        tensors: all tensors of the checkpoint, by name.
        path: the checkpoint directory, for errors.

    Raises:
        CheckpointError: expert tensors are missing, unknown, or disagree with config.json; or there
            are no experts.
    """
    raw = next((n for n in tensors if is_loaded(n) and RAW_EXPERT.fullmatch(n)), None)
    if raw:
        raise CheckpointError(
            f"{path} holds {show(raw)}: it is a Hugging Face checkpoint, not in MLX format. "
            f"Convert it: mlx_lm.convert --hf-path {path} --mlx-path NEW_DIR -q"
        )
    expert_layers: dict[int, ExpertLayer] = {}
    for layer in range(text_config["num_hidden_layers"]):
        if not has_experts(model_type, text_config, layer):
            continue
        prefix = f"{TENSOR_PREFIXES[model_type]}layers.{layer}.mlp.switch_mlp"
        parts: list[ExpertPart] = []
        by_projection: dict[str, Quantization | None] = {}
        for projection in GLU:
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
    known = {name for x in expert_layers.values() for name in x.names}
    for name, tensor in tensors.items():
        if is_loaded(name) and EXPERT_TENSOR.fullmatch(name) and name not in known:
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
        parts = {part: present.get(part) for part in PARTS}
        quantization = quantization_of(path, parts, inner, config)
        sizes = quantization.widths(inner)
    elif weight is None:
        raise CheckpointError(f"tensor {show(f'{path}.weight')} is missing: {DOWNLOAD_AGAIN}")
    elif weight.dtype not in FLOATS:
        raise CheckpointError(
            f"{path}.weight has dtype {weight.dtype}, needed is one of {', '.join(FLOATS)}: "
            "convert the original weights again"
        )
    num_experts = text_config["num_experts"]
    for part, size in sizes.items():
        _check_shape(present[part], (num_experts, outer, size), quantization)
    parts_found = [_part(projection, part, present[part]) for part in sizes]
    scale = tensors.get(f"{path}.{GLOBAL_SCALE}")
    if scale is not None and quantization and quantization.mode == "nvfp4":
        if scale.dtype != "F32":
            raise CheckpointError(
                f"{show(scale.name)} has dtype {scale.dtype}, needed is F32: convert the original "
                "weights again"
            )
        _check_shape(scale, (num_experts,), quantization)
        parts_found.append(_part(projection, GLOBAL_SCALE, scale))
    return quantization, parts_found


def _check_shape(
    tensor: Tensor, needed: tuple[int, ...], quantization: Quantization | None
) -> None:
    if tensor.shape == needed:
        return
    how = str(quantization) if quantization else "plain"
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
