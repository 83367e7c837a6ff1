"""Compute experts in plain MLX: the definition that the faster backends are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu

from ...checkpoint.quantization import Quantization
from ...streaming.compute import Backend, ExpertObserver, ExpertWork
from ...streaming.slot_memory import SlotMemory


class ReferenceBackend(Backend):
    """Computes in plain MLX, expert by expert.

    Args:
        observer: an object that is told what enters the experts; None for no one.
    """

    name = "reference"
    # No expert is computed faster for waiting until others have arrived.
    computes_as_loaded = True

    def __init__(self, observer: ExpertObserver | None = None):
        self._observer = observer

    def start(
        self, slots: SlotMemory, x: mx.array, top_k: int, *, separate: bool = False
    ) -> ExpertWork:
        return ReferenceWork(slots, x, top_k, self._observer)

    def set_dtypes(self, model: nn.Module) -> None:
        """Convert all weights to float32 on the CPU; on a GPU leave them as they are."""
        if mx.default_device() != mx.gpu:
            model.set_dtype(mx.float32)


class ReferenceWork(ExpertWork):
    """The experts of one layer applied to the tokens of one input, expert by expert.

    Args:
        slots: the memory of the layer's experts.
        x: (tokens, hidden).
        top_k: choices of a token.
        observer: see `ReferenceBackend`.
    """

    def __init__(
        self,
        slots: SlotMemory,
        x: mx.array,
        top_k: int,
        observer: ExpertObserver | None = None,
    ):
        self.slots = slots
        self.x = x
        self.top_k = top_k
        self._observer = observer
        self._pairs: list[np.ndarray] = []
        self._outputs: list[mx.array] = []
        if observer is not None:
            observer.hidden(slots.layer.layer, _float32(x))

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        for slot, pairs in experts.items():
            self._outputs.append(self._expert(slot, self.x[mx.array(pairs // self.top_k)]))
            self._pairs.append(pairs)
        # The caller may overwrite the slots from here on, so nothing may be left lazy.
        mx.eval(self._outputs)

    def stop_reading(self) -> None:
        """Do nothing: `run` returns when it has read its slots."""

    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden), in the dtype of x."""
        order = np.argsort(np.concatenate(self._pairs))
        y = mx.concatenate(self._outputs)[mx.array(order)]
        return y.reshape(self.x.shape[0], self.top_k, -1)

    def combined(self, scores: mx.array) -> mx.array:
        return BACKEND.weighted_sum(self.result(), scores)

    def _expert(self, slot: int, x: mx.array) -> mx.array:
        quantization = self.slots.layer.quantization

        def linear(projection: str, x: mx.array) -> mx.array:
            weight, scales, biases = self.slots.expert_arrays(projection, slot)
            assert weight is not None, f"{projection} has no weights"
            return project(x, weight, scales, biases, quantization[projection])

        h = swiglu(linear("gate_proj", x), linear("up_proj", x))
        if self._observer is not None:
            self._observer.intermediate(self.slots.layer.layer, slot, _float32(h))
        return linear("down_proj", h)


def project(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    quantization: Quantization | None,
) -> mx.array:
    """Return x @ W.T for one expert.

    Args:
        x: (rows, in).
        weight: (out, in), packed where it is quantised.
        scales, biases: (out, groups); None where `quantization` is None.

    Returns:
        (rows, out).
    """
    if quantization is None:
        return x @ weight.T
    assert scales is not None, "a quantised projection has scales"
    bits, group_size = quantization.bits, quantization.group_size
    if scales.shape[-1] == 1 and mx.cuda.is_available():
        # For rows of one group MLX 0.32.4 returned NaN on Hopper.
        return x @ mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits).T
    return mx.quantized_matmul(
        x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits
    )


def _float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


BACKEND = ReferenceBackend()
