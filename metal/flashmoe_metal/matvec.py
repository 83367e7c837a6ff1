"""Multiply one matrix by a few rows."""

from __future__ import annotations

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Matrix rows of a team of lanes, and simdgroups of a threadgroup; both as measured.
ROWS, SIMDS = 2, 4

_kernel = Kernel("matvec", ["x", "w", "s", "b"], ["y"], ["rows.h"])


def matvec(x: mx.array, matrix: Matrix) -> mx.array:
    """Return x @ matrix.T.

    Args:
        x: (..., in) of bf16, f16 or f32.
        matrix: (out, in).

    Returns:
        (..., out) in the dtype of x.
    """
    rows = x.size // matrix.columns
    team = lanes(matrix.columns)
    groups = -(-matrix.rows // (ROWS * 32 // team * SIMDS))
    (y,) = _kernel(
        inputs=[x, *matrix.arrays],
        template=[
            ("T", x.dtype),
            ("IN", matrix.columns),
            *matrix.template(),
            ("LANES", team),
            ("ROWS", ROWS),
            ("SIMDS", SIMDS),
        ],
        grid=(groups * SIMDS * 32, rows, 1),
        threadgroup=(SIMDS * 32, 1, 1),
        output_shapes=[(*x.shape[:-1], matrix.rows)],
        output_dtypes=[x.dtype],
    )
    return y
