"""The expert block in plain MLX: the definition that faster ops are held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu

# The twins of our GPU kernels are part of the definition, and fill a module of their own.

if TYPE_CHECKING:
    from ...checkpoint.checkpoint import Quantization
    from ...streaming.slot_memory import SlotMemory

NAME = "reference"

#: A `run` may be called for each expert as soon as it is resident: no larger batch is faster.
computes_as_loaded = True


#: See `flashmoe.ops.cpu.experts`.
stacks_sequences = False

#: Values of the setting that these ops have. See `flashmoe.ops.activations`.
ACTIVATIONS = ("float32",)


def project(x: mx.array, weight, scales, biases, quantization: Quantization | None) -> mx.array:
    """x @ W.T for one expert. x: (rows, in); weight: (out, in), packed when quantised."""
    if quantization is None:
        return x @ weight.T
    kind = {"group_size": quantization.group_size, "bits": quantization.bits}
    if scales.shape[-1] == 1 and mx.cuda.is_available():
        # For rows of one group MLX 0.32.4 gave numbers that are none on Hopper.
        return x @ mx.dequantize(weight, scales, biases, **kind).T
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **kind)


def prepare(model: nn.Module, head: nn.Module | None) -> None:
    """Make the model's dense layers ready: on the CPU all goes to float32."""
    if mx.default_device() != mx.gpu:
        model.set_dtype(mx.float32)


def weighted_sum(y: mx.array, scores: mx.array) -> mx.array:
    """y: (tokens, top_k, hidden), scores: (tokens, top_k) -> (tokens, hidden)."""
    return (y * scores[..., None]).sum(axis=-2)


class Work:
    """The expert block of one layer for one call. See `flashmoe.ops`."""

    lazy = False

    def __init__(self, bank: SlotMemory, x: mx.array, top_k: int):
        self.bank = bank
        self.x = x
        self.top_k = top_k
        self._pairs: list[np.ndarray] = []
        self._outputs: list[mx.array] = []

    def run(self, experts: dict[int, np.ndarray]) -> None:
        """Compute the pairs of resident experts: slot -> pairs. Ends when the slots were read."""
        for slot, pairs in experts.items():
            self._outputs.append(self._expert(slot, self.x[mx.array(pairs // self.top_k)]))
            self._pairs.append(pairs)
        # The caller may now overwrite the slots, so nothing may be left lazy.
        mx.eval(self._outputs)

    def settle(self) -> None:
        """Nothing that was run reads a slot after this."""

    def result(self) -> mx.array:
        """(tokens, top_k, hidden), in the dtype of x."""
        order = np.argsort(np.concatenate(self._pairs))
        y = mx.concatenate(self._outputs)[mx.array(order)]
        return y.reshape(self.x.shape[0], self.top_k, -1)

    def combined(self, scores: mx.array) -> mx.array:
        """The sum over a token's choices, each times its score: (tokens, hidden)."""
        return weighted_sum(self.result(), scores)

    def _expert(self, slot: int, x: mx.array) -> mx.array:
        quantization = self.bank.layer.quantization

        def linear(projection, x):
            return project(x, *self.bank.matrix(projection, slot), quantization[projection])

        h = swiglu(linear("gate_proj", x), linear("up_proj", x))
        return linear("down_proj", h)
