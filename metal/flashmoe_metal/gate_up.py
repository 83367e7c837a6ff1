"""Compute the first half of experts: gate, up and SwiGLU."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Rows of each matrix of a team of lanes, and simdgroups of a threadgroup; both as measured.
ROWS, SIMDS = 1, 4


class GateUpInputs(NamedTuple):
    """What a call of `gate_up` reads.

    Attributes:
        x: (..., in) of bf16, f16 or f32.
        slots: (..., top_k) uint32, the slots of each token's experts in the stacks.
        gate, up: stacks of (out, in).
        shared: gate and up of the shared expert, (shared out, in) each; None without one.
    """

    x: mx.array
    slots: mx.array
    gate: Matrix
    up: Matrix
    shared: tuple[Matrix, Matrix] | None = None


@cache
def _kernel(shared: bool) -> Kernel:
    parts = [f"{m}_{part}" for m in ("gate", "up") for part in "wsb"]
    inputs, outputs = ["x", "slots", *parts], ["h"]
    if shared:
        inputs += [f"shared_{part}" for part in parts]
        outputs.append("shared_h")
    return Kernel("gate_up", inputs, outputs, ["rows.h"], SHARED=shared)


def gate_up(inputs: GateUpInputs) -> list[mx.array]:
    """Return silu(gate(x)) * up(x) of each token's experts and of the shared one, in one launch.

    Returns:
        (tokens * top_k, out) float32, and (tokens, shared out) float32 with a shared expert.
    """
    x, slots, gate, up, shared = inputs
    top_k = slots.shape[-1]
    rows = slots.size // top_k
    team = lanes(gate.columns)
    arrays, outs, template = [x, slots, *gate.arrays, *up.arrays], [gate.rows], []
    shapes = [(rows * top_k, gate.rows)]
    if shared is not None:
        arrays += [*shared[0].arrays, *shared[1].arrays]
        outs.append(shared[0].rows)
        shapes.append((rows, shared[0].rows))
        template = [("SHARED_OUT", shared[0].rows), *shared[0].template("SHARED_")]
    groups = -(-max(outs) // (ROWS * 32 // team * SIMDS))
    return _kernel(shared is not None)(
        inputs=arrays,
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
