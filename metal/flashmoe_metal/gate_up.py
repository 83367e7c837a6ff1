"""The first half of an expert: gate, up and SwiGLU."""

from __future__ import annotations

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Rows of each matrix that a team of lanes takes, and simdgroups of a threadgroup: measured.
ROWS, SIMDS = 1, 4

_PARTS = [f"{m}_{part}" for m in ("gate", "up") for part in "wsb"]
_kernel = Kernel(
    "gate_up",
    ["x", "slots", *_PARTS, *(f"shared_{part}" for part in _PARTS)],
    ["h", "shared_h"],
    ["rows.h"],
)


def gate_up(
    x: mx.array,
    slots: mx.array,
    gate: Matrix,
    up: Matrix,
    shared: tuple[Matrix, Matrix] | None = None,
) -> tuple[mx.array, mx.array]:
    """silu(gate(x)) * up(x) of each token's experts, and of the shared one, in one launch.

    Args:
        x: (..., in) of bf16, f16 or f32, rows of them.
        slots: (..., top_k) uint32, where each token's experts lie in the stacks.
        gate, up: stacks of (out, in).
        shared: gate and up (shared out, in) of the shared expert.

    Returns:
        (rows * top_k, out) float32, and (rows, shared out) float32: (1, 1) without a shared one.
    """
    top_k = slots.shape[-1]
    rows = slots.size // top_k
    shared_gate, shared_up = shared or (gate, up)
    team = lanes(gate.columns)
    outs = max(gate.rows, shared_gate.rows)
    groups = -(-outs // (ROWS * 32 // team * SIMDS))
    return _kernel(
        inputs=[
            x,
            slots,
            *gate.arrays,
            *up.arrays,
            *shared_gate.arrays,
            *shared_up.arrays,
        ],  # fmt: skip
        template=[
            ("T", x.dtype),
            ("IN", gate.columns),
            ("OUT", gate.rows),
            ("TOP_K", top_k),
            ("SHARED", shared is not None),
            *gate.template(),
            ("SHARED_OUT", shared_gate.rows),
            *shared_gate.template("SHARED_"),
            ("LANES", team),
            ("ROWS", ROWS),
            ("SIMDS", SIMDS),
        ],
        grid=(groups * SIMDS * 32, rows * (top_k + (shared is not None)), 1),
        threadgroup=(SIMDS * 32, 1, 1),
        output_shapes=[
            (rows * top_k, gate.rows),
            (rows, shared_gate.rows) if shared else (1, 1),
        ],
        output_dtypes=[mx.float32, mx.float32],
    )
