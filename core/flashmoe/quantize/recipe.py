"""What a quantisation does to each tensor of a checkpoint, and how large it makes them. No data is
read here and MLX is not imported."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import BITS, FLOATS, GROUP_SIZES, Quantization, parse_quantization
from ..checkpoint.expert_layers import PARTS
from ..checkpoint.safetensors_header import EXPERT_TENSOR, Tensor
from ..checkpoint.safetensors_writer import TensorSpec
from ..errors import SettingError

#: Bytes of a shard, as mlx-lm writes them.
SHARD_NBYTES = 5 * 10**9

#: Their rounding would change which experts are picked, and they are a thousandth of the bytes.
_ROUTERS = ("gate", "shared_expert_gate")


@dataclass(frozen=True)
class Recipe:
    """Bits of each part; dense is None where dense weights stay as they are. group_size None: 64,
    or 32 where rows are no multiple of 64.

    The default keeps `down` finer than gate and up, and all that is dense as it is: of models
    rounded to 2 bits throughout it is told that their JSON broke, and of such mixes that it holds.
    """

    gate_up: int = 2
    down: int = 4
    dense: int | None = None
    group_size: int | None = None

    def __post_init__(self):
        for name, value, allowed in (
            ("gate-up", self.gate_up, BITS),
            ("down", self.down, BITS),
            ("dense", self.dense, (None, *BITS)),
            ("group-size", self.group_size, (None, *GROUP_SIZES)),
        ):
            if value not in allowed:
                raise SettingError(
                    f"{name}={value!r} is not one of {', '.join(map(str, filter(None, allowed)))}: "
                    "experts are affine here; mxfp4, mxfp8 and nvfp4 have no kernels in flashmoe"
                )


@dataclass(frozen=True)
class Part:
    """A tensor to copy, or a matrix to round: its tensors in the source, by part.

    role is "gate_up", "down" or "dense"; layer that of experts. old is None where the source is not
    quantised, new where the part is copied.
    """

    path: str
    role: str
    sources: dict[str, Tensor]
    layer: int | None = None
    old: Quantization | None = None
    new: Quantization | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, in weights: (experts, out, in) or (out, in)."""
        *rows, width = self.sources["weight"].shape
        return (*rows, width * 32 // self.old.bits if self.old else width)

    @property
    def targets(self) -> list[TensorSpec]:
        if self.new is None:
            return [TensorSpec(t.name, t.dtype, t.shape) for t in self.sources.values()]
        *rows, width = self.shape
        groups = (*rows, width // self.new.group_size)
        dtype = self.sources["scales" if self.old else "weight"].dtype
        return [
            TensorSpec(f"{self.path}.weight", "U32", (*rows, width * self.new.bits // 32)),
            TensorSpec(f"{self.path}.scales", dtype, groups),
            TensorSpec(f"{self.path}.biases", dtype, groups),
        ]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.targets)

    @property
    def work(self) -> int:
        """Weights to round, or bytes to copy: what the progress counts."""
        return math.prod(self.shape) if self.new else self.nbytes


@dataclass(frozen=True)
class Plan:
    """shards: their parts by file name; config: the new config.json."""

    checkpoint: Checkpoint
    recipe: Recipe
    shards: dict[str, list[Part]]
    config: dict

    @property
    def parts(self) -> Iterator[Part]:
        return (part for parts in self.shards.values() for part in parts)

    def nbytes(self, *roles: str) -> tuple[int, int]:
        """(before, after), of some roles or of all."""
        chosen = [p for p in self.parts if not roles or p.role in roles]
        before = sum(t.nbytes for p in chosen for t in p.sources.values())
        return before, sum(p.nbytes for p in chosen)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, shard_nbytes: int = SHARD_NBYTES) -> Plan:
    """Raises SettingError where the recipe does not fit the rows of the experts."""
    parts = [_choose(part, recipe) for part in _parts(checkpoint)]
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > shard_nbytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    count = len(shards)
    names = {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}
    if count == 1:
        names = {"model.safetensors": shards[0]}  # as mlx-lm names it
    return Plan(checkpoint, recipe, names, _config(checkpoint, recipe, parts))


def _parts(checkpoint: Checkpoint) -> Iterator[Part]:
    """All parts, in the order in which the source holds their weights."""
    experts = {
        f"{x.prefix}.{name}": (x.layer, "down" if name == "down_proj" else "gate_up", old)
        for x in checkpoint.expert_layers.values()
        for name, old in x.quantization.items()
    }
    tensors, dense = checkpoint.tensors, {t.name for t in checkpoint.dense}
    quantization = parse_quantization(checkpoint.config, checkpoint.text_config, checkpoint.path)
    for name in sorted(tensors, key=lambda n: (tensors[n].file, tensors[n].start)):
        path, _, part = name.rpartition(".")
        layer, role, old = experts.get(path, (None, "dense", None))
        packed = f"{path}.scales" in tensors
        if packed and part in ("scales", "biases"):
            continue  # with their weight
        names = PARTS if packed and part == "weight" else (part,)
        sources = {p: tensors[f"{path}.{p}"] for p in names if f"{path}.{p}" in tensors}
        if layer is None and name in dense and packed:
            old = _dense_quantization(path, sources, quantization)
        if layer is None and (name not in dense or EXPERT_TENSOR.fullmatch(name)):
            role = "other"  # a vision tower, or what guesses ahead
        yield Part(path, role, sources, layer, old)


def _dense_quantization(path: str, sources: dict, config: dict) -> Quantization | None:
    """None where config.json does not say it: mlx-lm takes the width from the model then."""
    named = config.get(path)
    settings = named if isinstance(named, dict) else config
    found = Quantization(settings["bits"], settings["group_size"])
    words, groups = (sources[p].shape[-1] for p in ("weight", "scales"))
    return found if words * 32 == groups * found.group_size * found.bits else None


def _choose(part: Part, recipe: Recipe) -> Part:
    bits = {"gate_up": recipe.gate_up, "down": recipe.down, "dense": recipe.dense}.get(part.role)
    if bits is None or (part.role == "dense" and not _may_round(part)):
        return part
    group_size = _group_size(part, recipe.group_size)
    if group_size is None:
        return part
    new = Quantization(bits, group_size)
    # Nothing is gained by rounding what is as small already.
    if part.old is not None and _cost(part.old) <= _cost(new):
        return part
    return replace(part, new=new)


def _cost(q: Quantization) -> float:
    """Bits of a weight, with its share of a scale and a bias of 16 bits each."""
    return q.bits + 32 / q.group_size


def _may_round(part: Part) -> bool:
    """Whether mlx-lm has a linear layer or an embedding there, which is no router."""
    weight = part.sources.get("weight")
    if weight is None or len(weight.shape) != 2 or part.path.rpartition(".")[2] in _ROUTERS:
        return False
    if "norm" in part.path:
        return False
    return part.old is not None or weight.dtype in FLOATS


def _group_size(part: Part, asked: int | None) -> int | None:
    width = part.shape[-1]
    found = next((g for g in ((asked,) if asked else (64, 32)) if width % g == 0), None)
    if found is None and part.role != "dense":
        raise SettingError(
            f"{part.path} has rows of {width} weights, no multiple of the group size "
            f"{asked or 32}: give a --group-size of {', '.join(map(str, GROUP_SIZES))} that "
            f"divides {width}"
        )
    return found


def _config(checkpoint: Checkpoint, recipe: Recipe, parts: list[Part]) -> dict:
    """config.json with an entry for each rounded path, as mlx-lm writes those of mixed models."""
    config = copy.deepcopy(checkpoint.config)
    changed = [p for p in parts if p.new]
    if not changed:
        return config
    default = {"group_size": changed[0].new.group_size, "bits": recipe.gate_up, "mode": "affine"}
    quantization = config.get("quantization") or default
    for part in changed:
        new = part.new
        quantization[part.path] = {"group_size": new.group_size, "bits": new.bits, "mode": "affine"}
    config["quantization"] = config["quantization_config"] = quantization
    return config
