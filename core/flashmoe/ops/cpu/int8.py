"""Multiply packed matrices by x rounded to int8, with integer arithmetic inside each group.

A group of x becomes int8 times one float32 scale, by the group size of the matrix. With
w = scale * q + bias, a group then adds

    scale * x_scale * sum(q * x_q)  +  bias * x_scale * sum(x_q)

and the first sum is one of integers: CPUs multiply and add 32 bytes or more at once, while float32
has to widen each value first. The second sum is of the rounded x too: so the error of a value is
multiplied by w, which is near zero on average, and not by q, which is not.

The sum of a group is exact, whichever instruction computes it: all give the same bits.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    SIZES,
    add_product,
    constants,
    floats,
    load,
    offset,
    pointer,
    prefetch,
    spread,
    store_sum,
    zeros,
)

_CHUNK = 32  # bytes of weights in a vector; a group may have fewer
_STEP = 4  # groups whose scales are widened together
_TINY = 1e-36  # a group without a larger value counts as zero, since 127 / value must be finite

# Bytes of a vector -> the instructions that make sums of two products, and sums of four of those.
_AVX2 = {
    16: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    32: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
}


def supports(bits: int, group_size: int) -> bool:
    """Return whether no value of a format crosses bytes, and groups fill a vector of 16 bytes."""
    return bits in (2, 4, 8) and bits * group_size >= 128


def fastest(features: str) -> str:
    """Return how a CPU multiplies int8: "vnni", "avx2", "dotprod", or "plain" for none of them.

    features: the CPU's features as LLVM lists them, such as "+avx2,-avx512vnni".
    """
    has = set(features.split(","))
    if "+avxvnni" in has or {"+avx512vnni", "+avx512vl"} <= has:
        return "vnni"
    return next((name for name in ("avx2", "dotprod") if f"+{name}" in has), "plain")


@cache
def instruction() -> str:
    """Return the `fastest` way for the features that numba compiles for.

    The features are part of the key of numba's cache on disk, and so is the name that this returns:
    a kernel for one CPU is never run on another.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return fastest(features)


def _layout(bits: int, group_size: int) -> tuple[int, int]:
    """Return the bytes of weights in a vector, and the vectors in a group."""
    nbytes = bits * group_size // 8
    return min(nbytes, _CHUNK), max(1, nbytes // _CHUNK)


def _call(builder, name, result, *args):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _fill(element, count, value):
    return ir.Constant(ir.VectorType(element, count), [value] * count)


def _quantise(builder, form, x, out, scale_at, sum_at):
    """Emit the rounding of the group of float32 at x, see `quantised`.

    Args:
        form: (bits, group_size).
        out, scale_at, sum_at: addresses of the values, of the scale and of scale * sum.
    """
    bits, count = form
    chunk, chunks = _layout(bits, count)
    ints, reals = ir.VectorType(I32, count), ir.VectorType(F32, count)
    values = load(builder, x, F32, count)
    # Compared as integers, among which nan is the largest.
    size = builder.and_(builder.bitcast(values, ints), _fill(I32, count, 0x7FFFFFFF))
    largest = _call(builder, f"llvm.vector.reduce.umax.v{count}i32", I32, size)
    largest = builder.bitcast(largest, F32)
    usable = builder.and_(
        builder.fcmp_ordered(">", largest, F32(_TINY)),
        builder.fcmp_ordered("<", largest, F32(float("inf"))),
    )
    inverse = builder.fdiv(F32(127), largest)
    inverse = builder.insert_element(ir.Constant(reals, ir.Undefined), inverse, I32(0))
    values = builder.fmul(values, spread(builder, inverse, [0] * count))
    values = builder.select(usable, values, _fill(F32, count, 0.0))
    q = builder.fptosi(_call(builder, f"llvm.rint.v{count}f32", reals, values), ints)
    total = _call(builder, f"llvm.vector.reduce.add.v{count}i32", I32, q)
    order = [
        (first + i) * (8 // bits) + k
        for first in range(0, chunk * chunks, chunk)
        for k in range(8 // bits)
        for i in range(chunk)
    ]
    q = spread(builder, builder.trunc(q, ir.VectorType(I8, count)), order)
    builder.store(q, pointer(builder, out, I8, count), align=1)
    scale = builder.fdiv(largest, F32(127))
    total = builder.fmul(scale, builder.sitofp(total, F32))
    builder.store(scale, builder.inttoptr(scale_at, F32.as_pointer()))
    builder.store(total, builder.inttoptr(sum_at, F32.as_pointer()))


def _sum_of_four(builder, how, pairs):
    """Emit the sums of four neighbours of q * x over all pairs of vectors; return int32 lanes.

    Args:
        how: see `fastest`.
        pairs: at most 8 (q, x), vectors of 16 or 32 bytes: q of 0..15, x of -127..127.
    """
    count = pairs[0][0].type.count
    if how == "dotprod" and count == 32:  # its registers have 16 bytes
        halves = [
            _sum_of_four(builder, how, [[spread(builder, v, half) for v in pair] for pair in pairs])
            for half in (range(16), range(16, 32))
        ]
        return builder.shuffle_vector(*halves, constants(range(8)))
    total = _fill(I32, count // 4, 0)
    if how == "avx2":
        # The sum of 8 pairs of 2 * 15 * 127 fits 16 bits.
        words, ones = ir.VectorType(I16, count // 2), _fill(I16, count // 2, 1)
        to_two, to_four = _AVX2[count]
        twos = [_call(builder, to_two, words, q, x) for q, x in pairs]
        return _call(builder, to_four, total.type, reduce(builder.add, twos), ones)
    for q, x in pairs:
        if how == "vnni":
            q, x = (builder.bitcast(v, total.type) for v in (q, x))
            name = f"llvm.x86.avx512.vpdpbusd.{8 * count}"
            total = _call(builder, name, total.type, total, q, x)
        elif how == "dotprod":
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            total = _call(builder, name, total.type, total, q, x)
        else:
            words = ir.VectorType(I16, count)
            product = builder.mul(builder.zext(q, words), builder.sext(x, words))
            product = builder.sext(product, ir.VectorType(I32, count))
            for i in range(4):
                total = builder.add(total, spread(builder, product, range(i, count, 4)))
    return total


def emit_dot(builder, form, w, scales, biases, x, n, out):
    """Emit the product of a matrix row of n groups and a row of `quantised`.

    Args:
        form: (bits, group_size, dtype, how), see `fastest`.
        w, scales, biases, x, n, out: int64 values; all but n are addresses.
    """
    bits, group_size, dtype, how = form
    chunk, chunks = _layout(bits, group_size)
    lanes = chunk // 4
    x_scales = builder.add(x, builder.mul(n, I64(group_size)))
    x_sums = builder.add(x_scales, builder.mul(n, I64(4)))

    def group_sum(group):
        """Return sum(q * x_q) of a group, in `lanes` parts, as float32."""
        at = offset(builder, w, group, chunk * chunks)
        x_at = offset(builder, x, group, group_size)
        low, high = [], []
        for _ in range(chunks):
            q = load(builder, at, I8, chunk)
            for k in range(8 // bits):
                value = load(builder, x_at, I8, chunk)
                moved = builder.lshr(q, _fill(I8, chunk, k * bits))
                mask = _fill(I8, chunk, (1 << min(bits, 4)) - 1)
                low.append((builder.and_(moved, mask), value))
                x_at = builder.add(x_at, I64(chunk))
            if bits == 8:  # in halves of 4 bits, because sums of two whole products overflow
                high.append((builder.lshr(q, _fill(I8, chunk, 4)), value))
            at = builder.add(at, I64(chunk))
        total = _sum_of_four(builder, how, low)
        if high:
            sixteens = builder.shl(_sum_of_four(builder, how, high), _fill(I32, lanes, 4))
            total = builder.add(total, sixteens)
        return builder.sitofp(total, ir.VectorType(F32, lanes))

    def step(group, count, bias_total):
        """Add `count` groups to the totals."""
        at = offset(builder, w, group, chunk * chunks)
        for ahead in range(0, count * chunk * chunks, 64):
            prefetch(builder, builder.add(at, I64(ahead)))
        scale = floats(builder, offset(builder, scales, group, SIZES[dtype]), count, dtype)
        scale = builder.fmul(scale, load(builder, offset(builder, x_scales, group, 4), F32, count))
        bias = floats(builder, offset(builder, biases, group, SIZES[dtype]), count, dtype)
        sums = load(builder, offset(builder, x_sums, group, 4), F32, count)
        value = add_product(builder, builder.load(bias_total), bias, sums)
        builder.store(value, bias_total)
        for i in range(count):
            total = totals[i % 2]  # two, so that one sum need not wait for the other
            part = group_sum(builder.add(group, I64(i)))
            value = builder.load(total)
            value = add_product(builder, value, spread(builder, scale, [i] * lanes), part)
            builder.store(value, total)

    totals = zeros(builder, lanes), zeros(builder, lanes)
    biases_of_steps, biases_of_rest = zeros(builder, _STEP), zeros(builder, 1)
    whole = builder.and_(n, I64(-_STEP))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(_STEP)) as (group, _):
        step(group, _STEP, biases_of_steps)
    with cgutils.for_range_slice(builder, whole, n, I64(1)) as (group, _):
        step(group, 1, biases_of_rest)
    store_sum(builder, [*totals, biases_of_steps, biases_of_rest], out)


@intrinsic(prefer_literal=True)
def _call_quantise(typingctx, bits, group_size, x, out, scale_at, sum_at):
    form = bits.literal_value, group_size.literal_value

    def codegen(context, builder, signature, args):
        _quantise(builder, form, *args[2:])
        return context.get_dummy_value()

    return types.void(bits, group_size, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def _call_dot(typingctx, bits, group_size, dtype, how, w, scales, biases, x, n, out):
    form = [t.literal_value for t in (bits, group_size, dtype, how)]

    def codegen(context, builder, signature, args):
        emit_dot(builder, form, *args[4:])
        return context.get_dummy_value()

    return types.void(bits, group_size, dtype, how, *[types.int64] * 6), codegen


@cache
def _quantiser(bits: int, group_size: int) -> CFunc:
    @cfunc(types.void(*[types.int64] * 5), cache=True)
    def rows(x, out, count, n, row):
        for r in range(count):
            to = out + r * row
            scales = to + n * group_size
            for g in range(n):
                at = x + 4 * group_size * (r * n + g)
                into = to + g * group_size
                _call_quantise(bits, group_size, at, into, scales + 4 * g, scales + 4 * (n + g))

    return rows


def quantised(x: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Round rows of x to int8, as the kernels of matrices of this format read them.

    Args:
        x: (R, in) float32, C-contiguous, of whole groups.

    Returns:
        (R, ...) uint8. A row holds the values in the order in which the weights of a vector are
        multiplied by them, lowest bits first; then for each group the scale, largest / 127, in
        float32; then for each group scale * sum of the values, in float32. A group with an infinity
        or nan has a scale that makes every product of it nan.
    """
    count, width = x.shape
    n = width // group_size
    # A vector load that crosses a cache line costs two: rows start at a line of 64 bytes.
    row = -(-(width + 8 * n) // 64) * 64
    memory = np.empty(count * row + 64, np.uint8)
    start = -memory.ctypes.data % 64
    out = memory[start : start + count * row].reshape(count, row)
    _quantiser(bits, group_size).ctypes(x.ctypes.data, out.ctypes.data, count, n, row)
    return out


@cache
def dot_kernel(bits: int, group_size: int, dtype: str, how: str) -> CFunc:
    """Return the "dot" kernel of `unpack.block_kernel` for x as `quantised` returns it.

    how: see `fastest`.
    """
    weight_bytes = bits * group_size // 8
    scale_bytes = SIZES[dtype]

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def block(w, scales, biases, x, height, n, out):
        for r in range(height):
            at, skip = w + r * n * weight_bytes, r * n * scale_bytes
            to = out + 4 * r
            _call_dot(bits, group_size, dtype, how, at, scales + skip, biases + skip, x, n, to)

    return block
