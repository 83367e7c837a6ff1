"""The first half of an expert: gate, up and SwiGLU."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Rows of each matrix that a team of lanes takes, and simdgroups of a threadgroup: measured.
ROWS, SIMDS = 1, 4


@cache
def _kernel(shared: bool) -> Kernel:
    parts = [f"{m}_{part}" for m in ("gate", "up") for part in "wsb"]
    inputs, outputs = ["x", "slots", *parts], ["h"]
    if shared:
        inputs += [f"shared_{part}" for part in parts]
        outputs.append("shared_h")
    return Kernel("gate_up", inputs, outputs, ["rows.h"], SHARED=shared)


def gate_up(
    x: mx.array,
    slots: mx.array,
    gate: Matrix,
    up: Matrix,
    shared: tuple[Matrix, Matrix] | None = None,
) -> list[mx.array]:
    """silu(gate(x)) * up(x) of each token's experts, and of the shared one, in one launch.

    Args:
        x: (..., in) of bf16, f16 or f32, rows of them.
        slots: (..., top_k) uint32, where each token's experts lie in the stacks.
        gate, up: stacks of (out, in).
        shared: gate and up (shared out, in) of the shared expert.

    Returns:
        (rows * top_k, out) float32, and (rows, shared out) float32 if there is a shared one.
    """
    top_k = slots.shape[-1]
    rows = slots.size // top_k
    team = lanes(gate.columns)
    inputs, outs, template = [x, slots, *gate.arrays, *up.arrays], [gate.rows], []
    shapes = [(rows * top_k, gate.rows)]
    if shared is not None:
        inputs += [*shared[0].arrays, *shared[1].arrays]
        outs.append(shared[0].rows)
        shapes.append((rows, shared[0].rows))
        template = [("SHARED_OUT", shared[0].rows), *shared[0].template("SHARED_")]
    groups = -(-max(outs) // (ROWS * 32 // team * SIMDS))
    return _kernel(shared is not None)(
        inputs=inputs,
        template=[
            ("T", x.dtype),
            ("IN", gate.columns),
            ("OUT", gate.rows),
            ("TOP_K", top_k),
            *gate.template(),
            *template,
            ("LANES", team),
            ("ROWS", ROWS),
            ("SIMDS", SIMDS),
        ],
        grid=(groups * SIMDS * 32, rows * (top_k + (shared is not None)), 1),
        threadgroup=(SIMDS * 32, 1, 1),
        output_shapes=shapes,
        output_dtypes=[mx.float32] * len(shapes),
    )
