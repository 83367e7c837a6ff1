"""Compute experts and dense layers on the CPU with numba kernels.

MLX's quantised matmul on x86 is scalar and runs on one thread (0.08 to 0.7 GB/s of weights), so
every quantised matrix, and GatedDeltaNet, is computed by numba here, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import mla, qwen3_5, qwen3_moe, qwen3_next
from numba import njit, prange

from ...streaming.compute import Backend, ExpertObserver, ExpertWork
from ...streaming.slot_memory import SlotMemory
from ..arrays import to_numpy
from ..recast import recast
from . import attention, layers, linear_attention
from .expert_matrices import ExpertMatrices
from .gates import gate_class
from .matvec import launch_lock

#: The most pairs that go through the kernels in one call; it bounds the scratch memory of prefill.
PAIRS_AT_ONCE = 512

# These layers keep float32 activations: rounding them would change the choice of experts more than
# rounding elsewhere does by way of the hidden state.
_ROUTERS = {"gate", "shared_expert_gate", "router"}

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: layers.Linear,
    nn.QuantizedLinear: layers.QuantizedLinear,
    nn.QuantizedEmbedding: layers.QuantizedEmbedding,
    mla.MultiLinear: layers.MultiLinear,
    mla.QuantizedMultiLinear: layers.QuantizedMultiLinear,
    qwen3_next.Qwen3NextMLP: layers.NextMLP,
    qwen3_moe.MLP: layers.MLP,
    qwen3_next.Qwen3NextAttention: attention.NextAttention,
    qwen3_moe.Attention: attention.Attention,
    qwen3_5.GatedDeltaNet: linear_attention.GatedDeltaNet,
    qwen3_next.Qwen3NextGatedDeltaNet: linear_attention.NextGatedDeltaNet,
}

# Layers whose packed weights the kernels read.
_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding, mla.QuantizedMultiLinear)

#: Pairs of one expert in the work that they belong to.
WorkPairs: TypeAlias = "tuple[CpuWork, np.ndarray]"


class CpuBackend(Backend):
    """Computes with numba kernels in float32, or with activations rounded to int8.

    Args:
        observer: an object that is told what enters the experts, which are then computed one by
            one; None for no one.
    """

    name = "cpu"
    activations = ("float32", "int8")
    computes_as_loaded = True
    stacks_sequences = True

    def __init__(self, observer: ExpertObserver | None = None):
        self._observer = observer

    def start(
        self, slots: SlotMemory, x: mx.array, top_k: int, *, separate: bool = False
    ) -> CpuWork:
        if self._observer is not None:
            return _ObservedWork(slots, x, top_k, self._observer)
        return CpuWork(slots, x, top_k, separate)

    def run_all(
        self, works: Sequence[ExpertWork], experts: Sequence[Mapping[int, np.ndarray]]
    ) -> None:
        """Do `run` of several works of one layer, each with its own experts.

        A slot is multiplied by the rows of all works that need it: no bit of a pair depends on
        which other pairs there are, see `swiglu` and `expert_matrices`.
        """
        if self._observer is not None:
            super().run_all(works, experts)
            return
        _run_together([work for work in works if isinstance(work, CpuWork)], experts)

    def weighted_sum(self, y: mx.array, scores: mx.array) -> mx.array:
        return _weighted_sum(to_numpy(y)[0].reshape(-1, y.shape[-1]), scores)

    def set_dtypes(self, model: nn.Module) -> None:
        """Convert the arrays of all layers that are not quantised to float32."""
        for module in model.modules():
            if isinstance(module, _PACKED):
                continue  # the kernels widen their scales exactly
            for name, value in list(module.items()):
                if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                    module[name] = value.astype(mx.float32)

    def prepare_layers(self, model: nn.Module, head: nn.Module | None) -> None:
        """Replace the dense layers by those that use the kernels."""

        def choose(path: str, module: nn.Module) -> type[nn.Module] | None:
            if module is head:
                # An unquantised head stays lazy, as `Head` is.
                return layers.Head if isinstance(module, nn.QuantizedLinear) else None
            return _CLASSES.get(type(module)) or gate_class(module)

        recast(model, choose)
        for path, module in model.named_modules():
            quantised = isinstance(module, layers.QuantizedLinear | layers.QuantizedEmbedding)
            if quantised and _ROUTERS.isdisjoint(path.split(".")):
                module.activations = model.activations


class CpuWork(ExpertWork):
    """The experts of one layer applied to the tokens of one input, into one numpy array.

    Args:
        slots: the memory of the layer's experts.
        x: (tokens, hidden).
        top_k: choices of a token.
        separate: each token belongs to a sequence of its own, see `Backend.start`.
    """

    def __init__(self, slots: SlotMemory, x: mx.array, top_k: int, separate: bool = False):
        (self.x,) = to_numpy(x)
        self.top_k = top_k
        self._separate = separate
        self.matrices = ExpertMatrices.of(slots)
        self.y = np.empty((x.shape[0] * top_k, x.shape[1]), np.float32)

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        _run_together([self], [experts])

    def is_few(self, pairs: np.ndarray) -> bool:
        """Return whether the pairs of one expert are computed one by one."""
        return self._separate or pairs.size <= self.matrices.few

    def rows(self, pairs: np.ndarray) -> np.ndarray:
        """Return x of the pairs, (pairs, hidden)."""
        return self.x[pairs // self.top_k]

    def stop_reading(self) -> None:
        """Do nothing: `run` returns when it has read its slots."""

    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden) float32."""
        return mx.array(self.y.reshape(self.x.shape[0], self.top_k, -1))

    def combined(self, scores: mx.array) -> mx.array:
        """Return the weighted sum over each token's choices, (tokens, hidden) float32."""
        return _weighted_sum(self.y, scores)


class _ObservedWork(CpuWork):
    """A `CpuWork` that goes expert by expert, so that an observer sees what enters each `down`."""

    def __init__(self, slots: SlotMemory, x: mx.array, top_k: int, observer: ExpertObserver):
        super().__init__(slots, x, top_k)
        self._layer = slots.layer.layer
        self._observer = observer
        observer.hidden(self._layer, self.x)

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        for slot, pairs in experts.items():
            h = self.matrices.intermediate(slot, self.rows(pairs))
            self._observer.intermediate(self._layer, slot, h)
            self.y[pairs] = self.matrices.outer(slot, h)


def _run_together(works: Sequence[CpuWork], experts: Sequence[Mapping[int, np.ndarray]]) -> None:
    """Do `run` of several works of one layer: see `CpuBackend.run_all`."""
    few: list[tuple[int, CpuWork, np.ndarray]] = []
    many: dict[int, list[WorkPairs]] = {}
    for work, mine in zip(works, experts, strict=True):
        for slot, pairs in mine.items():
            if work.is_few(pairs):
                few.append((slot, work, pairs))
            else:
                many.setdefault(slot, []).append((work, pairs))
    few.sort(key=lambda part: part[0])
    for group in _groups_of_pairs(PAIRS_AT_ONCE, few):
        sizes = [pairs.size for _, _, pairs in group]
        slots = np.repeat([slot for slot, _, _ in group], sizes)
        x = np.concatenate([work.rows(pairs) for _, work, pairs in group])
        y = works[0].matrices.few_rows(slots, x, np.arange(len(x)))
        _distribute(y, [(work, pairs) for _, work, pairs in group])
    for slot, parts in many.items():
        for group in _groups_of_pairs(PAIRS_AT_ONCE, parts):
            x = np.concatenate([work.rows(pairs) for work, pairs in group])
            _distribute(works[0].matrices.many_rows(slot, x), group)


def _groups_of_pairs(limit: int, parts: Sequence[tuple]) -> Iterator[Sequence[tuple]]:
    """Yield neighbours that have at most `limit` pairs together, or one part that has more.

    This bounds the memory of a call.

    Args:
        parts: tuples whose last item is an array of pairs.
    """
    group: list[tuple] = []
    for part in parts:
        if group and sum(p[-1].size for p in group) + part[-1].size > limit:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _distribute(y: np.ndarray, parts: Sequence[WorkPairs]) -> None:
    """Copy the rows of y, (pairs, hidden), to the works that they belong to."""
    start = 0
    for work, pairs in parts:
        work.y[pairs] = y[start : start + pairs.size]
        start += pairs.size


def _weighted_sum(y: np.ndarray, scores: mx.array) -> mx.array:
    """Return the sum over each token's choices: y (pairs, hidden) -> (tokens, hidden) float32."""
    out = np.empty((scores.shape[0], y.shape[1]), np.float32)
    (weights,) = to_numpy(scores)
    with launch_lock:
        _sum_choices(y, weights, out)
    return mx.array(out)


@njit(parallel=True, cache=True, nogil=True)
def _sum_choices(y, scores, out):
    """Set out (T, D) to the sum over k, in ascending order, of scores (T, K) * y (T * K, D)."""
    tokens, top_k = scores.shape
    for t in prange(tokens):
        out[t] = 0
        for k in range(top_k):
            score = scores[t, k]
            for d in range(out.shape[1]):
                out[t, d] += score * y[t * top_k + k, d]


BACKEND = CpuBackend()
