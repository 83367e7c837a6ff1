"""The expert block and the dense linears on the CPU, by the numba kernels.

MLX's quantised matmul on x86 is scalar and runs on one thread (0.08 to 0.7 GB/s of weights), so
every quantised matrix goes through `kernels` here, in float32. A kernel needs evaluated arrays:
each call is a synchronisation with MLX, about 0.05 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import cpu as kernels
from . import gated_delta
from .host import host

if TYPE_CHECKING:
    from ..bank import ExpertBank

#: Each expert is computed as soon as it has landed, while the others are still being read.
AS_THEY_LAND = True

#: Logits of more than one row are left lazy, in tiles of so many vocabulary rows (see Head).
HEAD_TILE = 8192

_NAMES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}


class Work:
    """The expert block of one layer for one call. See `flashmoe.ops`."""

    def __init__(self, bank: ExpertBank, x: mx.array, top_k: int):
        (self.x,) = host(x)
        self.top_k = top_k
        self.gate = bank.packed("gate_proj")
        self.up = bank.packed("up_proj")
        self.down = bank.packed("down_proj")
        self.y = np.empty((x.shape[0] * top_k, x.shape[1]), np.float32)

    def run(self, experts: dict[int, np.ndarray]) -> None:
        """Compute the pairs of resident experts: slot -> pairs. Ends when the slots were read."""
        few = {s: p for s, p in experts.items() if p.size <= kernels.MATVEC_ROWS}
        if few:
            slots = np.repeat(np.fromiter(few, np.int64), [p.size for p in few.values()])
            self._few(slots, np.concatenate(list(few.values())))
        for slot, pairs in experts.items():
            if slot not in few:
                self._many(slot, pairs)

    def result(self) -> mx.array:
        """(tokens, top_k, hidden), float32."""
        return mx.array(self.y.reshape(self.x.shape[0], self.top_k, -1))

    def _few(self, slots: np.ndarray, pairs: np.ndarray) -> None:
        h = np.empty((pairs.size, self.gate.weight.shape[1]), np.float32)
        y = np.empty((pairs.size, self.y.shape[1]), np.float32)
        kernels.gate_up(self.gate, self.up, slots, self.x, pairs // self.top_k, h)
        kernels.matvec(self.down, slots, h, np.arange(pairs.size), y)
        self.y[pairs] = y

    def _many(self, slot: int, pairs: np.ndarray) -> None:
        x = self.x[pairs // self.top_k]
        gate = np.empty((pairs.size, self.gate.weight.shape[1]), np.float32)
        up = np.empty_like(gate)
        y = np.empty_like(x)
        kernels.matmul(self.gate, slot, x, gate)
        kernels.matmul(self.up, slot, x, up)
        gate *= 1 / (1 + np.exp(-gate))
        gate *= up
        kernels.matmul(self.down, slot, gate, y)
        self.y[pairs] = y


class QuantizedLinear(nn.QuantizedLinear):
    """mlx's QuantizedLinear, computed in float32 by the numba kernels."""

    def __call__(self, x: mx.array) -> mx.array:
        y = matmul(self, x)
        return y + self["bias"] if "bias" in self else y


class Head(QuantizedLinear):
    """The output projection. mlx-lm asks for the logits of a whole prefill chunk and drops them.

    One row is computed at once. More rows are left lazy, so that logits which nobody reads cost
    nothing: a chunk of 512 tokens times a vocabulary of 248,320 would be half a gigabyte.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if is_one_row(x) else lazy_matmul(self, x)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """mlx's QuantizedEmbedding in float32, with the numba kernels as a tied head."""

    def __call__(self, x: mx.array) -> mx.array:
        # mlx would dequantise, and so round, in the dtype of the scales.
        return mx.dequantize(
            self["weight"][x],
            self["scales"][x].astype(mx.float32),
            self["biases"][x].astype(mx.float32),
            group_size=self.group_size,
            bits=self.bits,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        return matmul(self, x) if is_one_row(x) else lazy_matmul(self, x)


def is_one_row(x: mx.array) -> bool:
    return x.size == x.shape[-1]


def packed(layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> kernels.Packed:
    """The layer's matrix for the kernels, as a stack of one."""
    if not hasattr(layer, "_packed"):
        parts = {n: mx.contiguous(layer[n]) for n in ("weight", "scales", "biases")}
        dtype = _NAMES[parts["scales"].dtype]
        views = {"weight": parts["weight"].view(mx.uint8)}
        for name in ("scales", "biases"):
            views[name] = parts[name] if dtype == "float32" else parts[name].view(mx.uint16)
        mx.eval(views)
        arrays = [np.array(v, copy=False)[None] for v in views.values()]
        # A plain attribute of a Module must not be an array or a tuple: those are parameters.
        object.__setattr__(
            layer, "_packed", kernels.Packed(*arrays, layer.bits, layer.group_size, dtype)
        )
    return layer._packed


def matmul(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> mx.array:
    """x @ W.T in float32. x: (..., in) -> (..., out)."""
    matrix = packed(layer)
    rows = host(x)[0].reshape(-1, x.shape[-1])
    out = np.empty((rows.shape[0], matrix.weight.shape[1]), np.float32)
    kernels.matmul(matrix, 0, rows, out)
    return mx.array(out).reshape(*x.shape[:-1], -1)


def lazy_matmul(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, x: mx.array) -> mx.array:
    """x @ W.T in float32, unevaluated, in tiles of output rows to bound the memory it would take."""
    tiles = []
    for start in range(0, layer["weight"].shape[0], HEAD_TILE):
        rows = slice(start, start + HEAD_TILE)
        weight = mx.dequantize(
            layer["weight"][rows],
            layer["scales"][rows].astype(mx.float32),
            layer["biases"][rows].astype(mx.float32),
            group_size=layer.group_size,
            bits=layer.bits,
        )
        tiles.append(x @ weight.T)
    return mx.concatenate(tiles, axis=-1)


def prepare(model: nn.Module, head: nn.Module | None) -> None:
    """Let the model's quantised layers compute through the kernels; the rest goes to float32.

    Args:
        model: an mlx-lm model with its dense weights, evaluated or not.
        head: its output projection when that is a layer of its own, None when tied.
    """
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = Head if module is head else QuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = QuantizedEmbedding
        else:
            if type(module).__name__ in ("GatedDeltaNet", "Qwen3NextGatedDeltaNet"):
                gated_delta.adopt(module)
            # The scales of quantised layers stay as they are: the kernels widen them exactly.
            own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
            for name, value in own.items():
                if mx.issubdtype(value.dtype, mx.floating):
                    module[name] = value.astype(mx.float32)
