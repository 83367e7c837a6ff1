"""Add attention to a layer's input and compute the RMS norm of the sum, in one launch."""

from __future__ import annotations

import mlx.core as mx

from .kernel import Kernel

#: With more rows than this, MLX's own two launches read and write faster.
MAX_ROWS = 16

_kernel = Kernel("add_norm", inputs=("x", "r", "weight", "eps"), outputs=("h", "normed"))


def supports(x: mx.array, r: mx.array, weight: mx.array) -> bool:
    """Return whether the kernel takes these arrays: a few rows, all of one dtype."""
    width = x.shape[-1]
    return (
        x.size <= MAX_ROWS * width
        and x.shape == r.shape
        and x.dtype == r.dtype == weight.dtype
        and width <= 16384
    )


def add_norm(x: mx.array, r: mx.array, weight: mx.array, eps: mx.array) -> list[mx.array]:
    """Return h = x + r and the norm of h times weight, rounded as `mx.fast.rms_norm` rounds it.

    Args:
        x, r: (..., D), of one dtype.
        weight: (D,), of the same dtype.
        eps: (1,) float32, added to the mean of squares.

    Returns:
        h and the normed h, each (..., D).
    """
    width = x.shape[-1]
    simds = min(-(-width // 128), 32)
    return _kernel(
        inputs=[x, r, weight, eps],
        template=[("T", x.dtype), ("D", width), ("SIMDS", simds)],
        grid=(x.size // width * simds * 32, 1, 1),
        threadgroup=(simds * 32, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
