"""Multiply many rows by the packed matrices of their experts, on the tensor cores of CUDA.

Each expert's weights are unpacked on the way, once for 128 of its rows. The text is CUDA's own:
Metal has `gather_qmm` of MLX, which is good there.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .kernel import CudaKernel
from .matrix import Matrix

#: The most pairs of a tile, and the matrix rows that a block of threads computes for them.
TILE = 128

_FLOATS = (mx.bfloat16, mx.float16)

_weights = ("w", "s", "b")


@cache
def _grouped(gate_up: bool, bits: int) -> CudaKernel:
    # Three stages of x and two of weights, 128 rows of 64 values each, and three of packed weights.
    shared = 5 * TILE * 64 * 2 + 3 * TILE * 64 * bits // 8
    names = ["x", *["rows"] * gate_up, "tiles", *_weights, *["w2", "s2", "b2"] * gate_up]
    return CudaKernel(
        "grouped", names, ["y"], ["mma.h"], shared_memory=shared, GATE_UP=gate_up, TWO_BLOCKS=True
    )


_group = CudaKernel("group_pairs", ["chosen", "sizes"], ["rows", "tiles", "places"])
_unpack = CudaKernel("unpack", [*_weights], ["y"], ["mma.h"], TWO_BLOCKS=False)

#: The most experts that `group_on_gpu` sorts by: its block has shared memory for them.
MAX_EXPERTS = 4096


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


def group_on_gpu(slots: mx.array, experts: int) -> tuple[Groups, mx.array]:
    """Return the groups of pairs, without a look of the host at them, and where each pair is.

    Args:
        slots: (tokens, top_k) uint32 below `experts`.

    Returns:
        The groups, and (tokens, top_k) uint32: the place of each pair among the sorted ones.
    """
    pairs = slots.size
    tiles = pairs // TILE + min(experts, pairs)
    rows, table, places = _group(
        inputs=[slots, _sizes(pairs, tiles)],
        template=[("EXPERTS", experts), ("TOP_K", slots.shape[-1])],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(pairs,), (tiles, 3), slots.shape],
        output_dtypes=[mx.uint32, mx.int32, mx.uint32],
    )
    return Groups(rows, table), places


@lru_cache(maxsize=16)
def _sizes(pairs: int, tiles: int) -> mx.array:
    # Kept, because an array of the host is on its way to the GPU for long; and not so small that
    # MLX places it on a page that the host writes.
    return mx.array([pairs, tiles, 0, 0], mx.int32)


def unpack(matrix: Matrix) -> mx.array:
    """Return the weights of a packed matrix: (rows, columns), of the dtype of its scales."""
    each = 256 * (8 if matrix.bits == 4 else 32)
    (y,) = _unpack(
        inputs=matrix.arrays,
        template=[
            ("T", matrix.scales.dtype),
            ("BITS", matrix.bits),
            ("GROUP", matrix.group_size),
            ("K", matrix.columns),
            ("N", matrix.rows),
        ],
        grid=(-(-matrix.rows * matrix.columns // each) * 256, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(matrix.rows, matrix.columns)],
        output_dtypes=[matrix.scales.dtype],
    )
    return y


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
    return _launch(_grouped(True, gate.bits), inputs, gate, groups, x.dtype, x.dtype, TILE // 2)


def grouped_down(h: mx.array, groups: Groups, down: Matrix) -> mx.array:
    """Return down h of each pair: (pairs, hidden) float32.

    h: (pairs, intermediate), in the order of the groups.
    """
    return _launch(
        _grouped(False, down.bits),
        [h, groups.tiles, *down.arrays],
        down,
        groups,
        h.dtype,
        mx.float32,
        TILE,
    )


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
