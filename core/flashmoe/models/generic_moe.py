"""Let the experts of any of mlx-lm's MoE models stay on disk, with the rest as it is.

The modules of experts, SwitchGLU and SwitchMLP, are found by their class wherever they are, and
become `StreamedExperts`, which keep their other children and attributes. Routers, shared experts,
attention, masks, caches and the sums are mlx-lm's own code.

A block of mlx-lm computes its shared expert after it has asked for the routed ones. Where it gives
both the same input, the shared expert is computed while reads are in flight, and handed out when
the block asks for it (`SharedExpert`): the same bits, earlier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dense_tensors import PARTS
from ..checkpoint.expert_layers import GLU, MLP
from ..checkpoint.json_files import show
from ..checkpoint.quantization import parse_quantization, quantization_of
from ..checkpoint.safetensors_header import Tensor
from ..errors import CheckpointError, SettingError
from ..memory.dry_run import DryModel, find_switches, module_at, replace_module
from ..streaming.block import ExpertSwitch
from ..streaming.expert_form import ExpertForm
from ..streaming.slot_memory import MLX_DTYPES
from ..streaming.switch_glu import StreamingSwitchGLU
from .streaming_moe import StreamingMoE, streaming_layers

#: Where a block, or the router inside it, has the number of experts of a token.
K_NAMES = (
    "top_k",
    "top_k_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "k",
    "topk",
    "moe_topk",
)
#: Fewer experts than these end the process: MLX 0.32's compiled router reads other memory.
LEAST_K = {"bailing_moe": 2}
#: The output projections of mlx-lm's models.
HEADS = ("lm_head", "output", "head")


class StreamedExperts(nn.Module):
    """A module of experts whose weights are on disk: a mixin in front of its class."""

    # Not a child: it has nothing to load, and the model's own tree stays as it was.
    _place: _Place

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Return the result of each chosen expert.

        x: (..., hidden), indices: (..., top_k) -> (..., top_k, hidden).
        """
        call = self._place.switch.start([(x, indices)])
        self._place.shared.begin(x)
        return next(call.finish())


@dataclass
class _Early:
    """The result of a shared expert that was asked for before its block does.

    Attributes:
        compute: the shared expert; None where the block has none with the input of its experts.
        given: the input and the result that wait to be asked for.
    """

    compute: Callable[[mx.array], mx.array] | None = None
    given: tuple[mx.array, mx.array] | None = None

    def begin(self, x: mx.array) -> None:
        """Compute the shared expert of x."""
        if self.compute is not None:
            y = self.compute(x)
            self.given = x, y
            # Let it run while the reads are in flight.
            mx.async_eval(y)

    def take(self, x: mx.array) -> mx.array | None:
        """Return the result for exactly this array, once."""
        given, self.given = self.given, None
        return given[1] if given is not None and given[0] is x else None


@dataclass
class _Place:
    """What a `StreamedExperts` uses, which is no part of the model's tree."""

    switch: Any
    shared: _Early


class SharedExpert(nn.Module):
    """A shared expert that may have been computed already: a mixin in front of its class."""

    _early: _Early

    def __call__(self, x: mx.array) -> mx.array:
        early = self._early.take(x)
        return super().__call__(x) if early is None else early  # type: ignore[misc]


@dataclass
class _Rows:
    """Which rows the head computes.

    Attributes:
        last_only: the last token's alone.
    """

    last_only: bool = False


class _LastRow(nn.Module):
    """An output projection, or an embedding in its place, that can leave out all but one row."""

    _rows: _Rows

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(self._cut(x))  # type: ignore[misc]

    def _cut(self, x: mx.array) -> mx.array:
        return x[:, -1:] if self._rows.last_only and x.ndim == 3 else x


class _LastRowEmbedding(_LastRow):
    def __call__(self, x: mx.array) -> mx.array:
        return super(_LastRow, self).__call__(x)  # type: ignore[misc]

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(self._cut(x))  # type: ignore[misc]


class GenericMoE(StreamingMoE):
    """What any streaming model has beyond mlx-lm's model."""

    _places: dict[int, _Place]
    _rows: _Rows
    _dry: DryModel
    _k: int

    def put_switches(self, slots: int) -> dict[int, StreamingSwitchGLU]:
        checkpoint = self.checkpoint
        paths = {layer.prefix: index for index, layer in checkpoint.expert_layers.items()}
        found = find_switches(self)
        self._check_paths(set(found), set(paths))
        forms = {paths[path]: ExpertForm.of(module) for path, module in found.items()}
        switches = streaming_layers(
            checkpoint,
            slots,
            self.reader,
            self.backend,
            self.hooks,
            self.activations,
            forms,
        )
        self._places = {}
        for path, module in found.items():
            index = paths[path]
            self._places[index] = place = _Place(switches[index], _Early())
            replace_module(self, path, _streamed(module, place))
        self._rows = _Rows()
        self._k = checkpoint.top_k
        self._dry = self._dry_run()
        return switches

    def _check_paths(self, modules: set[str], stacks: set[str]) -> None:
        """Check that the model has the experts that the checkpoint has, and no others."""
        for path in sorted(modules ^ stacks):
            where = "the tensors" if path in stacks else "mlx-lm's model"
            other = "mlx-lm's model" if path in stacks else "the tensors"
            raise CheckpointError(
                f"{self.checkpoint.path}: {where} of this {self.checkpoint.model_type} has experts "
                f"{path}, and {other} has not: convert it again with this version of mlx-lm"
            )

    def _dry_run(self) -> DryModel:
        """Take one token through the model without work, which shows sizes that do not fit."""
        dry = DryModel(self.checkpoint.config)
        logits = dry.run(1, dry.new_cache())
        rows = self.checkpoint.text_config["vocab_size"]
        if logits.shape[-1] != rows:
            raise CheckpointError(
                f"{self.checkpoint.path / 'config.json'} has vocab_size {rows}, and mlx-lm's "
                f"{self.checkpoint.model_type} gives {logits.shape[-1]} logits: download it again"
            )
        k = max((call.top_k for call in dry.calls.values()), default=0)
        if k != self.checkpoint.top_k:
            raise CheckpointError(
                f"{self.checkpoint.path / 'config.json'} gives a token {self.checkpoint.top_k} "
                f"experts, and mlx-lm's {self.checkpoint.model_type} {k}: download it again"
            )
        return dry

    def sanitize(self, weights: dict) -> dict:
        """Drop the weights of experts, do what mlx-lm does, and check what it will quantise."""
        weights = super().sanitize(weights)
        check_shapes(weights, self._dry.shapes, self.checkpoint)
        return weights

    def finish_layers(self) -> None:
        """Prepare heads and shared experts; after the backend has replaced dense layers."""
        for path, module in list(self.named_modules()):
            if path.rpartition(".")[2] in HEADS and path.count(".") < 3:
                replace_module(self, path, _subclass(module, _LastRow, _rows=self._rows))
            elif hasattr(module, "as_linear"):
                replace_module(self, path, _subclass(module, _LastRowEmbedding, _rows=self._rows))
        for layer, place in zip(
            self.checkpoint.expert_layers.values(), self._places.values(), strict=True
        ):
            if path := self._dry.shared.get(layer.prefix):
                shared = module_at(self, path)
                new = _subclass(shared, SharedExpert, _early=place.shared)
                replace_module(self, path, new)
                place.shared.compute = partial(type(shared).__call__, new)

    @property
    def switches(self) -> dict[int, ExpertSwitch]:
        return {index: place.switch for index, place in self._places.items()}

    def set_switch(self, index: int, switch: ExpertSwitch) -> None:
        self._places[index].switch = switch

    @property
    def k_in_use(self) -> int:
        return self._k

    def set_k(self, k: int) -> None:
        if k == self._k:
            return
        least = LEAST_K.get(self.checkpoint.model_type, 1)
        if k < least:
            raise SettingError(
                f"experts={k} is not possible: MLX crashes in the router of "
                f"{self.checkpoint.model_type} with fewer than {least}; give {least} or more"
            )
        for model in (self._dry.model, self):
            for layer in self.checkpoint.expert_layers.values():
                _set_k(model, layer.prefix, k)
            if model is not self:
                self._check_k(k)
        self._k = k

    def _check_k(self, k: int) -> None:
        """Check, without work, that the blocks ask for K experts now."""
        self._dry.run(1, self._dry.new_cache())
        got = sorted({call.top_k for call in self._dry.calls.values()})
        if got != [k]:
            for layer in self.checkpoint.expert_layers.values():
                _set_k(self._dry.model, layer.prefix, self._k)
            raise SettingError(
                f"experts={k} is not possible: the router of {self.checkpoint.model_type} has no "
                f"setting for it, and picks {', '.join(map(str, got))}; leave experts out"
            )

    def next_logits(self, tokens: list[int], cache: list) -> mx.array:
        with self._last_row_only():
            return self(mx.array([tokens]), cache=cache)[:, -1]

    def head(self, hidden: mx.array) -> mx.array:
        """Return what `layerwise` gave: the logits, since only mlx-lm knows what is behind them."""
        return hidden

    @contextmanager
    def _last_row_only(self) -> Iterator[None]:
        self._rows.last_only = True
        try:
            yield
        finally:
            self._rows.last_only = False


@cache
def streaming_class(model_class: type[nn.Module]) -> type[GenericMoE]:
    """Return a model class of mlx-lm with experts that stay on disk."""
    return type(model_class.__name__, (GenericMoE, model_class), {"__module__": __name__})


def _streamed(module: nn.Module, place: _Place) -> nn.Module:
    new = _subclass(module, StreamedExperts, _place=place)
    for name in (*GLU, *MLP):
        new.pop(name, None)
    return new


def _subclass(module: nn.Module, mixin: type[nn.Module], **attributes: Any) -> nn.Module:
    """Return a module with the contents of another one and a mixin in front of its class."""
    new = _subclass_of(type(module), mixin)
    made = new.__new__(new)
    dict.update(made, module)
    vars(made).update(vars(module) | attributes)
    return made


@cache
def _subclass_of(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (mixin, kind), {"__module__": __name__})


def check_shapes(
    weights: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> None:
    """Check the tensors of quantised modules against mlx-lm's model; others it checks itself.

    mlx-lm divides sizes of tensors to find a group size, and MLX ends the process for one of 0.

    Args:
        weights: those that the model will load, by name.
        shapes: of the unquantised model's parameters.
    """
    config = parse_quantization(checkpoint.config, checkpoint.text_config, checkpoint.path)
    for name, array in weights.items():
        path, _, part = name.rpartition(".")
        plain = part == "weight" and f"{path}.scales" not in weights
        if plain and not mx.issubdtype(array.dtype, mx.floating):
            raise CheckpointError(
                f"{checkpoint.path}: {show(name)} has dtype {_DTYPES.get(array.dtype)}, and floats "
                "are needed: convert the original weights again"
            )
        if part != "scales" or f"{path}.weight" not in shapes:
            continue
        shape = shapes[f"{path}.weight"]
        tensors = {p: _tensor(f"{path}.{p}", weights.get(f"{path}.{p}"), checkpoint) for p in PARTS}
        how = quantization_of(path, tensors, shape[-1], config)
        for p, width in how.widths(shape[-1]).items():
            tensor = tensors[p]
            if tensor is None or tensor.shape != (*shape[:-1], width):
                raise CheckpointError(
                    f"{checkpoint.path}: {show(f'{path}.{p}')} has shape "
                    f"{None if tensor is None else tensor.shape}, but config.json needs "
                    f"{(*shape[:-1], width)}; config.json and the weights are from two checkpoints"
                )


_DTYPES = {dtype: name for name, dtype in MLX_DTYPES.items()}


def _tensor(name: str, array: mx.array | None, checkpoint: Checkpoint) -> Tensor | None:
    if array is None:
        return None
    dtype = _DTYPES.get(array.dtype, str(array.dtype))
    return Tensor(name, dtype, tuple(array.shape), checkpoint.path, 0, array.nbytes)


def _set_k(model: nn.Module, path: str, k: int) -> None:
    """Set the number of experts in the blocks around a module of experts, and in their routers."""
    names = path.split(".")
    # The block is the parent of the module of experts, or the parent of that.
    for end in (len(names) - 1, len(names) - 2):
        block = module_at(model, ".".join(names[:end]))
        if isinstance(block, nn.Module):
            inner = (m for m in block.children().values() if isinstance(m, nn.Module))
            if any([_set_k_in(owner, k) for owner in (block, *inner)]):
                return


def _set_k_in(owner: nn.Module, k: int) -> bool:
    found = False
    for name in K_NAMES:
        if isinstance(vars(owner).get(name), int):
            setattr(owner, name, k)
            found = True
    for holder in ("args", "config"):
        settings = vars(owner).get(holder)
        for name in K_NAMES:
            if isinstance(getattr(settings, name, None), int):
                # A copy: other modules may have the same object.
                settings = copy.copy(settings)
                setattr(settings, name, k)
                setattr(owner, holder, settings)
                found = True
    return found
