"""Products of one matrix with a few rows."""

from __future__ import annotations

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Rows that a team of lanes takes, and simdgroups of a threadgroup: measured.
ROWS, SIMDS = 2, 4

_kernel = Kernel("matvec", ["x", "w", "s", "b"], ["y"], ["rows.h"])


def matvec(x: mx.array, matrix: Matrix) -> mx.array:
    """x @ matrix.T. x: (..., in) of bf16, f16 or f32; matrix: (out, in) -> (..., out)."""
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
