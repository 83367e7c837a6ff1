"""Multiply many rows by the packed matrices of their experts, on the tensor cores of CUDA.

Each expert's weights are unpacked on the way, once for 128 of its rows. The text is CUDA's own:
Metal has `gather_qmm` of MLX, which is good there.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .kernel import CudaKernel
from .matrix import Matrix

#: The most pairs of a tile, and the matrix rows that a block of threads computes for them.
TILE = 128

#: Bytes of shared memory: three stages of x and two of weights, 128 rows of 64 values each.
_SHARED = 5 * TILE * 64 * 2

_FLOATS = (mx.bfloat16, mx.float16)

_weights = ("w", "s", "b")
_gate_up = CudaKernel(
    "grouped",
    ["x", "rows", "tiles", *_weights, "w2", "s2", "b2"],
    ["y"],
    ["mma.h"],
    shared_memory=_SHARED,
    GATE_UP=True,
)
_down = CudaKernel(
    "grouped", ["x", "tiles", *_weights], ["y"], ["mma.h"], shared_memory=_SHARED, GATE_UP=False
)


class Groups(NamedTuple):
    """Pairs that are sorted by their experts.

    Attributes:
        rows: (pairs,) uint32, the row of x of each pair.
        tiles: (tiles, 3) int32: slot, first pair and end of up to TILE pairs of one expert.
    """

    rows: mx.array
    tiles: mx.array


def group(slots: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> Groups:
    """Return the groups of pairs.

    Args:
        slots, counts: (experts,), the slot of each expert and how many pairs it has.
        rows: (pairs,), the row of x of each pair, in the order of the experts.
    """
    ends = np.cumsum(counts)
    tiles = -(-counts // TILE)
    expert = np.repeat(np.arange(len(slots)), tiles)
    within = np.arange(len(expert)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = (ends - counts)[expert] + within * TILE
    last = np.minimum(first + TILE, ends[expert])
    table = np.stack([np.asarray(slots)[expert], first, last], axis=1).astype(np.int32)
    return Groups(mx.array(rows.astype(np.uint32)), mx.array(table))


def supports(dtype: mx.Dtype, gate: Matrix, up: Matrix, down: Matrix) -> bool:
    """Return whether the kernels multiply rows of this dtype by these matrices."""
    return (
        dtype in _FLOATS
        and (gate.bits, gate.group_size) == (up.bits, up.group_size)
        and all(
            m.reason() is None
            and m.bits < 16
            and m.scales.dtype == dtype
            and m.columns % 64 == 0
            and m.rows % 8 == 0
            for m in (gate, up, down)
        )
    )


def grouped_gate_up(x: mx.array, groups: Groups, gate: Matrix, up: Matrix) -> mx.array:
    """Return silu(gate x) * (up x) of each pair: (pairs, intermediate), of the dtype of x.

    x: (tokens, hidden).
    """
    inputs = [x, groups.rows, groups.tiles, *gate.arrays, *up.arrays]
    return _launch(_gate_up, inputs, gate, groups, x.dtype, x.dtype, TILE // 2)


def grouped_down(h: mx.array, groups: Groups, down: Matrix) -> mx.array:
    """Return down h of each pair: (pairs, hidden) float32.

    h: (pairs, intermediate), in the order of the groups.
    """
    return _launch(_down, [h, groups.tiles, *down.arrays], down, groups, h.dtype, mx.float32, TILE)


def _launch(
    kernel: CudaKernel,
    inputs: list[mx.array],
    matrix: Matrix,
    groups: Groups,
    dtype: mx.Dtype,
    result: mx.Dtype,
    columns: int,
) -> mx.array:
    (y,) = kernel(
        inputs=inputs,
        template=[
            ("T", dtype),
            ("BITS", matrix.bits),
            ("GROUP", matrix.group_size),
            ("K", matrix.columns),
            ("N", matrix.rows),
        ],
        grid=(-(-matrix.rows // columns) * 256, groups.tiles.shape[0], 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(groups.rows.shape[0], matrix.rows)],
        output_dtypes=[result],
    )
    return y
