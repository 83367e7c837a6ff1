"""Decides what a quantisation does to each tensor of a checkpoint, and how large the result is.

Only the headers of the checkpoint are used: no weights are read, and MLX is not imported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.expert_layers import GLOBAL_SCALE
from ..checkpoint.quantization import (
    BITS,
    FLOAT_MODES,
    FLOATS,
    GROUP_SIZES,
    Quantization,
    parse_quantization,
)
from ..checkpoint.safetensors_header import EXPERT_TENSOR, Tensor
from ..checkpoint.safetensors_writer import SHARD_NBYTES, TensorSpec, split_into_shards
from ..errors import SettingError

#: The dtype of new scales and biases where those of the source are no floats.
_SCALES = "BF16"

#: Routers are not rounded: that would change which experts are chosen, and they are a thousandth of
#: the bytes.
_ROUTERS = ("gate", "shared_expert_gate")

_WITH_WEIGHT = ("scales", "biases", GLOBAL_SCALE)


@dataclass(frozen=True)
class Recipe:
    """The bits that each kind of weights gets.

    The default gives `down` more bits than gate and up, and leaves all dense weights as they are.
    Users of other engines report broken JSON where all experts were rounded plainly to 2 bits, and
    none where down kept more bits; docs/pruning.md has what was measured here.

    Attributes:
        gate_up: bits of the gate and up matrices of experts.
        down: bits of the down matrices of experts.
        dense: bits of dense weights; None leaves them as they are.
        group_size: weights that share a scale and a bias; None: 64, or 32 for matrices whose rows
            are not a multiple of 64.

    Raises:
        SettingError: a value is not supported; the text lists those that are.
    """

    gate_up: int = 2
    down: int = 4
    dense: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("gate-up", self.gate_up, BITS),
            ("down", self.down, BITS),
            ("dense", self.dense, (None, *BITS)),
            ("group-size", self.group_size, (None, *GROUP_SIZES)),
        ):
            if value not in allowed:
                raise SettingError(
                    f"{name}={value!r} is not supported: use one of "
                    f"{', '.join(map(str, filter(None, allowed)))}; the result is affine"
                )


@dataclass(frozen=True)
class TensorPlan:
    """What is done to a tensor: it is copied, or it is a matrix that is rounded.

    Attributes:
        path: name of the module, without ".weight".
        role: "gate_up", "down", "dense", or "other" for tensors that flashmoe does not use.
        sources: tensors of the source by part: weight, and for quantised matrices scales, biases,
            global_scale, as its mode has them.
        layer: layer of an expert matrix; None for all other tensors.
        old: quantisation of the source; None if it is not quantised.
        new: quantisation to round to; None if the tensor is copied.
    """

    path: str
    role: str
    sources: dict[str, Tensor]
    layer: int | None = None
    old: Quantization | None = None
    new: Quantization | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix in weights: (experts, out, in) or (out, in)."""
        *rows, width = self.sources["weight"].shape
        return (*rows, width * 32 // self.old.bits if self.old else width)

    @property
    def targets(self) -> list[TensorSpec]:
        """The tensors that are written."""
        if self.new is None:
            return [TensorSpec(t.name, t.dtype, t.shape) for t in self.sources.values()]
        *rows, width = self.shape
        groups = (*rows, width // self.new.group_size)
        dtype = self.sources["scales" if self.old else "weight"].dtype
        if self.old is not None and self.old.mode != "affine":
            dtype = _SCALES
        return [
            TensorSpec(f"{self.path}.weight", "U32", (*rows, width * self.new.bits // 32)),
            TensorSpec(f"{self.path}.scales", dtype, groups),
            TensorSpec(f"{self.path}.biases", dtype, groups),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(t.nbytes for t in self.targets)

    @property
    def work_units(self) -> int:
        """The amount of work that progress is reported in: weights to round, or bytes to copy."""
        return math.prod(self.shape) if self.new else self.nbytes


@dataclass(frozen=True)
class QuantizePlan:
    """What a quantisation writes.

    Attributes:
        checkpoint: the source.
        recipe: the bits asked for.
        shards: name of each file to write -> its tensors.
        config: the content of the new config.json.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    shards: dict[str, list[TensorPlan]]
    config: dict

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        """The tensors of all shards."""
        return (tensor for tensors in self.shards.values() for tensor in tensors)

    @property
    def work_units(self) -> int:
        """The work of all tensors, see `TensorPlan.work_units`."""
        return sum(tensor.work_units for tensor in self.tensors)

    def nbytes(self, *roles: str) -> tuple[int, int]:
        """Return the bytes (before, after) of tensors with these roles, or of all tensors."""
        chosen = [t for t in self.tensors if not roles or t.role in roles]
        before = sum(source.nbytes for t in chosen for source in t.sources.values())
        return before, sum(t.nbytes for t in chosen)


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, shard_nbytes: int = SHARD_NBYTES
) -> QuantizePlan:
    """Plan the quantisation of a checkpoint.

    Args:
        shard_nbytes: maximum bytes of a file; a tensor that is larger gets a file of its own.

    Raises:
        SettingError: the group size does not divide the rows of the experts.
    """
    tensors = [_with_new_bits(tensor, recipe) for tensor in _tensors(checkpoint)]
    shards = split_into_shards(tensors, shard_nbytes)
    return QuantizePlan(checkpoint, recipe, shards, _new_config(checkpoint, recipe, tensors))


def _tensors(checkpoint: Checkpoint) -> Iterator[TensorPlan]:
    """Yield all tensors, still to be copied, in the order of their weights in the source."""
    experts = {
        f"{x.prefix}.{name}": (x.layer, "down" if name == x.projections[-1] else "gate_up", old)
        for x in checkpoint.expert_layers.values()
        for name, old in x.quantization.items()
    }
    tensors, dense = checkpoint.tensors, {t.name for t in checkpoint.dense}
    quantization = parse_quantization(checkpoint.config, checkpoint.text_config, checkpoint.path)
    for name in sorted(tensors, key=lambda n: (tensors[n].file, tensors[n].start)):
        path, _, part = name.rpartition(".")
        layer, role, old = experts.get(path, (None, "dense", None))
        packed = f"{path}.scales" in tensors
        if packed and part in _WITH_WEIGHT:
            continue  # planned together with their weight
        if part == "bias":  # of an expert or a linear layer; it is never rounded
            yield TensorPlan(path, "other", {part: tensors[name]})
            continue
        names = ("weight", *_WITH_WEIGHT) if packed and part == "weight" else (part,)
        sources = {p: tensors[f"{path}.{p}"] for p in names if f"{path}.{p}" in tensors}
        if layer is None and name in dense and packed:
            old = _dense_quantization(path, sources, quantization)
        if layer is None and (name not in dense or EXPERT_TENSOR.fullmatch(name)):
            role = "other"  # a vision tower, or layers that predict several tokens
        yield TensorPlan(path, role, sources, layer, old)


def _dense_quantization(
    path: str, sources: dict[str, Tensor], quantization: dict | None
) -> Quantization | None:
    """Return the quantisation of a dense matrix; None if config.json does not have its true bits.

    In that case mlx-lm takes the width of the matrix from the model.
    """
    if quantization is None:
        return None
    named = quantization.get(path)
    settings = named if isinstance(named, dict) else quantization
    candidates = [Quantization(settings["bits"], settings["group_size"])]
    if sources["scales"].dtype == "U8":
        candidates = list(FLOAT_MODES.values())
    words, groups = (sources[p].shape[-1] for p in ("weight", "scales"))
    return next((q for q in candidates if words * 32 == groups * q.group_size * q.bits), None)


def _with_new_bits(tensor: TensorPlan, recipe: Recipe) -> TensorPlan:
    """Return the tensor with its new quantisation if the recipe rounds it."""
    roles = {"gate_up": recipe.gate_up, "down": recipe.down, "dense": recipe.dense}
    bits = roles.get(tensor.role)
    if bits is None or (tensor.role == "dense" and not _may_round(tensor)):
        return tensor
    group_size = _group_size(tensor, recipe.group_size)
    if group_size is None:
        return tensor
    new = Quantization(bits, group_size)
    # Rounding gains nothing if the tensor is that small already.
    if tensor.old is not None and _bits_per_weight(tensor.old) <= _bits_per_weight(new):
        return tensor
    return replace(tensor, new=new)


def _bits_per_weight(quantization: Quantization) -> float:
    """Return the bits of a weight, with its share of a scale, and of a bias where there is one."""
    shared = 32 if quantization.mode == "affine" else 8
    return quantization.bits + shared / quantization.group_size


def _may_round(tensor: TensorPlan) -> bool:
    """Return whether mlx-lm has a linear layer or an embedding here that is not a router."""
    weight = tensor.sources.get("weight")
    if weight is None or len(weight.shape) != 2 or tensor.path.rpartition(".")[2] in _ROUTERS:
        return False
    if "norm" in tensor.path:
        return False
    return tensor.old is not None or weight.dtype in FLOATS


def _group_size(tensor: TensorPlan, asked: int | None) -> int | None:
    """Return the group size for a matrix; None if a dense matrix has to stay as it is."""
    width = tensor.shape[-1]
    sizes = (asked,) if asked else (64, 32)
    group_size = next((size for size in sizes if width % size == 0), None)
    if group_size is None and tensor.role != "dense":
        raise SettingError(
            f"{tensor.path} has rows of {width} weights, which is not a multiple of the group size "
            f"{asked or 32}: choose a --group-size of {', '.join(map(str, GROUP_SIZES))} that "
            f"divides {width}"
        )
    return group_size


def _new_config(checkpoint: Checkpoint, recipe: Recipe, tensors: list[TensorPlan]) -> dict:
    """Return config.json with an entry for each rounded path, as mlx-lm writes mixed models."""
    config = copy.deepcopy(checkpoint.config)
    rounded = {t.path: t.new for t in tensors if t.new is not None}
    if not rounded:
        return config
    first = next(iter(rounded.values()))
    default = {"group_size": first.group_size, "bits": recipe.gate_up, "mode": "affine"}
    quantization = config.get("quantization") or default
    for path, new in rounded.items():
        quantization[path] = {"group_size": new.group_size, "bits": new.bits, "mode": "affine"}
    config["quantization"] = config["quantization_config"] = quantization
    return config
