"""Multiply by matrices of small floats, or unpack them: mxfp4, mxfp8 and nvfp4 on the CPU.

A weight is e2m1 (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) or e4m3 (8 bits, up to
448); a group has one scale of 8 bits and no bias. e2m1 is looked up in a table that fits a vector
register; e4m3 is moved into the bits of a half float, which CPUs widen. Where they cannot, integer
arithmetic gives the same values.

With AVX2, where a register has no room for a table of 16 floats, the products of e2m1 look up bytes
instead: 12 more than twice the value. Those are masked and converted where they are, as in
`unpack`, and 6 times the sum of x is subtracted.

The kernels take the place of those of affine matrices in `unpack`, and their arguments are the
same; see there what `form` and the other arguments are. x is arranged for e2m1, and plain for e4m3.
"""

from __future__ import annotations

import platform
from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from .llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    add_product,
    constants,
    e4m3,
    floats,
    in_steps,
    load,
    offset,
    pointer,
    prefetch,
    shuffle,
    spread,
)

#: (bits, group size, kind of scale) of mxfp4, mxfp8 and nvfp4.
FORMATS = ((4, 32, "e8m0"), (8, 32, "e8m0"), (4, 16, "e4m3"))

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LANES = 16
_CODES = 8  # e2m1 in a word
_HALF_TO_E4M3 = 256.0  # the bits of e4m3, moved into a half float, are a value 1 / 256 as large


def fastest(features: str, machine: str) -> str:
    """Return how a CPU decodes: "avx512", "avx2", "half" where it widens half floats, or "plain".

    Args:
        features: the CPU's features as LLVM lists them, such as "+avx2,-avx512f".
        machine: as `platform.machine` has it.
    """
    has = set(features.split(","))
    if {"+avx2", "+f16c"} <= has:
        return "avx512" if "+avx512f" in has else "avx2"
    return "half" if machine in ("arm64", "aarch64") else "plain"


@cache
def decoder() -> str:
    """Return the `fastest` way for the features that numba compiles for.

    The features are part of the key of numba's cache on disk, and so is the name that this returns.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return fastest(features, platform.machine())


@cache
def order(how: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return what is multiplied by the 8 values of e2m1 in a word, as `unpack.pieces` does.

    Returns:
        The number of the value that each piece is, and the factor that x needs, (8, 4) each; and
        whether sums of x are needed.
    """
    word = np.arange(4)
    if how != "avx2":
        source = np.arange(_CODES)[:, None] + _CODES * word
        return source, np.ones(source.shape, np.float32), False
    byte, high = np.tile(np.arange(4), 2), np.repeat((0, 1), 4)
    source = (2 * byte + high)[:, None] + _CODES * word
    power = np.where(byte < 3, 0.5 ** (8 * byte + 1), 0.5).astype(np.float32)
    return source, np.broadcast_to(power[:, None], source.shape), True


def _every(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _in_chunks(builder, values, lanes, function):
    """Apply a function to neighbouring lanes of a vector; return one vector."""
    count = values.type.count
    if count == lanes:
        return function(values)
    low, high = range(count // 2), range(count // 2, count)
    halves = [
        _in_chunks(builder, spread(builder, values, part), lanes, function) for part in (low, high)
    ]
    return shuffle(builder, *halves, range(count))


def _e2m1(builder, codes, how):
    """Return the values of a vector of int32, whose lowest 4 bits are e2m1; float32."""
    ints = codes.type
    reals = ir.VectorType(F32, ints.count)
    if how == "avx512" and ints.count % 16 == 0:
        table = ir.Constant(ir.VectorType(F32, 16), [*_E2M1, *(-v for v in _E2M1)])
        return _in_chunks(
            builder,
            codes,
            16,
            lambda c: _call(builder, "llvm.x86.avx512.permvar.sf.512", table, c),
        )
    sign = builder.and_(builder.shl(codes, _every(ints, 28)), _every(ints, -(2**31)))
    if how in ("avx2", "avx512") and ints.count % 8 == 0:
        table = ir.Constant(ir.VectorType(F32, 8), _E2M1)
        size = _in_chunks(
            builder, codes, 8, lambda c: _call(builder, "llvm.x86.avx2.permps", table, c)
        )
    else:
        code = builder.and_(codes, _every(ints, 7))
        # 0.5 is the only one without an exponent of its own.
        half = builder.mul(code, _every(ints, 0x3F000000))
        normal = builder.add(builder.shl(code, _every(ints, 22)), _every(ints, 126 << 23))
        size = builder.select(builder.icmp_unsigned("<", code, _every(ints, 2)), half, normal)
        size = builder.bitcast(size, reals)
    return builder.bitcast(builder.or_(builder.bitcast(size, ints), sign), reals)


def _call(builder, name, table, codes, result=None):
    kind = ir.FunctionType(result or table.type, [table.type, codes.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [table, codes])


def _e2m1_pieces(builder, q, how):
    """Yield the 8 values of each word, float32 vectors."""
    for k in range(_CODES):
        yield _e2m1(builder, builder.lshr(q, constants([4 * k] * q.type.count)), how)


def _e2m1_bytes(builder, q):
    """Return what is masked and converted in words of e2m1: the pieces of `order`, int32 vectors.

    Piece k is 2 * value + 12, times a power of two.
    """
    count = q.type.count
    table = [int(2 * v) + 12 for v in _E2M1] + [12 - int(2 * v) for v in _E2M1]
    nibbles = ir.VectorType(I8, 32)
    table = ir.Constant(nibbles, table * 2)

    def look_up(words):
        codes = builder.and_(builder.bitcast(words, nibbles), _every(nibbles, 15))
        return builder.bitcast(
            _call(builder, "llvm.x86.avx2.pshuf.b", table, codes, nibbles), words.type
        )

    wide = q if count >= 8 else spread(builder, q, [i % count for i in range(8)])
    for high in (0, 4):
        moved = builder.lshr(wide, _every(wide.type, high))
        values = _in_chunks(builder, moved, 8, look_up)
        values = values if count >= 8 else spread(builder, values, range(count))
        for byte in range(3):
            yield builder.and_(values, _every(q.type, 0xFF << 8 * byte))
        yield builder.lshr(values, _every(q.type, 24))


def _e4m3(builder, at, how):
    """Load 16 values of e4m3; return (float32 vector, the number that it has to be multiplied by).

    The number is None where it is 1.
    """
    raw = load(builder, at, I8, _LANES)
    if how == "plain":
        return e4m3(builder, builder.zext(raw, ir.VectorType(I32, _LANES))), None
    shorts = ir.VectorType(I16, _LANES)
    moved = builder.shl(builder.sext(raw, shorts), _every(shorts, 7))
    is_nan = builder.icmp_unsigned(
        "==", builder.and_(moved, _every(shorts, 0x3F80)), _every(shorts, 0x3F80)
    )
    moved = builder.and_(moved, _every(shorts, 0xBFFF - 2**16))
    moved = builder.or_(moved, builder.sext(is_nan, shorts))
    halves = builder.bitcast(moved, ir.VectorType(ir.HalfType(), _LANES))
    return builder.fpext(halves, ir.VectorType(F32, _LANES)), _HALF_TO_E4M3


def dot(builder, form, w, scales, biases, xs, part, sums):
    """Emit the product of a part of a matrix row with rows of x, as `unpack.affine_dot` does."""
    bits, group_size, dtype, how = form
    words = bits * group_size // 32

    def e2m1_step(group, count, lanes, totals):
        scale = floats(builder, builder.add(scales, group), count, dtype)
        skip = builder.mul(group, I64(4 * words))
        at = builder.add(w, skip)
        prefetch(builder, at)
        q = load(builder, at, I32, lanes)
        dots = [None] * len(xs)
        by_bytes = how == "avx2"
        pieces = _e2m1_bytes(builder, q) if by_bytes else _e2m1_pieces(builder, q, how)
        starts = [offset(builder, x, skip, _CODES + by_bytes) for x in xs]

        def factor(r, k):
            return load(builder, builder.add(starts[r], I64(4 * lanes * k)), F32, lanes)

        reals = ir.VectorType(F32, lanes)
        for k, piece in enumerate(pieces):
            values = builder.sitofp(piece, reals) if by_bytes else piece
            dots = [add_product(builder, d, values, factor(r, k)) for r, d in enumerate(dots)]
        if by_bytes:
            six = _every(reals, -6.0)
            dots = [add_product(builder, d, six, factor(r, _CODES)) for r, d in enumerate(dots)]
        scale = spread(builder, scale, [m // words for m in range(lanes)])
        for total, value in zip(totals, dots, strict=True):
            builder.store(add_product(builder, builder.load(total), scale, value), total)

    def e4m3_step(group, totals):
        scale = floats(builder, builder.add(scales, group), 1, dtype)
        at = offset(builder, w, group, group_size)
        prefetch(builder, at)
        dots, factor = [None] * len(xs), None
        for first in range(0, group_size, _LANES):
            values, factor = _e4m3(builder, builder.add(at, I64(first)), how)
            for r, x in enumerate(xs):
                x_at = builder.add(offset(builder, x, group, 4 * group_size), I64(4 * first))
                dots[r] = add_product(builder, dots[r], values, load(builder, x_at, F32, _LANES))
        scale = spread(builder, scale, [0] * _LANES)
        for total, value in zip(totals, dots, strict=True):
            if factor is not None:
                value = builder.fmul(value, _every(value.type, factor))
            builder.store(add_product(builder, builder.load(total), scale, value), total)

    if bits == 8:
        in_steps(builder, part, 1, sums, e4m3_step, lambda at, totals: None)  # nothing is left
        return
    many = _LANES // words
    in_steps(
        builder,
        part,
        many,
        sums,
        lambda at, totals: e2m1_step(at, many, _LANES, totals),
        lambda at, totals: e2m1_step(at, 1, words, totals),
    )


def unpack(builder, form, w, scales, biases, x, n, out):
    """Emit the unpacking of a matrix row of n groups, as that of affine rows in `unpack`."""
    bits, group_size, dtype, how = form
    nbytes = _LANES * bits // 8
    with cgutils.for_range(builder, n) as loop:
        scale = floats(builder, builder.add(scales, loop.index), 1, dtype)
        scale = spread(builder, scale, [0] * _LANES)
        for first in range(0, group_size, _LANES):
            block = builder.add(
                builder.mul(loop.index, I64(group_size // _LANES)), I64(first // _LANES)
            )
            at = offset(builder, w, block, nbytes)
            prefetch(builder, at)
            if bits == 8:
                value, factor = _e4m3(builder, at, how)
                if factor is not None:
                    value = builder.fmul(value, _every(value.type, factor))
            else:
                raw = load(builder, at, I32, nbytes // 4)
                lanes = range(_LANES)
                codes = spread(builder, raw, [i // _CODES for i in lanes])
                codes = builder.lshr(codes, constants([4 * (i % _CODES) for i in lanes]))
                value = _e2m1(builder, codes, how)
            target = pointer(builder, offset(builder, out, block, 4 * _LANES), F32, _LANES)
            builder.store(builder.fmul(value, scale), target, align=1)
