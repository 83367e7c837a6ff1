"""Compute experts in plain MLX: the definition that the faster backends are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
        *inner, outer = self.slots.form.projections

        def linear(projection: str, x: mx.array) -> mx.array:
            parts = self.slots.expert_arrays(projection, slot)
            return project(x, parts, quantization[projection])

        h = self.slots.form.activate([linear(projection, x) for projection in inner])
        if self._observer is not None:
            self._observer.intermediate(self.slots.layer.layer, slot, _float32(h))
        return linear(outer, h)


def project(
    x: mx.array, parts: Mapping[str, mx.array], quantization: Quantization | None
) -> mx.array:
    """Return x @ W.T + bias for one expert.

    Args:
        x: (rows, in).
        parts: "weight" (out, in), packed where it is quantised; "scales" and "biases" (out, groups)
            as the quantisation has them; perhaps "bias" (out,) and "global_scale" ().

    Returns:
        (rows, out).
    """
    y = _product(x, parts, quantization)
    return y + parts["bias"].astype(y.dtype) if "bias" in parts else y


def _product(
    x: mx.array, parts: Mapping[str, mx.array], quantization: Quantization | None
) -> mx.array:
    weight = parts["weight"]
    if quantization is None:
        return x @ weight.T
    scales, biases = parts["scales"], parts.get("biases")
    q = quantization
    few_groups = scales.shape[-1] == 1 and mx.cuda.is_available()
    if few_groups or "global_scale" in parts:
        # For rows of one group MLX 0.32.4 returned NaN on Hopper; its product of one matrix has no
        # global scale.
        wide = mx.dequantize(
            weight,
            scales,
            biases,
            group_size=q.group_size,
            bits=q.bits,
            mode=q.mode,
            global_scale=parts.get("global_scale"),
            dtype=x.dtype,
        )
        return x @ wide.T
    return mx.quantized_matmul(
        x, weight, scales, biases, transpose=True, group_size=q.group_size, bits=q.bits, mode=q.mode
    )


def _float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


BACKEND = ReferenceBackend()
