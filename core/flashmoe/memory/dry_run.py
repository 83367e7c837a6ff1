"""Build mlx-lm's model of a config.json without weights, and take tokens through it without work.

MLX computes an array when its values are asked for, and nothing asks here: a pass builds the graph
of the model, which has the shapes of everything, the caches included. So what the caches of a model
take is measured, of whatever kind they are, before anything is loaded; sizes of config.json that do
not fit together fail here; and the modules of experts show how a block calls them.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..checkpoint import model_types
from ..checkpoint.json_files import show
from ..errors import CheckpointError

#: Where a block has its shared expert.
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")

#: Tokens of a measured pass; caches grow in steps of 256 tokens.
_STEP = 512


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes of the model and of its arguments for a config.json.

    Raises:
        CheckpointError: mlx-lm has no Mixture-of-Experts model of that type.
    """
    name = model_types.resolve(config)
    if name is None:
        raise CheckpointError(f"mlx-lm has no MoE model of type {config.get('model_type')!r}")
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return module.Model, module.ModelArgs


def find_switches(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that compute routed experts, by their paths."""
    return {p: m for p, m in model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP)}


@dataclass
class SwitchCall:
    """What a block gave to its module of experts in the last pass.

    Attributes:
        top_k: the experts of a token.
        x: the input.
    """

    top_k: int
    x: mx.array


class DryModel:
    """mlx-lm's model with arrays of zeros that take no memory.

    Args:
        config: the content of config.json.

    Attributes:
        model: the model; its modules of experts return zeros.
        shapes: of its parameters, those of experts included, by their names.
        calls: of the last pass, by the path of the module of experts.
        shared: the shared experts beside modules of experts, by the path of those: they are called
            after them, with the same array.
    """

    def __init__(self, config: dict[str, Any]):
        model_class, args_class = model_classes(config)
        self.model = model_class(args_class.from_dict(copy.deepcopy(config)))
        self.model.eval()
        self.shapes = {name: tuple(value.shape) for name, value in _arrays(self.model).items()}
        self.model.update(tree_map(_zeros, self.model.parameters()))
        self.calls: dict[str, SwitchCall] = {}
        self.shared: dict[str, str] = {}
        for path in find_switches(self.model):
            replace_module(self.model, path, _DrySwitch(module_at(self.model, path), path, self))
            parent = path.rpartition(".")[0]
            for name in SHARED_NAMES:
                shared = module_at(self.model, parent).get(name)
                if isinstance(shared, nn.Module):
                    watched = _Watched(shared, path, f"{parent}.{name}", self)
                    replace_module(self.model, f"{parent}.{name}", watched)

    def run(self, tokens: int, cache: list[Any]) -> mx.array:
        """Take tokens into a cache; return the logits, unevaluated."""
        self.calls.clear()
        return self.model(mx.zeros((1, tokens), mx.int32), cache=cache)

    def new_cache(self) -> list[Any]:
        """Return an empty cache as mlx-lm makes it."""
        return make_prompt_cache(self.model)


class _DrySwitch(nn.Module):
    """Takes the place of a module of experts: keeps its other children, and returns zeros."""

    def __init__(self, replaced: nn.Module, path: str, owner: DryModel):
        super().__init__()
        for name, child in replaced.items():
            if name not in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"):
                self[name] = child
        self._report = lambda call: owner.calls.__setitem__(path, call)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._report(SwitchCall(indices.shape[-1], x))
        return _zeros(x, (*indices.shape, x.shape[-1]))


class _Watched(nn.Module):
    """Takes the place of a shared expert, and reports calls of the kind of `DryModel.shared`."""

    def __init__(self, replaced: nn.Module, switch: str, path: str, owner: DryModel):
        super().__init__()
        self.replaced = replaced

        def report(x: mx.array) -> None:
            if switch in owner.calls and owner.calls[switch].x is x:
                owner.shared[switch] = path

        self._report = report

    def __call__(self, x: mx.array) -> mx.array:
        self._report(x)
        return self.replaced(x)


def module_at(model: nn.Module, path: str) -> Any:
    """Return the module at a path such as "model.layers.0.mlp"."""
    value: Any = model
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    owner = module_at(model, parent) if parent else model
    owner[int(name) if isinstance(owner, list) else name] = new


@dataclass(frozen=True)
class CacheSizes:
    """The bytes of a model's caches, float32, as they were measured.

    Attributes:
        parts: of each array that grows: its bytes at the first measured length, the bytes that a
            token adds, and the tokens after which it stays; and as the first one what never grows.
    """

    parts: tuple[tuple[float, float, int], ...] = field(default=())

    def nbytes(self, tokens: int) -> int:
        """Return the bytes for `tokens` tokens of context."""
        return round(
            sum(
                start + max(0, min(tokens, limit) - _STEP) * each
                for start, each, limit in self.parts
            )
        )


def cache_sizes(config: Mapping[str, Any]) -> CacheSizes:
    """Return what the caches of a model take.

    Raises:
        CheckpointError: mlx-lm cannot build the model, or take a token through it.
    """
    try:
        return _cache_sizes(json.dumps(config, sort_keys=True))
    except CheckpointError:
        raise
    except Exception as e:  # whatever it is, it comes from what config.json says
        raise CheckpointError(
            f"mlx-lm cannot run the {show(config.get('model_type'))} of this config.json: "
            f"{type(e).__name__}: {show(str(e))}. Download it again, or convert it again with this "
            "version of mlx-lm"
        ) from e


@lru_cache(maxsize=32)
def _cache_sizes(text: str) -> CacheSizes:
    dry = DryModel(json.loads(text))
    cache = dry.new_cache()
    measured = []
    for _ in range(2):
        dry.run(_STEP, cache)
        measured.append([leaf for entry in cache for leaf in _leaves(entry)])
    parts = []
    for (before, _), (after, limit) in zip(*measured, strict=True):
        parts.append((float(before), max(0, after - before) / _STEP, limit))
    return CacheSizes(tuple(parts))


def _leaves(entry: Any) -> list[tuple[int, int]]:
    """Return the bytes of each cache inside an entry of a prompt cache, and where it stays."""
    inner = getattr(entry, "caches", None)
    if inner is not None:
        return [leaf for one in inner for leaf in _leaves(one)]
    limit = getattr(entry, "max_size", None) or getattr(entry, "chunk_size", None)
    limit = limit + _STEP if isinstance(limit, int) else 2**62
    return [(sum(value.nbytes for value in _arrays(entry.state).values()), limit)]


def _arrays(tree: Any) -> dict[str, mx.array]:
    flat: Any = tree_flatten(tree.parameters() if isinstance(tree, nn.Module) else tree)
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def _zeros(like: mx.array, shape: tuple[int, ...] | None = None) -> mx.array:
    """Return zeros in the shape of an array, or another one, that have memory for one number."""
    dtype = mx.float32 if mx.issubdtype(like.dtype, mx.floating) else like.dtype
    return mx.broadcast_to(mx.array(0, dtype), like.shape if shape is None else shape)
