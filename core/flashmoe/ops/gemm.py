"""Products of many rows with matrices as they lie in an MLX checkpoint: unpacked once for all rows.

A task takes some matrix rows. It unpacks a piece of them into memory that stays in the CPU's
first caches, multiplies all rows of x by it, and goes on to the next piece.

(matrix row, row of x) is summed in one fixed order: by pieces of `_DEPTH` inputs, in each piece by
lanes of one vector. The bits of a result do not depend on the number of rows, on where a row lies
in the call, on threads, or on the slot. They differ from those of `kernels.matvec`.
"""

from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from . import kernels
from .kernels import Packed, address, call, check
from .unpack import block_kernel
from .vectors import F32, I64, SIZES, add_product, load, offset, pointer, shuffle, zeros

_DEPTH = 1024  # inputs of a piece: whole groups
_BLOCK = 16  # matrix rows of a task
_HIGH, _WIDE = 3, 4  # rows of x and matrix rows of a tile: its sums fill the 16 registers of AVX2


@cache
def lanes() -> int:
    """Of a sum. Features are part of the key of numba's cache on disk."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return 16 if "+avx512f" in features.split(",") else 8


def _sums(builder, totals):
    """Of four vectors: the sum of the lanes of each, as one vector."""
    while totals[0].type.count > 8:
        half = totals[0].type.count // 2
        low, high = range(half), range(half, 2 * half)
        totals = [
            builder.fadd(shuffle(builder, t, t, low), shuffle(builder, t, t, high)) for t in totals
        ]
    a, b, c, d = totals

    def folded(one, two, first, second):
        return builder.fadd(shuffle(builder, one, two, first), shuffle(builder, one, two, second))

    left, right = (
        folded(*pair, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
        for pair in ((a, b), (c, d))
    )
    both = folded(left, right, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])
    return folded(both, both, [0, 4, 2, 6], [1, 5, 3, 7])


@intrinsic(prefer_literal=True)
def _tile(typingctx, high, width, w, x, out, depth):
    """Add to a tile of out: `high` rows of x times _WIDE matrix rows, over `depth` inputs."""
    high_, width_ = high.literal_value, width.literal_value

    def codegen(context, builder, signature, args):
        _, _, w, x, out, depth = args
        rows, columns = range(high_), range(_WIDE)
        totals = [[zeros(builder, width_) for _ in columns] for _ in rows]
        with cgutils.for_range_slice(builder, I64(0), depth, I64(width_)) as (k, _):

            def vector(base, row):
                at = builder.add(base, builder.add(builder.mul(k, I64(4)), I64(row * 4 * _DEPTH)))
                return load(builder, at, F32, width_)

            xs = [vector(x, r) for r in rows]
            for c in columns:
                values = vector(w, c)
                for r in rows:
                    total = add_product(builder, builder.load(totals[r][c]), xs[r], values)
                    builder.store(total, totals[r][c])
        for r in rows:
            target = pointer(builder, builder.add(out, I64(4 * _BLOCK * r)), F32, _WIDE)
            sums = _sums(builder, [builder.load(t) for t in totals[r]])
            builder.store(builder.fadd(builder.load(target, align=1), sums), target, align=1)
        return context.get_dummy_value()

    return types.void(high, width, *[types.int64] * 4), codegen


@cache
def product_kernel(width: int) -> CFunc:
    """Add to out (rows, _BLOCK) the product of a piece of x and a piece of a block of matrix rows.

    Arguments, all int64: w, x, out (addresses), height (matrix rows), rows (of x), depth (inputs).
    Rows of w and x are _DEPTH values apart. width: see `lanes`.
    """

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def multiply(w, x, out, height, rows, depth, _):
        r = 0
        while r < rows:
            left = rows - r
            x_at, to = x + r * (4 * _DEPTH), out + r * (4 * _BLOCK)
            high = _HIGH if left == 3 or left > 4 else min(left, 2)
            for c in range(0, height, _WIDE):
                w_at, into = w + c * (4 * _DEPTH), to + 4 * c
                if high == 3:
                    _tile(3, width, w_at, x_at, into, depth)
                elif high == 2:
                    _tile(2, width, w_at, x_at, into, depth)
                else:
                    _tile(1, width, w_at, x_at, into, depth)
            r += high

    return multiply


@njit(parallel=True, cache=True, nogil=True)
def _launch(multiply, first, second, line, x, width, rows, height, scratch, out):
    """out (rows, height) = x @ first.T, or silu(x @ first.T) * (x @ second.T); by matrix rows.

    first, second: (kernel, *place, weight and scale bytes of a piece, groups or inputs of a piece);
    see Packed. line: the first matrix row in the stack. x: the address of `_pieces`.
    scratch: for each thread.
    """
    blocks = (height + _BLOCK - 1) // _BLOCK
    for task in prange(blocks):
        mine = scratch[numba.get_thread_id()]
        start = task * _BLOCK
        count = min(_BLOCK, height - start)
        size = rows * _BLOCK
        base = mine.ctypes.data
        piece = base + 8 * size
        mine[: 2 * size] = 0
        for which in range(2 if second[0] != 0 else 1):
            kernel, w, scales, biases, w_row, s_row, n, w_step, s_step, step = (
                second if which else first
            )
            for part in range((n + step - 1) // step):
                skip = part * s_step
                for i in range(count):
                    at = line + start + i
                    scale = at * s_row + skip
                    call(
                        kernel,
                        w + at * w_row + part * w_step,
                        scales + scale,
                        biases + scale,
                        0,
                        1,
                        min(step, n - part * step),
                        piece + i * (4 * _DEPTH),
                    )
                depth = min(_DEPTH, width - part * _DEPTH)
                xs = x + part * rows * (4 * _DEPTH)
                call(multiply, piece, xs, base + 4 * which * size, count, rows, depth, 0)
        for r in range(rows):
            for i in range(count):
                value = mine[r * _BLOCK + i]
                if second[0] != 0:
                    up = mine[size + r * _BLOCK + i]
                    value = value / (np.float32(1) + np.exp(-value)) * up
                out[r, start + i] = value


_NONE = (0,) * 10


def aligned(*shape: int) -> np.ndarray:
    """Zeros in float32 that start at a cache line: a vector load across two lines costs two."""
    size = int(np.prod(shape))
    raw = np.zeros(size + 16, np.float32)
    start = -address(raw) % 64 // 4
    return raw[start : start + size].reshape(shape)


def _pieces(x: np.ndarray) -> np.ndarray:
    """x (R, in) as (pieces, R, _DEPTH), the last filled up with zeros."""
    count, width = x.shape
    out = aligned(-(-width // _DEPTH), count, _DEPTH)
    for i, piece in enumerate(out):
        part = x[:, i * _DEPTH : (i + 1) * _DEPTH]
        piece[:, : part.shape[1]] = part
    return out


def _operand(w: Packed) -> tuple[int, ...]:
    unit = w.group_size or 1
    kernel = block_kernel("unpack", w.bits, w.group_size, w.dtype).address
    scale_step = _DEPTH // unit * SIZES[w.dtype] if w.group_size else 0
    return kernel, *w.place, _DEPTH * w.bits // 8, scale_step, _DEPTH // unit


def _product(gate: Packed, up: Packed | None, slot: int, x: np.ndarray, out: np.ndarray) -> None:
    for w in (gate,) if up is None else (gate, up):
        check("x", x, np.float32, (len(x), w.shape[2]))
        check("out", out, np.float32, (len(x), w.shape[1]))
        if not 0 <= slot < w.shape[0]:
            raise IndexError(f"slot {slot} of {w.shape[0]}")
    rows, height = out.shape
    xs = _pieces(x)
    width = -(-x.shape[1] // lanes()) * lanes()  # the rest is zeros
    scratch = aligned(numba.config.NUMBA_NUM_THREADS, 2 * rows * _BLOCK + _BLOCK * _DEPTH)
    second = _NONE if up is None else _operand(up)
    multiply = product_kernel(lanes()).address
    line = slot * height
    with kernels.launching:
        _launch(
            multiply, _operand(gate), second, line, address(xs), width, rows, height, scratch, out
        )


def matmul(w: Packed, slot: int, x: np.ndarray, out: np.ndarray) -> None:
    """out = x @ W[slot].T. x: (R, in) float32, out: (R, out) float32. Errors as in `matvec`.

    Up to MATVEC_ROWS rows are bit for bit `kernels.matvec`.
    """
    count = len(x)
    if count <= kernels.MATVEC_ROWS:
        kernels.matvec(w, np.full(count, slot), x, np.arange(count), out)
    else:
        _product(w, None, slot, x, out)


def gate_up(gate: Packed, up: Packed, slot: int, x: np.ndarray, out: np.ndarray) -> None:
    """out = silu(x @ gate[slot].T) * (x @ up[slot].T), for any number of rows."""
    _product(gate, up, slot, x, out)
