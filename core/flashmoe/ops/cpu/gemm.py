"""Multiply many rows of x by one packed matrix, which is unpacked once for all of them.

A task takes some matrix rows. It unpacks a piece of them, `_DEPTH` inputs, into memory that stays
in the CPU's second-level cache, multiplies all rows of x by it, and goes on to the next piece. The
product keeps a tile of sums in registers, each a vector along the inputs: so nothing is transposed.

The product of a matrix row and a row of x is summed in one fixed order in every tile: the lanes of
one vector over a piece, then across its lanes, then piece after piece. So the bits of a result
depend on its two rows alone: not on how many rows a call has or in which order, on threads, or on
the slot. They differ from those of `matvec.matvec`.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
from numba import cfunc, config, njit, prange, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .llvm import F32, I64, SIZES, add_product, load, pointer, shuffle, zeros
from .matvec import Packed, address, aligned, call_kernel, check_array, launch_lock, matvec

_DEPTH = 1024  # inputs of a piece: whole groups
_ROW = _DEPTH + 16  # values from one row of a piece to the next, so that not all use one cache set
_BLOCK = 16  # matrix rows of a task
_LANES = 16  # inputs are padded to a multiple of this: the widest vector of `_lanes`
_CHUNK = 48  # rows of x whose piece stays in the second-level cache while a block's rows pass
_HIGH, _WIDE = 3, 4  # rows of x and matrix rows of a tile: its sums fill the 16 registers of AVX2


@cache
def _lanes() -> int:
    """Return how many lanes the vector of a sum has on this CPU.

    The CPU's features are part of the key of numba's cache on disk, so a kernel that was compiled
    for another CPU is not loaded.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return 16 if "+avx512f" in features.split(",") else 8


def _sums(builder, totals):
    """Sum the lanes of each of four vectors; return the four sums as one vector."""
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
    """Add the product of `high` rows of x and _WIDE matrix rows, over `depth` inputs, to out.

    w, x and out are addresses.
    """
    high_, width_ = high.literal_value, width.literal_value

    def codegen(context, builder, signature, args):
        _, _, w, x, out, depth = args
        rows, columns = range(high_), range(_WIDE)
        totals = [[zeros(builder, width_) for _ in columns] for _ in rows]
        with cgutils.for_range_slice(builder, I64(0), depth, I64(width_)) as (k, _):

            def vector(base, row):
                at = builder.add(base, builder.add(builder.mul(k, I64(4)), I64(row * 4 * _ROW)))
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
    """Return the kernel that multiplies a piece of x by a piece of a block of matrix rows.

    It adds the product to out, (rows, _BLOCK). Its arguments, all int64: w, x, out (addresses),
    height (matrix rows), rows (of x), depth (inputs), and one that it ignores. Rows of w and x are
    _ROW values apart.

    Args:
        width: lanes of a vector, see `_lanes`.
    """

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def multiply(w, x, out, height, rows, depth, _):
        for first in range(0, rows, _CHUNK):
            last = min(first + _CHUNK, rows)
            for c in range(0, height, _WIDE):
                w_at, r = w + c * (4 * _ROW), first
                while r < last:
                    x_at, to = x + r * (4 * _ROW), out + r * (4 * _BLOCK) + 4 * c
                    left = last - r
                    high = _HIGH if left == 3 or left > 4 else min(left, 2)
                    if high == 3:
                        _tile(3, width, w_at, x_at, to, depth)
                    elif high == 2:
                        _tile(2, width, w_at, x_at, to, depth)
                    else:
                        _tile(1, width, w_at, x_at, to, depth)
                    r += high

    return multiply


@njit(parallel=True, cache=True, nogil=True)
def _launch(multiply, first, second, line, x, width, rows, height, scratch, out):
    """Set out to x @ first.T or, where second has a kernel, to silu(x @ first.T) * (x @ second.T).

    Args:
        multiply: the address of the `product_kernel`.
        first, second: operands, see `_operand`.
        line: the row of the stack at which the matrix begins.
        x: the address of what `_pieces` returned.
        width: the inputs of a row.
        rows, height: the rows of x, and of the matrix.
        scratch: (threads, values) float32.
        out: (rows, height) float32.
    """
    blocks = (height + _BLOCK - 1) // _BLOCK
    size = rows * _BLOCK
    glu = second[0] != 0
    for task in prange(blocks):
        mine = scratch[numba.get_thread_id()]
        mine[: 2 * size] = 0
        base = mine.ctypes.data
        piece = base + 8 * size
        start = task * _BLOCK
        count = min(_BLOCK, height - start)
        for which in range(2 if glu else 1):
            operand = second if which else first
            kernel, w, scales, biases, w_row, s_row, n, w_step, s_step, step = operand
            for part in range((n + step - 1) // step):
                todo = min(step, n - part * step)
                for i in range(count):
                    at = line + start + i
                    to, skip = piece + i * (4 * _ROW), at * s_row + part * s_step
                    from_ = w + at * w_row + part * w_step
                    call_kernel(kernel, from_, scales + skip, biases + skip, 0, 1, todo, to)
                inputs = min(_DEPTH, width - part * _DEPTH)
                depth = (inputs + _LANES - 1) // _LANES * _LANES
                for i in range(count if inputs < depth else 0):
                    end = 2 * size + i * _ROW
                    mine[end + inputs : end + depth] = 0  # an old nan here would meet a zero of x
                xs, to = x + part * rows * (4 * _ROW), base + 4 * which * size
                call_kernel(multiply, piece, xs, to, count, rows, depth, 0)
        for r in range(rows):
            for i in range(count):
                value = mine[r * _BLOCK + i]
                if glu:
                    up = mine[size + r * _BLOCK + i]
                    value = value / (np.float32(1) + np.exp(-value)) * up
                out[r, start + i] = value


_NONE: tuple[int, ...] = (0,) * 10  # no second operand


def _pieces(x: np.ndarray) -> np.ndarray:
    """Return x (R, in) as (pieces, R, _ROW), padded with zeros to a whole vector of inputs."""
    count, width = x.shape
    out = aligned(-(-width // _DEPTH), count, _ROW)
    for i, piece in enumerate(out):
        part = x[:, i * _DEPTH : (i + 1) * _DEPTH]
        inputs = part.shape[1]
        piece[:, :inputs] = part
        piece[:, inputs : inputs + _LANES] = 0
    return out


def _operand(w: Packed) -> tuple[int, ...]:
    """Return a matrix as `_launch` takes it.

    Returns:
        The kernel that unpacks, `Packed.location`, and the weight bytes, scale bytes and groups (or
        inputs, when unquantised) of a piece.
    """
    step, scales = _DEPTH, 0
    if w.group_size:
        step //= w.group_size
        scales = step * SIZES[w.dtype]
    return w.kernel("unpack"), *w.location, _DEPTH * w.bits // 8, scales, step


def product(w: Packed, slot: int, x: np.ndarray, out: np.ndarray, up: Packed | None = None) -> None:
    """Set out to x @ W[slot].T, or with `up` to silu(x @ W[slot].T) * (x @ up[slot].T).

    silu(g) = g * sigmoid(g). The formats of w and up may differ. Errors are those of
    `matvec.matvec`.

    Args:
        x: (R, in) float32.
        out: (R, out) float32.
    """
    for matrix in (w,) if up is None else (w, up):
        check_array("x", x, np.float32, (len(x), matrix.shape[2]))
        check_array("out", out, np.float32, (len(x), matrix.shape[1]))
        if not 0 <= slot < matrix.shape[0]:
            raise IndexError(f"slot {slot} of {matrix.shape[0]}")
    rows, height = out.shape
    multiply, first = product_kernel(_lanes()).address, _operand(w)
    second = _NONE if up is None else _operand(up)
    line, pieces = slot * height, _pieces(x)
    # For each thread: sums of both products, and a piece of the matrix rows.
    threads: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    scratch = aligned(threads, 2 * rows * _BLOCK + _BLOCK * _ROW)
    at, shape = (line, address(pieces)), (x.shape[1], rows, height)
    with launch_lock:
        _launch(multiply, first, second, *at, *shape, scratch, out)


def matmul(w: Packed, slot: int, x: np.ndarray, out: np.ndarray, tokens: int | None = None) -> None:
    """Set out to x @ W[slot].T, by `matvec` for few rows and by `product` for more.

    Args:
        x, out: see `product`.
        tokens: the rows of one sequence, by default all rows. Each sequence is computed as if it
            were alone: by `matvec` if it has at most `w.matvec_rows` rows.
    """
    count = len(x)
    if (count if tokens is None else tokens) <= w.matvec_rows:
        matvec(w, np.full(count, slot), x, np.arange(count), out)
    else:
        product(w, slot, x, out)
