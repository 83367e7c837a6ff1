"""The second half of an expert block: down, and the weighted sum over a token's experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Rows that a team of lanes takes: measured.
ROWS = 4

#: Simdgroups of a threadgroup at most: one for each expert of a token.
MAX_SIMDS = 16


@cache
def _kernel(shared: bool, residual: bool) -> Kernel:
    own = ["shared_h", "shared_w", "shared_s", "shared_b", "gate"]
    inputs = ["h", "slots", "scores", "w", "s", "b", *own * shared, *["residual"] * residual]
    return Kernel("down", inputs, ["y"], ["rows.h"], SHARED=shared, RESIDUAL=residual)


@cache
def _combine(shared: bool, residual: bool) -> Kernel:
    inputs = ["terms", "places", "scores", *["shared", "gate"] * shared, *["residual"] * residual]
    return Kernel("combine", inputs, ["y"], ["rows.h"], SHARED=shared, RESIDUAL=residual)


@dataclass(frozen=True)
class Shared:
    """The shared expert's part of a sum.

    Attributes:
        h: (rows, in) float32, from `gate_up`. down: (out, in).
        gate: (..., any) of bf16, f16 or f32, whose column `column` is its gate before the sigmoid.
    """

    h: mx.array
    down: Matrix
    gate: mx.array
    column: int = 0


def down(
    h: mx.array,
    slots: mx.array,
    scores: mx.array,
    matrix: Matrix,
    dtype: mx.Dtype,
    *,
    shared: Shared | None = None,
    residual: mx.array | None = None,
    team: int | None = None,
) -> mx.array:
    """residual + sum of scores * down(h) + sigmoid(gate) * shared down(h), in one launch.

    The terms are added in the order of a token's experts, then the shared one, then the residual,
    in float32, and rounded once.

    Args:
        h: (rows * top_k, in) float32, from `gate_up`.
        slots: (..., top_k) uint32, rows of them. scores: (..., top_k) float32.
        matrix: a stack of (out, in).
        dtype: of the result.
        residual: (..., out).
        team: lanes that share a row, those of `matrix` by default: they settle the order of a sum,
            also of the shared expert's.

    Returns:
        (..., out).
    """
    *lead, top_k = slots.shape
    rows = slots.size // top_k
    team = team or lanes(matrix.columns)
    inputs, template = [h, slots, scores, *matrix.arrays], []
    if shared is not None:
        inputs += [shared.h, *shared.down.arrays, shared.gate]
        template += [("SHARED_IN", shared.down.columns), *shared.down.template("SHARED_")]
        template += [("GATE_STRIDE", shared.gate.shape[-1]), ("GATE_AT", shared.column)]
    if residual is not None:
        inputs.append(residual)
    simds = min(top_k + (shared is not None), MAX_SIMDS)
    groups = -(-matrix.rows // (ROWS * 32 // team))
    (y,) = _kernel(shared is not None, residual is not None)(
        inputs=inputs,
        template=[
            ("Y", dtype),
            ("IN", matrix.columns),
            ("OUT", matrix.rows),
            ("TOP_K", top_k),
            *matrix.template(),
            *template,
            ("LANES", team),
            ("ROWS", ROWS),
            ("SIMDS", simds),
        ],
        grid=(groups * simds * 32, rows, 1),
        threadgroup=(simds * 32, 1, 1),
        output_shapes=[(*lead, matrix.rows)],
        output_dtypes=[dtype],
    )
    return y


def combine(
    terms: mx.array,
    places: mx.array,
    scores: mx.array,
    dtype: mx.Dtype,
    *,
    shared: mx.array | None = None,
    gate: mx.array | None = None,
    column: int = 0,
    residual: mx.array | None = None,
) -> mx.array:
    """What `down` gives, from terms that it gave apart with top_k=1 and scores of 1: the same bits.

    Args:
        terms: (pairs, out) float32.
        places: (..., top_k) uint32, the row of terms that is each token's k-th, rows of them.
        scores: (..., top_k) float32.
        shared: (rows, out) float32, the shared expert's; gate, column: see `Shared`.
        residual: (..., out).

    Returns:
        (..., out).
    """
    *lead, top_k = places.shape
    rows = places.size // top_k
    out = terms.shape[-1]
    inputs, template = [terms, places, scores], []
    if shared is not None:
        inputs += [shared, gate]
        template = [("GATE_STRIDE", gate.shape[-1]), ("GATE_AT", column)]
    if residual is not None:
        inputs.append(residual)
    (y,) = _combine(shared is not None, residual is not None)(
        inputs=inputs,
        template=[("Y", dtype), ("OUT", out), ("TOP_K", top_k), *template],
        grid=(-(-out // 256) * 256, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(*lead, out)],
        output_dtypes=[dtype],
    )
    return y
