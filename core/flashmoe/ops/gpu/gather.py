"""Compute experts on a GPU with MLX's own `gather_qmm` and `gather_mm` over the slots.

MLX picks its kernel by the shape of the call, and different kernels round differently. So each
call here has a shape that depends on the router only, never on which experts happen to be resident.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ...streaming.compute import ExpertWork
from ...streaming.slot_memory import SlotMemory
from ..reference.experts import ReferenceBackend, ReferenceWork

#: The most pairs that go through one gather; more are computed expert by expert.
GATHER_PAIRS = 64


class GatherBackend(ReferenceBackend):
    """Computes experts by MLX's gathered products; the dense layers are MLX's too."""

    name = "gather"
    # Launches are what costs on a GPU: wait for all reads of a wave, then compute it at once.
    computes_as_loaded = False

    def start(
        self, slots: SlotMemory, x: mx.array, top_k: int, *, separate: bool = False
    ) -> ExpertWork:
        return GatherWork(slots, x, top_k)


class GatherWork(ReferenceWork):
    """The experts of one layer applied to one input, in one gather if its tokens are few."""

    def __init__(self, slots: SlotMemory, x: mx.array, top_k: int):
        super().__init__(slots, x, top_k)
        self._y: mx.array | None = None
        pairs = x.shape[0] * top_k
        self._slot_of_pair = np.zeros(pairs, np.uint32) if pairs <= GATHER_PAIRS else None

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        if self._slot_of_pair is None:
            super().run(experts)
            return
        # All calls have one shape, whichever experts are resident. So pairs of other experts are
        # computed too, with a resident expert in their place, so that no slot is read while it is
        # written; their results are thrown away.
        self._slot_of_pair.fill(next(iter(experts)))
        mine = np.zeros(self._slot_of_pair.size, bool)
        for slot, pairs in experts.items():
            self._slot_of_pair[pairs] = slot
            mine[pairs] = True
        x = mx.repeat(self.x, self.top_k, axis=0)[:, None, :]
        y = self._chain(x, mx.array(self._slot_of_pair)).squeeze(-2)
        self._y = y if self._y is None else mx.where(mx.array(mine)[:, None], y, self._y)
        # The caller may overwrite the slots from here on, so nothing may be left lazy.
        mx.eval(self._y)

    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden), in the dtype of x."""
        if self._y is None:
            return super().result()
        return self._y.reshape(self.x.shape[0], self.top_k, -1)

    def _expert(self, slot: int, x: mx.array) -> mx.array:
        return self._chain(x[None], mx.array([slot], mx.uint32))[0]

    def _chain(self, x: mx.array, slots: mx.array) -> mx.array:
        """Apply the expert in slots[i] to the rows x[i].

        x: (pairs, rows, hidden), slots: (pairs,) -> (pairs, rows, hidden).
        """
        *inner, outer = self.slots.form.projections
        h = self.slots.form.activate([self._linear(name, x, slots) for name in inner])
        return self._linear(outer, h, slots)

    def _linear(self, projection: str, x: mx.array, slots: mx.array) -> mx.array:
        y = self._product(projection, x, slots)
        bias = self.slots.stack(projection, "bias")
        return y if bias is None else y + bias[slots][:, None]

    def _product(self, projection: str, x: mx.array, slots: mx.array) -> mx.array:
        weight, scales, biases = self.slots.stacks(projection)
        assert weight is not None, f"{projection} has no weights"
        quantization = self.slots.layer.quantization[projection]
        if quantization is None:
            return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=slots)
        assert scales is not None, f"{projection} is quantised and has no scales"
        return mx.gather_qmm(
            x,
            weight,
            scales,
            biases,
            rhs_indices=slots,
            transpose=True,
            group_size=quantization.group_size,
            bits=quantization.bits,
            mode=quantization.mode,
            global_scale=self.slots.stack(projection, "global_scale"),
        )


BACKEND = GatherBackend()
