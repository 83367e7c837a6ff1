"""Compute experts on a GPU with flashmoe's own kernels: two launches for all experts of few tokens.

The kernels here take up to MAX_TOKENS tokens, as decoding has. More go through the tensor cores of
CUDA (`many_tokens`), or through MLX's `gather_qmm`. The choice depends on the shape of a call
alone, so no bit depends on which experts are resident.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flashmoe_metal import grouped
from flashmoe_metal.down import (
    CombineInputs,
    DownInputs,
    SharedExpertInputs,
    SharedExpertTerm,
    combine,
    down,
)
from flashmoe_metal.gate_up import GateUpInputs, gate_up
from flashmoe_metal.matrix import Matrix, lanes

from ...streaming.compute import ExpertWork
from ...streaming.expert_form import SWIGLU
from ...streaming.slot_memory import SlotMemory
from . import layers
from .gather import GatherBackend
from .many_tokens import ManyTokensWork

#: MLX hands launches to the GPU in batches, and ends a batch at these limits: MB of inputs, and
#: launches. Whole stacks of experts count, so by default each launch would be a batch of its own.
SETTINGS = {"MLX_MAX_MB_PER_BUFFER": "1000000"}
if mx.cuda.is_available():
    # The GPU waits until a batch is built, and a few of flashmoe's launches are much work already.
    SETTINGS["MLX_MAX_OPS_PER_BUFFER"] = "20"
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

#: The most tokens that the kernels take.
MAX_TOKENS = 16


class FusedBackend(GatherBackend):
    """flashmoe's GPU kernels for few tokens, MLX's gathered products for more."""

    name = "fused"
    fuses_blocks = True
    # Of one layer's arrays; what MLX keeps is used again by the next layer.
    kept_nbytes = 1 << 30 if mx.cuda.is_available() else 0

    def start(
        self, slots: SlotMemory, x: mx.array, top_k: int, *, separate: bool = False
    ) -> ExpertWork:
        if x.size <= MAX_TOKENS * x.shape[-1] and self.has_kernels(slots):
            return FewTokensWork(slots, x, top_k)
        many = self.many_dtype(slots)
        if many is not None and x.dtype == many:
            return ManyTokensWork(slots.views["matrices"], x, top_k)
        return super().start(slots, x, top_k)

    def many_dtype(self, slots: SlotMemory) -> mx.Dtype | None:
        # Metal has a good product of sorted rows in MLX itself.
        if not mx.cuda.is_available() or not self.has_kernels(slots):
            return None
        matrices = slots.views["matrices"]
        dtype = matrices[0].scales.dtype
        fits = slots.layer.num_experts <= grouped.MAX_EXPERTS
        return dtype if fits and grouped.supports(dtype, *matrices) else None

    def start_resident(self, slots: SlotMemory, x: mx.array, indices: mx.array) -> ExpertWork:
        if x.size > MAX_TOKENS * x.shape[-1]:
            many = ManyTokensWork(slots.views["matrices"], x, indices.shape[-1])
            many.run_slots(indices, slots.num_slots)
            return many
        work = FewTokensWork(slots, x, indices.shape[-1])
        work.run_slots(indices)
        return work

    def add_and_norm(
        self, layer: nn.Module, x: mx.array, attended: mx.array
    ) -> tuple[mx.array, mx.array]:
        if isinstance(layer, layers.FusedDecoderLayer):
            return layer.sum_and_norm(x, attended)
        return super().add_and_norm(layer, x, attended)

    def has_kernels(self, slots: SlotMemory) -> bool:
        return slots.on_gpu and expert_matrices(slots) is not None

    def prepare_layers(self, model: nn.Module, head: nn.Module | None) -> None:
        layers.recast_layers(model)


def expert_matrices(slots: SlotMemory) -> list[Matrix] | None:
    """Return the stacks of gate, up and down as the kernels take them.

    None where the kernels cannot read one of them.
    """
    if slots.form != SWIGLU or any(p.part in ("bias", "global_scale") for p in slots.layer.parts):
        return None
    if "matrices" not in slots.views:
        projections = ("gate_proj", "up_proj", "down_proj")
        slots.views["matrices"] = [_matrix(slots, projection) for projection in projections]
    matrices = slots.views["matrices"]
    return None if any(m.reason() for m in matrices) else matrices


def _matrix(slots: SlotMemory, projection: str) -> Matrix:
    quantization = slots.layer.quantization[projection]
    weight, scales, biases = slots.stacks(projection)
    assert weight is not None, f"{projection} has no weights"
    if quantization is None:
        return Matrix(weight)
    return Matrix(weight, scales, biases, quantization.bits, quantization.group_size)


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a block, for one call.

    Attributes:
        gate, up, down: its matrices.
        logits: (tokens, any), of which one column is the shared expert's own gate, before the
            sigmoid.
        column: that column.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    logits: mx.array
    column: int = 0


class FewTokensWork(ExpertWork):
    """The experts of one layer applied to at most MAX_TOKENS tokens.

    When all experts of the call are resident at once, nothing is computed before `combined`.
    Otherwise each pair is computed while its expert is resident, and the sum comes from those
    terms: the same bits, in more launches.
    """

    lazy = True

    def __init__(self, slots: SlotMemory, x: mx.array, top_k: int):
        matrices = expert_matrices(slots)
        assert matrices is not None, "the kernels cannot read these experts"
        self._gate, self._up, self._down = matrices
        self._x = x
        self._shape = (x.size // x.shape[-1], top_k)
        self._slots: mx.array | None = None  # of all pairs, when they can be read at once
        self._waiting: dict[int, np.ndarray] = {}  # given to `run`, and not computed yet
        self._pairs: list[np.ndarray] = []
        self._terms: list[mx.array] = []  # of the pairs, (pairs, hidden) float32

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        self._waiting |= experts

    def run_slots(self, slots: mx.array) -> None:
        """Compute all pairs at once, when `combined` is called; no other result can be had.

        slots: (..., top_k).
        """
        self._slots = slots

    def stop_reading(self) -> None:
        if self._waiting:
            pairs, slots = self._take_waiting()
            self._pairs.append(pairs)
            self._terms.append(self._compute_terms(pairs, slots))
            mx.eval(self._terms)

    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden), in the dtype of x."""
        terms, places = self._all_terms()
        y = terms[places.reshape(-1)].astype(self._x.dtype)
        return y.reshape(*self._shape, -1)

    def combined(self, scores: mx.array) -> mx.array:
        return self.combined_with(scores)

    def combined_with(
        self,
        scores: mx.array,
        *,
        shared: SharedExpert | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        """Return the weighted sum of the experts, of the shared expert and of the residual.

        Args:
            scores: (..., top_k) where the slots of `run_slots` have that shape; otherwise
                (tokens, top_k).
            residual: (..., hidden).

        Returns:
            (..., hidden) in the dtype of x.
        """
        scores = scores.astype(mx.float32)
        if not self._terms and self._slots is None:
            pairs, slots = self._take_waiting()
            self._slots = mx.array(slots[np.argsort(pairs)].reshape(self._shape))
        if self._slots is None:
            return self._combine_terms(scores, shared, residual)
        dtype = self._x.dtype
        inputs = self._x, self._slots, self._gate, self._up
        if shared is None:
            (h,) = gate_up(GateUpInputs(*inputs))
            return down(DownInputs(h, self._slots, scores, self._down, dtype, None, residual))
        h, shared_h = gate_up(GateUpInputs(*inputs, (shared.gate, shared.up)))
        own = SharedExpertInputs(shared_h, shared.down, shared.logits, shared.column)
        return down(DownInputs(h, self._slots, scores, self._down, dtype, own, residual))

    def _combine_terms(
        self, scores: mx.array, shared: SharedExpert | None, residual: mx.array | None
    ) -> mx.array:
        terms, places = self._all_terms()
        own = None
        if shared is not None:
            values = self._compute_shared_term(shared)
            own = SharedExpertTerm(values, shared.logits, shared.column)
        return combine(CombineInputs(terms, places, scores, self._x.dtype, own, residual))

    def _all_terms(self) -> tuple[mx.array, mx.array]:
        """Return the terms of all pairs, and where those of each token are: (tokens, top_k)."""
        self.stop_reading()
        places = np.argsort(np.concatenate(self._pairs)).astype(np.uint32)
        return mx.concatenate(self._terms), mx.array(places.reshape(self._shape))

    def _take_waiting(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs that wait to be computed, and the slot of each."""
        waiting, self._waiting = self._waiting, {}
        slots = np.repeat(np.fromiter(waiting, np.uint32), [p.size for p in waiting.values()])
        return np.concatenate(list(waiting.values())), slots

    def _compute_terms(self, pairs: np.ndarray, slots: np.ndarray) -> mx.array:
        """Return the result of each pair, (pairs, hidden) float32."""
        x = self._x[mx.array(pairs // self._shape[1])]
        at = mx.array(slots)[:, None]
        (h,) = gate_up(GateUpInputs(x, at, self._gate, self._up))
        return down(DownInputs(h, at, mx.ones(at.shape), self._down, mx.float32))

    def _compute_shared_term(self, shared: SharedExpert) -> mx.array:
        """Return the shared expert's result before its gate, (tokens, hidden) float32."""
        at = mx.zeros((self._shape[0], 1), mx.uint32)
        (h,) = gate_up(GateUpInputs(self._x, at, shared.gate, shared.up))
        team = lanes(self._down.columns)
        return down(DownInputs(h, at, mx.ones(at.shape), shared.down, mx.float32, team=team))


BACKEND = FusedBackend()
