"""Multiply rows of a packed matrix by x, or unpack them to float32: the block kernels.

A row of an affine matrix is a stream of little-endian 32-bit words. 32 values fill exactly `bits`
words, and a group is a multiple of 32 values, so each word belongs to one group. The product never
shifts a value into place: it masks the values where they are, converts them, and multiplies by
an x that holds the missing power of two (see `arrangement`). That is 3 vector instructions for a
register of values, at any bit width.

The vectors are written as LLVM vectors: LLVM's loop vectoriser reached half of this speed on the
same loops, and took 20 times as long to compile. LLVM splits them where registers are narrower.

In the functions that emit code, `form` is the format (bits, group_size, dtype, how); `how` is for
small floats (see `small_floats`). w, scales, biases, x and out are addresses as LLVM values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import lcm

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from . import small_floats
from .llvm import (
    F32,
    I32,
    I64,
    SIZES,
    add_product,
    constants,
    floats,
    in_steps,
    load,
    offset,
    pointer,
    prefetch,
    spread,
    store_sum,
    zeros,
)

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_LANES = 16  # of a vector of the products


@cache
def pieces(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how `bits` words hold 32 values: (mask, source, factor), each (pieces, bits).

    Piece k of word c is `word & mask[k, c]`: it is value source[k, c], or a part of it, divided by
    factor[k, c]. A value that crosses into the next word is two pieces. The last piece of a word
    is its top bits; its entry in mask is a right shift instead, so no piece has the sign bit.
    """
    words: list[list[tuple[int, int, int, int]]] = [[] for _ in range(bits)]
    for value in range(32):
        at = start = value * bits
        while at < start + bits:
            c, low = divmod(at, 32)
            width = min(start + bits - at, 32 - low)
            words[c].append((low, width, value, at - start))
            at += width
    shape = max(map(len, words)), bits
    mask, source = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    factor = np.zeros(shape, np.float32)
    for c, word in enumerate(words):
        for k, (low, width, value, done) in enumerate(word[:-1]):
            mask[k, c] = ((1 << width) - 1) << low
            source[k, c], factor[k, c] = value, 2.0 ** (done - low)
        low, _, value, done = word[-1]
        mask[-1, c], source[-1, c], factor[-1, c] = low, value, 2.0**done
    return mask, source, factor


def step_words(bits: int, group_size: int) -> int:
    """Return the words that the product takes in one step: whole vectors and whole groups."""
    return lcm(_LANES, bits * group_size // 32)


@cache
def arrangement(
    bits: int, group_size: int, n: int, how: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the order in which the product of rows of n groups reads x: (index, factor, sums).

    Element i is x[index[i]] * factor[i]; but element sums[b] is the sum of the 32 values from
    32 * b on (of 16 where a group has no more), which is multiplied by the bias. For each vector of
    words, the values for its piece 0, then those for piece 1, ..., and the sums are stored
    together. Groups that do not fill a step are vectors of their own.

    Args:
        how: for small floats of 4 bits, how they are decoded, see `small_floats.fastest`.
    """
    if how:
        source, power, has_sums = small_floats.order(how)
    else:
        (_, source, power), has_sums = pieces(bits), True
    count, group = len(source), bits * group_size // 32
    word = np.arange(n * group)
    whole = word.size - word.size % step_words(bits, group_size)
    lanes = np.where(word < whole, _LANES, group)
    lane = np.where(word < whole, word, word - whole) % lanes
    rows = count + has_sums
    at = (word - lane) * rows + lane + np.arange(rows)[:, None] * lanes
    index, factor = np.zeros(at.size, np.int32), np.zeros(at.size, np.float32)
    index[at[:count]] = word // bits * 32 + source[:, word % bits]
    factor[at[:count]] = power[:, word % bits]
    sums = at[-1, :: min(group, bits)] if has_sums else np.zeros(0)
    return index, factor, sums.astype(np.int32)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def arrange(x, index, factor, sums, out):
    """Write the rows of x, (R, in), in the order of `arrangement` to out, (R, ...), all float32."""
    halves = 16 * len(sums) == x.shape[1]
    for r in range(len(x)):
        for i in range(len(index)):
            out[r, i] = x[r, index[i]] * factor[i]
        for b in range(len(sums)):
            total = np.float32(0)
            if halves:
                for i in range(16):
                    total += x[r, 16 * b + i]
            else:
                for i in range(32):
                    total += x[r, 32 * b + i]
            out[r, sums[b]] = total


def affine_dot(builder, form, w, scales, biases, xs, part, sums):
    """Emit the product of a part of a quantised matrix row with rows of x.

    Args:
        xs: the addresses of the rows of x, arranged.
        part: (start, stop, n): the groups start..stop of n.
        sums: for each row of x the two vector sums to which the product is added: one of _LANES
            lanes over whole steps, and one of a group's words over groups that do not fill a step.
    """
    bits, group_size, dtype, _ = form
    mask, _, _ = pieces(bits)
    words = bits * group_size // 32  # of a group

    def step(group, count, lanes, totals):
        """Add `count` groups, as whole vectors of `lanes` words, to the sum of each row of x."""
        scale = floats(builder, offset(builder, scales, group, SIZES[dtype]), count, dtype)
        bias = floats(builder, offset(builder, biases, group, SIZES[dtype]), count, dtype)
        values = [builder.load(total) for total in totals]
        for first in range(0, count * words, lanes):
            word = range(first, first + lanes)
            skip = builder.add(builder.mul(group, I64(4 * words)), I64(4 * first))
            at = builder.add(w, skip)
            prefetch(builder, at)
            q = load(builder, at, I32, lanes)
            dots = [None] * len(xs)
            factors = [offset(builder, x, skip, len(mask) + 1) for x in xs]

            def factor(r, k, factors=factors):
                return load(builder, builder.add(factors[r], I64(4 * lanes * k)), F32, lanes)

            for k, numbers in enumerate(mask):
                place = builder.lshr if k == len(mask) - 1 else builder.and_
                piece = place(q, constants([numbers[m % bits] for m in word]))
                piece = builder.sitofp(piece, ir.VectorType(F32, lanes))
                for r, dot in enumerate(dots):
                    dots[r] = add_product(builder, dot, piece, factor(r, k))
            group_of = [m // words for m in word]
            for weights, others in (
                (scale, dots),
                (bias, [factor(r, len(mask)) for r in range(len(xs))]),
            ):
                weights = spread(builder, weights, group_of)
                values = [
                    add_product(builder, value, weights, other)
                    for value, other in zip(values, others, strict=True)
                ]
        for value, total in zip(values, totals, strict=True):
            builder.store(value, total)

    many = step_words(bits, group_size) // words
    in_steps(
        builder,
        part,
        many,
        sums,
        lambda at, totals: step(at, many, _LANES, totals),
        lambda at, totals: step(at, 1, words, totals),
    )


def plain_dot(builder, form, w, scales, biases, xs, part, sums):
    """Emit the product of a part of an unquantised matrix row with rows of x.

    Args:
        xs: the addresses of the rows of x.
        part: (start, stop, n): the inputs start..stop of n.
        sums: for each row of x the two vector sums to which the product is added: one over whole
            steps, and one over the rest.
    """
    dtype = form[2]

    def step(i, lanes, totals):
        at = offset(builder, w, i, SIZES[dtype])
        prefetch(builder, at)
        values = floats(builder, at, lanes, dtype)
        for x, total in zip(xs, totals, strict=True):
            factor = load(builder, offset(builder, x, i, 4), F32, lanes)
            builder.store(add_product(builder, builder.load(total), values, factor), total)

    many = 2 * _LANES
    in_steps(
        builder,
        part,
        many,
        sums,
        lambda at, totals: step(at, many, totals),
        lambda at, totals: step(at, 1, totals),
    )


def _affine_unpack(builder, form, w, scales, biases, x, n, out):
    """Emit the unpacking of a quantised matrix row of n groups."""
    bits, group_size, dtype, _ = form
    bit = [value * bits for value in range(32)]
    words = [b // 32 for b in bit]
    # The word with the upper bits of a value that crosses into it. Those of a value that does not
    # cross are moved above the mask.
    after = [min(word + 1, bits - 1) for word in words]
    missing = [32 - b % 32 if b % 32 + bits > 32 else 31 for b in bit]
    with cgutils.for_range(builder, n) as loop:
        scale = floats(builder, offset(builder, scales, loop.index, SIZES[dtype]), 1, dtype)
        bias = floats(builder, offset(builder, biases, loop.index, SIZES[dtype]), 1, dtype)
        for part in range(group_size // 32):
            block = builder.add(builder.mul(loop.index, I64(group_size // 32)), I64(part))
            at = offset(builder, w, block, 4 * bits)
            prefetch(builder, at)
            raw = load(builder, at, I32, bits)
            q = builder.lshr(spread(builder, raw, words), constants([b % 32 for b in bit]))
            if 32 % bits:
                high = builder.shl(spread(builder, raw, after), constants(missing))
                q = builder.or_(q, high)
            q = builder.and_(q, constants([(1 << bits) - 1] * 32))
            q = builder.sitofp(q, ir.VectorType(F32, 32))
            every = [0] * 32
            value = add_product(
                builder, spread(builder, bias, every), spread(builder, scale, every), q
            )
            target = pointer(builder, offset(builder, out, block, 128), F32, 32)
            builder.store(value, target, align=1)


def _plain_unpack(builder, form, w, scales, biases, x, n, out):
    """Emit the widening of an unquantised matrix row of n values."""
    dtype = form[2]

    def step(at, lanes):
        source = offset(builder, w, at, SIZES[dtype])
        prefetch(builder, source)
        value = floats(builder, source, lanes, dtype)
        target = pointer(builder, offset(builder, out, at, 4), F32, lanes)
        builder.store(value, target, align=1)

    whole = builder.and_(n, I64(-_LANES))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(_LANES)) as (at, _):
        step(at, _LANES)
    with cgutils.for_range_slice(builder, whole, n, I64(1)) as (at, _):
        step(at, 1)


def sum_lanes(bits: int, group_size: int) -> tuple[int, int]:
    """Return the lanes of a row's two sums: that over whole steps, and that over the rest."""
    return (_LANES, bits * group_size // 32) if group_size else (2 * _LANES, 1)


@intrinsic(prefer_literal=True)
def _emit(typingctx, op, bits, group_size, dtype, how, w, scales, biases, x, n, out):
    form = [t.literal_value for t in (bits, group_size, dtype, how)]
    unpack, dot = emitters(form)
    op_ = op.literal_value

    def codegen(context, builder, signature, args):
        *weights, x, n, out = args[5:]
        if op_ == "unpack":
            unpack(builder, form, *weights, x, n, out)
        else:
            sums = [[zeros(builder, size) for size in sum_lanes(*form[:2])]]
            dot(builder, form, *weights, [x], (I64(0), n, n), sums)
            store_sum(builder, sums[0], out)
        return context.get_dummy_value()

    return types.void(op, bits, group_size, dtype, how, *[types.int64] * 6), codegen


def emitters(form: Sequence) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the functions that emit the code of a format: to unpack a row, and to multiply it."""
    bits, group_size, dtype, _ = form
    if (bits, group_size, dtype) in small_floats.FORMATS:
        return small_floats.unpack, small_floats.dot
    return (_affine_unpack, affine_dot) if group_size else (_plain_unpack, plain_dot)


@cache
def block_kernel(op: str, bits: int, group_size: int, dtype: str, how: str | None = None) -> CFunc:
    """Return the compiled kernel of one format, whose code lives as long as this object does.

    The kernel's arguments, all int64:
        w, scales, biases, x, out: addresses: of the first matrix row, of x as `arrange` writes it
            (plain x when unquantised), and of the first result.
        height: how many matrix rows are computed.
        n: the groups of a row, or its values when unquantised.

    They are passed in the order w, scales, biases, x, height, n, out.

    Args:
        op: "dot" to write one float32 for each matrix row, "unpack" to write the rows themselves.
        how: how small floats are decoded, see `small_floats.fastest`; by default as this CPU does.
    """
    weight_bytes, scale_bytes = row_bytes(bits, group_size, dtype)
    out_bytes = 4 * (group_size or 1)
    unpacks = op == "unpack"
    how_ = how or small_floats.decoder()

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def block(w, scales, biases, x, height, n, out):
        out_row = n * out_bytes if unpacks else 4
        for r in range(height):
            w_at, skip = w + r * n * weight_bytes, r * n * scale_bytes
            to = out + r * out_row
            _emit(op, bits, group_size, dtype, how_, w_at, scales + skip, biases + skip, x, n, to)

    return block


def row_bytes(bits: int, group_size: int, dtype: str) -> tuple[int, int]:
    """Return the bytes of weights and of scales that each group (or value) of a row takes."""
    return (bits * group_size // 8, SIZES[dtype]) if group_size else (SIZES[dtype], 0)
