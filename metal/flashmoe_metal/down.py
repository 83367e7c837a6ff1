"""Compute the second half of experts: down, and the weighted sum over a token's experts."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from .kernel import Kernel
from .matrix import Matrix, lanes

#: Matrix rows of a team of lanes; as measured.
ROWS = 4

#: The most simdgroups of a threadgroup, which has one for each expert of a token.
MAX_SIMDS = 16


class SharedExpertInputs(NamedTuple):
    """What `down` reads of the shared expert.

    Attributes:
        h: (tokens, in) float32, from `gate_up`.
        down: (out, in).
        gate: (..., any) of bf16, f16 or f32, of which one column is the gate before its sigmoid.
        column: that column.
    """

    h: mx.array
    down: Matrix
    gate: mx.array
    column: int = 0


class DownInputs(NamedTuple):
    """What a call of `down` reads.

    Attributes:
        h: (tokens * top_k, in) float32, from `gate_up`.
        slots: (..., top_k) uint32, the slots of each token's experts in the stack.
        scores: (..., top_k) float32.
        matrix: a stack of (out, in).
        dtype: the dtype of the result.
        shared: the shared expert's part; None without one.
        residual: (..., out), or None.
        team: the lanes that share a row, by default those of `matrix`. They determine the order of
            a sum, that of the shared expert too.
    """

    h: mx.array
    slots: mx.array
    scores: mx.array
    matrix: Matrix
    dtype: mx.Dtype
    shared: SharedExpertInputs | None = None
    residual: mx.array | None = None
    team: int | None = None


class SharedExpertTerm(NamedTuple):
    """The shared expert's result and its gate, as `combine` reads them.

    Attributes:
        values: (tokens, out) float32.
        gate, column: see `SharedExpertInputs`.
    """

    values: mx.array
    gate: mx.array
    column: int = 0


class CombineInputs(NamedTuple):
    """What a call of `combine` reads.

    Attributes:
        terms: (pairs, out) float32, each from `down` with top_k=1 and a score of 1.
        places: (..., top_k) uint32, the row of `terms` that holds each token's k-th expert.
        scores: (..., top_k) float32.
        dtype: the dtype of the result.
        shared: the shared expert's term; None without one.
        residual: (..., out), or None.
    """

    terms: mx.array
    places: mx.array
    scores: mx.array
    dtype: mx.Dtype
    shared: SharedExpertTerm | None = None
    residual: mx.array | None = None


@cache
def _kernel(shared: bool, residual: bool) -> Kernel:
    own = ["shared_h", "shared_w", "shared_s", "shared_b", "gate"]
    inputs = ["h", "slots", "scores", "w", "s", "b", *own * shared, *["residual"] * residual]
    return Kernel("down", inputs, ["y"], ["rows.h"], SHARED=shared, RESIDUAL=residual)


@cache
def _combine(shared: bool, residual: bool) -> Kernel:
    inputs = ["terms", "places", "scores", *["shared", "gate"] * shared, *["residual"] * residual]
    return Kernel("combine", inputs, ["y"], ["rows.h"], SHARED=shared, RESIDUAL=residual)


def down(inputs: DownInputs) -> mx.array:
    """Return residual + sum of scores * down(h) + sigmoid(gate) * shared down(h), in one launch.

    The terms are added in the order of a token's experts, then the shared one, then the residual,
    in float32, and rounded once.

    Returns:
        (..., out).
    """
    h, slots, scores, matrix, dtype, shared, residual, team = inputs
    *lead, top_k = slots.shape
    rows = slots.size // top_k
    team = team or lanes(matrix.columns)
    arrays, template = [h, slots, scores, *matrix.arrays], []
    if shared is not None:
        arrays += [shared.h, *shared.down.arrays, shared.gate]
        template += [("SHARED_IN", shared.down.columns), *shared.down.template("SHARED_")]
        template += [("GATE_STRIDE", shared.gate.shape[-1]), ("GATE_AT", shared.column)]
    if residual is not None:
        arrays.append(residual)
    simds = min(top_k + (shared is not None), MAX_SIMDS)
    groups = -(-matrix.rows // (ROWS * 32 // team))
    (y,) = _kernel(shared is not None, residual is not None)(
        inputs=arrays,
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


def combine(inputs: CombineInputs) -> mx.array:
    """Return what `down` returns, from terms that were computed apart: the same bits.

    Returns:
        (..., out).
    """
    terms, places, scores, dtype, shared, residual = inputs
    *lead, top_k = places.shape
    rows = places.size // top_k
    out = terms.shape[-1]
    arrays, template = [terms, places, scores], []
    if shared is not None:
        arrays += [shared.values, shared.gate]
        template = [("GATE_STRIDE", shared.gate.shape[-1]), ("GATE_AT", shared.column)]
    if residual is not None:
        arrays.append(residual)
    (y,) = _combine(shared is not None, residual is not None)(
        inputs=arrays,
        template=[("Y", dtype), ("OUT", out), ("TOP_K", top_k), *template],
        grid=(-(-out // 256) * 256, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(*lead, out)],
        output_dtypes=[dtype],
    )
    return y
