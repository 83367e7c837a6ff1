"""Compute linear layers and MLPs on the CPU, in float32, with the numba kernels or BLAS.

The modules of a loaded model are replaced by these subclasses of theirs: they keep their weights
under mlx-lm's names, and only their forward changes. A kernel needs evaluated arrays, so each call
is a synchronisation with MLX, which takes about 0.05 ms.

Inputs are (..., tokens, in): each sequence gets the bits that it has alone, however many sequences
there are.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import mla, qwen3_moe, qwen3_next

from ...checkpoint.quantization import Quantization
from ..arrays import to_numpy
from . import gemm, matvec
from .matvec import Packed
from .swiglu import MlpMatrices, few_rows, many_rows

#: Logits of more than one token are left lazy, in tiles of this many vocabulary rows (see Head).
HEAD_TILE = 8192

_NAMES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}


class Linear(nn.Linear):
    """An unquantised layer that multiplies by BLAS: MLX's own product on x86 is scalar."""

    def __call__(self, x: mx.array) -> mx.array:
        return _projected(self, x)


class QuantizedLinear(nn.QuantizedLinear):
    """A quantised layer that multiplies by the numba kernels.

    Attributes:
        activations: see `Packed`.
    """

    activations = "float32"

    def __call__(self, x: mx.array) -> mx.array:
        return _projected(self, x)


class Head(QuantizedLinear):
    """The output projection, whose logits of more than one token are computed when they are read.

    mlx-lm asks for the logits of a whole prefill chunk and drops them. They are left lazy, so that
    logits which nobody reads cost nothing: a chunk of 512 tokens times a vocabulary of 248,320
    would be half a gigabyte. One token is computed at once.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if sequence_length(x) == 1 else lazy_matmul(self, x)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantised embedding that dequantises in float32, and uses the kernels as a tied head.

    Attributes:
        activations: see `Packed`.
    """

    activations = "float32"

    def __call__(self, x: mx.array) -> mx.array:
        # MLX's own embedding dequantises, and so rounds, in the dtype of the scales.
        return dequantised(self, x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits of x, (..., tokens, hidden), as a tied head; see `Head`."""
        return _projected(self, x) if sequence_length(x) == 1 else lazy_matmul(self, x)


class _MLP(nn.Module):
    """An MLP that computes gate, up and down in one call, where all three are quantised."""

    def __call__(self, x: mx.array) -> mx.array:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(isinstance(layer, QuantizedLinear) for layer in layers):
            return super().__call__(x)  # type: ignore[misc]  # of the class behind this one
        gate, up, down = layers
        matrices = MlpMatrices(packed(gate), packed(up), packed(down))
        rows = to_numpy(x)[0].reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if sequence_length(x) <= matrices.few:
            y = few_rows(matrices, np.zeros(count, np.int64), rows, np.arange(count))
        else:
            y = many_rows(matrices, 0, rows)
        return mx.array(y.reshape(x.shape))


class NextMLP(_MLP, qwen3_next.Qwen3NextMLP):
    """The MLP of qwen3_next and qwen3_5."""


class MLP(_MLP, qwen3_moe.MLP):
    """The MLP of qwen3_moe."""


class MultiLinear(mla.MultiLinear):
    """The matrices of the heads of latent attention (MLA), by BLAS where they are unquantised."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        weight, rows = to_numpy(self.weight, x)
        return mx.array(np.matmul(rows, weight.swapaxes(-1, -2) if transpose else weight))


class QuantizedMultiLinear(mla.QuantizedMultiLinear):
    """The same where they are quantised: each head's rows go through the kernels.

    x is (..., heads, tokens, in), or has one head, which all matrices share.
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if not hasattr(self, "_packed"):
            self._packed = _stack(self)
        heads, height, width = self._packed.shape
        tokens, rows = x.shape[-2], to_numpy(x)[0]
        rows = rows.reshape(-1, *rows.shape[-3:])  # (batch, heads or 1, tokens, in)
        if not transpose:
            weight = np.empty((heads, height, width), np.float32)
            for head in range(heads):
                matvec.dequantize(self._packed, head, weight[head])
            return mx.array(np.matmul(rows, weight).reshape(*x.shape[:-3], heads, tokens, width))
        batch = len(rows)
        rows = np.broadcast_to(rows, (batch, heads, tokens, width))
        y = np.empty((batch, heads, tokens, height), np.float32)
        if tokens <= self._packed.matvec_rows:
            flat = np.ascontiguousarray(rows).reshape(-1, width)
            slots = np.tile(np.repeat(np.arange(heads), tokens), batch)
            matvec.matvec(self._packed, slots, flat, np.arange(len(flat)), y.reshape(-1, height))
        else:
            for b, head in np.ndindex(batch, heads):
                gemm.product(self._packed, head, np.ascontiguousarray(rows[b, head]), y[b, head])
        return mx.array(y.reshape(*x.shape[:-3], heads, tokens, height))


def sequence_length(x: mx.array) -> int:
    """Return the tokens of each sequence of x, (..., tokens, in)."""
    return x.shape[-2] if x.ndim > 1 else 1


def _projected(layer: nn.Module, x: mx.array) -> mx.array:
    rows = to_numpy(x)[0].reshape(-1, x.shape[-1])
    return mx.array(project(layer, rows, sequence_length(x)).reshape(*x.shape[:-1], -1))


def packed(layer: nn.Module) -> Packed:
    """Return the matrix of a quantised layer for the kernels, as a stack of one."""
    if not hasattr(layer, "_packed"):
        layer._packed = _stack(layer, layer.activations)
    return layer._packed


def _stack(layer: nn.Module, activations: str = "float32") -> Packed:
    """Return the matrices of a quantised layer, (out, in) or a stack (S, out, in) of them."""
    form = Quantization(layer.bits, layer.group_size, layer.mode)
    names = [n for n in ("weight", "scales", "biases") if layer.get(n) is not None]
    parts = {n: mx.contiguous(layer[n]) for n in names}
    dtype = form.scale_dtype or _NAMES[parts["scales"].dtype]
    views = {"weight": parts["weight"].view(mx.uint8)}
    for name in names[1:]:
        as_stored = dtype == "float32" or form.scale_dtype is not None
        views[name] = parts[name] if as_stored else parts[name].view(mx.uint16)
    mx.eval(views)
    weight, scales, *biases = (
        np.array(v, copy=False).reshape(-1, *v.shape[-2:]) for v in views.values()
    )
    last = biases[0] if biases else None
    return Packed(weight, scales, last, layer.bits, layer.group_size, dtype, activations)


def project(layer: nn.Module, x: np.ndarray, tokens: int) -> np.ndarray:
    """Apply a linear layer to rows, in numpy.

    Args:
        x: (R, in) float32.
        tokens: the rows of one sequence.

    Returns:
        (R, out) float32.
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


def dequantised(layer: nn.Module, rows: mx.array | slice) -> mx.array:
    """Return some rows of a quantised matrix in float32, unevaluated."""
    parts = {n: layer[n][rows] for n in ("weight", "scales", "biases") if layer.get(n) is not None}
    if layer.mode == "affine":  # else MLX would round to the dtype of the scales
        parts |= {n: parts[n].astype(mx.float32) for n in ("scales", "biases")}
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def lazy_matmul(layer: nn.Module, x: mx.array) -> mx.array:
    """Return x @ W.T, with the bias of the layer if it has one, in float32, unevaluated.

    It is computed in tiles of output rows, which bounds the memory that it takes.
    """
    tiles = []
    for start in range(0, layer["weight"].shape[0], HEAD_TILE):
        rows = slice(start, start + HEAD_TILE)
        tiles.append(x @ dequantised(layer, rows).T)
    y = mx.concatenate(tiles, axis=-1)
    return y + layer["bias"].astype(mx.float32) if "bias" in layer else y
