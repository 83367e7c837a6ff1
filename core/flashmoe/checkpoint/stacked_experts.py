"""Find the stacked experts of any model type among the tensors of a checkpoint.

mlx-lm computes routed experts in two kinds of modules: SwitchGLU, whose matrices are gate_proj,
up_proj and down_proj, and SwitchMLP, with fc1 and fc2. Each matrix is one tensor whose first axis
is the experts, and no other module of mlx-lm has three axes under these names. So experts are found
by their tensors, whatever the modules around them are called; when a model is loaded, what was
found is compared with the modules that it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .dense_tensors import PARTS
from .expert_layers import GLOBAL_SCALE, GLU, MLP, ExpertLayer, ExpertPart
from .json_files import DOWNLOAD_AGAIN, show
from .quantization import FLOATS, Quantization, quantization_of
from .safetensors_header import Tensor

#: What a matrix of experts may have besides `PARTS`, and the axes of each.
_EXTRA_PARTS = {"bias": 2, GLOBAL_SCALE: 1}

_STACK = re.compile(rf"(?P<prefix>.+)\.(?P<projection>{'|'.join((*GLU, *MLP))})\.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
_OTHER_TOWERS = re.compile(r"(model\.)?(vision|visual|audio|embed_vision|embed_audio|multi_modal)")


def is_loaded(name: str, layers: int) -> bool:
    """Return whether mlx-lm loads a tensor of a model type that has no rules of its own.

    It drops other towers, and the layers after the last one, which predict several tokens.
    """
    layer = layer_of(name)
    return (
        not _OTHER_TOWERS.match(name) and "mtp." not in name and (layer is None or layer < layers)
    )


def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer that a tensor or module belongs to."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def find_stacked_experts(
    text_config: dict[str, Any],
    quantization: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    path: Path,
) -> dict[int, ExpertLayer]:
    """Return the experts of each MoE layer, by the index of the layer.

    When a layer has two modules of experts, the second one has the next free number after all
    layers.

    Args:
        text_config, quantization: from `parse_text_config` and `parse_quantization`.
        tensors: all tensors of the checkpoint, by name.
        path: the checkpoint directory, for errors.

    Raises:
        CheckpointError: there are no experts, tensors of them are missing, or shapes disagree.
    """
    layers = text_config["num_hidden_layers"]
    prefixes: dict[str, None] = {}
    for name, tensor in tensors.items():
        match = _STACK.fullmatch(name)
        if match and len(tensor.shape) == 3 and is_loaded(name, layers):
            prefixes[match["prefix"]] = None
    if not prefixes:
        raise CheckpointError(
            f"{path} has no stacked experts in MLX format, so there is nothing to stream. A "
            f"Hugging Face checkpoint has to be converted: mlx_lm.convert --hf-path {path} "
            "--mlx-path NEW_DIR -q"
        )
    found: dict[int, ExpertLayer] = {}
    extra = layers
    for prefix in sorted(prefixes, key=lambda p: (layer_of(f"{p}.") or 0, p)):
        index = layer_of(f"{prefix}.")
        if index is None:
            raise CheckpointError(f"{path} has experts {show(prefix)} outside of any layer")
        number = index
        if number in found:
            number, extra = extra, extra + 1
        found[number] = _layer(index, prefix, quantization, tensors)
    return found


def _layer(
    index: int, prefix: str, quantization: dict[str, Any] | None, tensors: dict[str, Tensor]
) -> ExpertLayer:
    projections = GLU if f"{prefix}.{GLU[0]}.weight" in tensors else MLP
    weights = {p: _weight(f"{prefix}.{p}.weight", tensors) for p in projections}
    experts, hidden = weights[projections[-1]].shape[:2]
    intermediate = weights[projections[0]].shape[1]
    parts: list[ExpertPart] = []
    by_projection: dict[str, Quantization | None] = {}
    for projection in projections:
        inner, outer = hidden, intermediate
        if projection == projections[-1]:
            inner, outer = outer, inner
        how, present = _projection(f"{prefix}.{projection}", inner, quantization, tensors)
        by_projection[projection] = how
        for part, (tensor, width) in present.items():
            needed = (experts, outer, width)[: _EXTRA_PARTS.get(part, 3)]
            if tensor.shape != needed:
                raise CheckpointError(
                    f"{tensor.file.name}: {show(tensor.name)} has shape {tensor.shape}, and the "
                    f"other tensors of these experts need {needed}: {DOWNLOAD_AGAIN}"
                )
            each = tensor.nbytes // experts
            parts.append(
                ExpertPart(
                    projection, part, tensor.dtype, needed[1:], tensor.file, tensor.start, each
                )
            )
    return ExpertLayer(index, prefix, experts, tuple(parts), by_projection)


def _weight(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"tensor {show(name)} is missing: {DOWNLOAD_AGAIN}")
    tensor = tensors[name]
    if len(tensor.shape) != 3 or 0 in tensor.shape:
        raise CheckpointError(
            f"{tensor.file.name}: {show(name)} has shape {tensor.shape}: the experts, their rows "
            f"and their columns are needed; {DOWNLOAD_AGAIN}"
        )
    return tensor


def _projection(
    path: str,
    inner: int,
    config: dict[str, Any] | None,
    tensors: Mapping[str, Tensor],
) -> tuple[Quantization | None, dict[str, tuple[Tensor, int]]]:
    """Return how one projection is quantised, and its tensors with the widths that they need."""
    present = {part: t for part in PARTS if (t := tensors.get(f"{path}.{part}"))}
    extra = {part: (t, 0) for part in _EXTRA_PARTS if (t := tensors.get(f"{path}.{part}"))}
    weight = present["weight"]
    for part, (tensor, _) in extra.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{show(f'{path}.{part}')} has dtype {tensor.dtype}, needed is one of "
                f"{', '.join(FLOATS)}: convert the original weights again"
            )
    if len(present) == 1 and weight.dtype in FLOATS:
        return None, {"weight": (weight, inner)} | extra
    how = quantization_of(path, {part: present.get(part) for part in PARTS}, inner, config)
    widths = how.widths(inner)
    return how, {part: (t, widths[part]) for part, t in present.items()} | extra
