"""mlx's linear layers and mlx-lm's MLP on the CPU, in float32, by the numba kernels or BLAS.

Instances become one of these classes in place (`module.__class__ = ...`): they keep their weights
under mlx-lm's names, and only their forward changes. A kernel needs evaluated arrays, so each call
is a synchronisation with MLX: about 0.05 ms.

x is (..., tokens, in): each sequence gets the bits that it has alone, however many there are.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_moe, qwen3_next

from ..arrays import to_numpy
from . import gemm
from . import swiglu as glu
from .matvec import Packed

#: Logits of more than one row are left lazy, in tiles of so many vocabulary rows (see Head).
HEAD_TILE = 8192

_NAMES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}


class Linear(nn.Linear):
    """By BLAS: MLX's own product on x86 is scalar."""

    def __call__(self, x: mx.array) -> mx.array:
        return _projected(self, x)


class QuantizedLinear(nn.QuantizedLinear):
    activations = "float32"

    def __call__(self, x: mx.array) -> mx.array:
        return _projected(self, x)


class Head(QuantizedLinear):
    """The output projection. mlx-lm asks for the logits of a whole prefill chunk and drops them.

    One token is computed at once. More are left lazy, so that logits which nobody reads cost
    nothing: a chunk of 512 tokens times a vocabulary of 248,320 would be half a gigabyte.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if tokens_of(x) == 1 else lazy_matmul(self, x)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """In float32, or by the kernels as a tied head."""

    activations = "float32"

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
        return _projected(self, x) if tokens_of(x) == 1 else lazy_matmul(self, x)


class _MLP:
    """gate, up and down in one go, when all three are quantised."""

    def __call__(self, x: mx.array) -> mx.array:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(isinstance(layer, QuantizedLinear) for layer in layers):
            return super().__call__(x)
        matrices = [packed(layer) for layer in layers]
        rows = to_numpy(x)[0].reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if tokens_of(x) <= glu.few(matrices):
            y = glu.few_rows(*matrices, np.zeros(count, np.int64), rows, np.arange(count))
        else:
            y = glu.many_rows(*matrices, 0, rows)
        return mx.array(y.reshape(x.shape))


class NextMLP(_MLP, qwen3_next.Qwen3NextMLP):
    pass


class MLP(_MLP, qwen3_moe.MLP):
    pass


def tokens_of(x: mx.array) -> int:
    """Of each sequence of x (..., tokens, in)."""
    return x.shape[-2] if x.ndim > 1 else 1


def _projected(layer: nn.Module, x: mx.array) -> mx.array:
    rows = to_numpy(x)[0].reshape(-1, x.shape[-1])
    return mx.array(project(layer, rows, tokens_of(x)).reshape(*x.shape[:-1], -1))


def packed(layer: nn.Module) -> Packed:
    """The matrix of a quantised layer for the kernels, as a stack of one."""
    if not hasattr(layer, "_packed"):
        parts = {n: mx.contiguous(layer[n]) for n in ("weight", "scales", "biases")}
        dtype = _NAMES[parts["scales"].dtype]
        views = {"weight": parts["weight"].view(mx.uint8)}
        for name in ("scales", "biases"):
            views[name] = parts[name] if dtype == "float32" else parts[name].view(mx.uint16)
        mx.eval(views)
        arrays = [np.array(v, copy=False)[None] for v in views.values()]
        layer._packed = Packed(*arrays, layer.bits, layer.group_size, dtype, layer.activations)
    return layer._packed


def project(layer: nn.Module, x: np.ndarray, tokens: int) -> np.ndarray:
    """A linear layer applied to rows, in numpy. x: (R, in) float32 -> (R, out) float32.

    tokens: rows of a sequence.
    """
    if isinstance(layer, nn.Linear):
        # BLAS rounds by the number of rows: one product for each sequence.
        y = x.reshape(-1, tokens, x.shape[1]) @ to_numpy(layer.weight)[0].T
        y = y.reshape(len(x), -1)
    else:
        matrix = packed(layer)
        y = np.empty((x.shape[0], matrix.weight.shape[1]), np.float32)
        gemm.matmul(matrix, 0, x, y, tokens)
    return y + to_numpy(layer.bias)[0] if "bias" in layer else y


def lazy_matmul(layer: nn.Module, x: mx.array) -> mx.array:
    """x @ W.T in float32, unevaluated, in tiles of output rows that bound the memory it takes."""
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
