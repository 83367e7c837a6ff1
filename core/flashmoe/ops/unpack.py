"""Block kernels: rows of a packed matrix times x, or unpacked to float32.

A row of an affine matrix is a stream of little-endian 32-bit words. 32 values fill exactly `bits`
words, and a group is a multiple of 32 values, so each word lies in one group. The product never
shifts a value into place: it masks the values where they lie, converts them, and multiplies by
an x that holds the missing power of two (see `arrange`). That is 3 vector instructions for a
register of values, at any bit width.

The vectors are written as LLVM vectors: LLVM's loop vectoriser reached half of this speed on the
same loops, and took 20 times as long to compile. LLVM splits them where registers are narrower.
"""

from functools import cache
from math import lcm

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

_LANES = 16
_ROWS = 2  # matrix rows that share the loads of x
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


@cache
def pieces(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How 32 values lie in `bits` words: (mask, source, factor), each (pieces, bits).

    Piece k of word c is `word & mask[k, c]`: it is value source[k, c], or a part of it, divided by
    factor[k, c]. A value that crosses into the next word is two pieces. The last piece of a word
    is its top bits; its entry in mask is a right shift instead, so no piece has the sign bit.
    """
    words = [[] for _ in range(bits)]
    for value in range(32):
        at = start = value * bits
        while at < start + bits:
            word, low = divmod(at, 32)
            width = min(start + bits - at, 32 - low)
            words[word].append((low, width, value, at - start))
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


@njit(cache=True, nogil=True)
def arrange(x, source, factor, out):
    """Order x as the product reads it. x: (R, in) float32, out: (R, pieces + 1, words) float32.

    Plane k holds the values that meet piece k of each word. The last plane holds the sums of 32
    values, which meet the biases, at the first of their words.
    """
    count, bits = source.shape
    for r in range(x.shape[0]):
        for block in range(x.shape[1] // 32):
            for k in range(count):
                for c in range(bits):
                    out[r, k, block * bits + c] = x[r, block * 32 + source[k, c]] * factor[k, c]
            total = np.float32(0)
            for i in range(32):
                total += x[r, block * 32 + i]
            out[r, count, block * bits] = total
            for c in range(1, bits):
                out[r, count, block * bits + c] = 0


def _constants(values):
    return ir.Constant(ir.VectorType(_I32, len(values)), [int(v) for v in values])


def _pointer(builder, address, element, count):
    return builder.inttoptr(address, ir.VectorType(element, count).as_pointer())


def _load(builder, address, element, count):
    return builder.load(_pointer(builder, address, element, count), align=1)


def _offset(builder, address, index, size):
    return builder.add(address, builder.mul(index, _I64(size)))


def _floats(builder, address, count, dtype):
    """`count` stored values from an address on, widened exactly to float32."""
    if dtype == "float32":
        return _load(builder, address, _F32, count)
    wide = ir.VectorType(_F32, count)
    if dtype == "float16":
        return builder.fpext(_load(builder, address, ir.HalfType(), count), wide)
    raw = _load(builder, address, ir.IntType(16), count)
    raw = builder.shl(builder.zext(raw, ir.VectorType(_I32, count)), _constants([16] * count))
    return builder.bitcast(raw, wide)


def _add_product(builder, total, a, b):
    """total + a * b, one instruction where the CPU has it. Nothing else may be reordered."""
    product = builder.fmul(a, b, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def _spread(builder, vector, lanes):
    """Lane i of the result is lane lanes[i] of the vector."""
    return builder.shuffle_vector(vector, vector, _constants(lanes))


def _rows(builder, address, left, row_bytes):
    """Where _ROWS matrix rows start. Past the last row (`left` further) the last one repeats."""
    for r in range(_ROWS):
        past = builder.icmp_signed(">", _I64(r), left)
        row = builder.select(past, left, _I64(r))
        yield builder.add(address, builder.mul(row, row_bytes))


def _totals(builder, count):
    """Zeroed vector sums, one a matrix row. LLVM keeps them in registers."""
    zero = ir.Constant(ir.VectorType(_F32, count), [0.0] * count)
    return [cgutils.alloca_once_value(builder, zero) for _ in range(_ROWS)]


def _store_sums(builder, body, rest, out, left):
    for *totals, address in zip(body, rest, _rows(builder, out, left, _I64(4)), strict=True):
        sums = []
        for total in map(builder.load, totals):
            kind = ir.FunctionType(_F32, [_F32, total.type])
            name = f"llvm.vector.reduce.fadd.v{total.type.count}f32"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            sums.append(builder.call(function, [_F32(0), total], fastmath=("reassoc",)))
        builder.store(builder.fadd(*sums), builder.inttoptr(address, _F32.as_pointer()))


def _affine_dot(builder, form, w, scales, biases, x, n, out, left):
    bits, group_size, dtype = form
    mask, _, _ = pieces(bits)
    words = bits * group_size // 32  # of a group
    plane = builder.mul(n, _I64(4 * words))  # bytes of a matrix row, and of a plane of x
    scale_row = builder.mul(n, _I64(SIZES[dtype]))
    starts = [
        list(_rows(builder, address, left, row_bytes))
        for address, row_bytes in ((w, plane), (scales, scale_row), (biases, scale_row))
    ]

    def step(group, count, lanes, totals):
        """Add `count` groups, as whole vectors of `lanes` words."""
        scale, bias = (
            [_floats(builder, _offset(builder, s, group, SIZES[dtype]), count, dtype) for s in rows]
            for rows in starts[1:]
        )
        start = builder.mul(group, _I64(4 * words))
        for first in range(0, count * words, lanes):
            word = range(first, first + lanes)
            offset = builder.add(start, _I64(4 * first))
            q = [_load(builder, builder.add(row, offset), _I32, lanes) for row in starts[0]]
            dots = [None] * _ROWS
            at = builder.add(x, offset)
            for k, numbers in enumerate(mask):
                place = builder.lshr if k == len(mask) - 1 else builder.and_
                constants = _constants([numbers[m % bits] for m in word])
                factor = _load(builder, at, _F32, lanes)
                for r in range(_ROWS):
                    piece = builder.sitofp(place(q[r], constants), factor.type)
                    dots[r] = _add_product(builder, dots[r], piece, factor)
                at = builder.add(at, plane)
            sums = _load(builder, at, _F32, lanes)
            group_of = [m // words for m in word]
            for r, total in enumerate(totals):
                value = builder.load(total)
                spread = _spread(builder, scale[r], group_of)
                value = _add_product(builder, value, spread, dots[r])
                value = _add_product(builder, value, _spread(builder, bias[r], group_of), sums)
                builder.store(value, total)

    many = lcm(_LANES, words) // words
    body, rest = _totals(builder, _LANES), _totals(builder, words)
    whole = builder.mul(builder.udiv(n, _I64(many)), _I64(many))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(many)) as (group, _):
        step(group, many, _LANES, body)
    with cgutils.for_range_slice(builder, whole, n, _I64(1)) as (group, _):
        step(group, 1, words, rest)
    _store_sums(builder, body, rest, out, left)


def _plain_dot(builder, form, w, scales, biases, x, n, out, left):
    size = SIZES[form[2]]
    starts = list(_rows(builder, w, left, builder.mul(n, _I64(size))))

    def step(at, lanes, totals):
        factor = _load(builder, _offset(builder, x, at, 4), _F32, lanes)
        for start, total in zip(starts, totals, strict=True):
            values = _floats(builder, _offset(builder, start, at, size), lanes, form[2])
            builder.store(_add_product(builder, builder.load(total), values, factor), total)

    many = 2 * _LANES
    body, rest = _totals(builder, many), _totals(builder, 1)
    whole = builder.mul(builder.udiv(n, _I64(many)), _I64(many))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(many)) as (at, _):
        step(at, many, body)
    with cgutils.for_range_slice(builder, whole, n, _I64(1)) as (at, _):
        step(at, 1, rest)
    _store_sums(builder, body, rest, out, left)


def _affine_unpack(builder, form, w, scales, biases, x, n, out, left):
    bits, group_size, dtype = form
    bit = [value * bits for value in range(32)]
    words = [b // 32 for b in bit]
    # The part in the next word. Where a value does not cross, it is moved above the mask.
    after = [min(word + 1, bits - 1) for word in words]
    missing = [32 - b % 32 if b % 32 + bits > 32 else 31 for b in bit]
    with cgutils.for_range(builder, n) as loop:
        scale = _floats(builder, _offset(builder, scales, loop.index, SIZES[dtype]), 1, dtype)
        bias = _floats(builder, _offset(builder, biases, loop.index, SIZES[dtype]), 1, dtype)
        for part in range(group_size // 32):
            block = builder.add(builder.mul(loop.index, _I64(group_size // 32)), _I64(part))
            raw = _load(builder, _offset(builder, w, block, 4 * bits), _I32, bits)
            q = builder.lshr(_spread(builder, raw, words), _constants([b % 32 for b in bit]))
            if 32 % bits:
                high = builder.shl(_spread(builder, raw, after), _constants(missing))
                q = builder.or_(q, high)
            q = builder.and_(q, _constants([(1 << bits) - 1] * 32))
            q = builder.sitofp(q, ir.VectorType(_F32, 32))
            zeros = [0] * 32
            value = _add_product(
                builder, _spread(builder, bias, zeros), _spread(builder, scale, zeros), q
            )
            target = _pointer(builder, _offset(builder, out, block, 128), _F32, 32)
            builder.store(value, target, align=1)


def _plain_unpack(builder, form, w, scales, biases, x, n, out, left):
    dtype = form[2]

    def step(at, lanes):
        value = _floats(builder, _offset(builder, w, at, SIZES[dtype]), lanes, dtype)
        target = _pointer(builder, _offset(builder, out, at, 4), _F32, lanes)
        builder.store(value, target, align=1)

    whole = builder.and_(n, _I64(-_LANES))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(_LANES)) as (at, _):
        step(at, _LANES)
    with cgutils.for_range_slice(builder, whole, n, _I64(1)) as (at, _):
        step(at, 1)


_EMIT = {
    ("dot", True): _affine_dot,
    ("dot", False): _plain_dot,
    ("unpack", True): _affine_unpack,
    ("unpack", False): _plain_unpack,
}


@intrinsic(prefer_literal=True)
def _emit(typingctx, op, bits, group_size, dtype, w, scales, biases, x, n, out, left):
    form = [t.literal_value for t in (bits, group_size, dtype)]
    emit = _EMIT[op.literal_value, bool(form[1])]

    def codegen(context, builder, signature, args):
        emit(builder, form, *args[4:])
        return context.get_dummy_value()

    return types.void(op, bits, group_size, dtype, *[types.int64] * 7), codegen


@cache
def block_kernel(op: str, bits: int, group_size: int, dtype: str) -> CFunc:
    """The compiled kernel of one format. Its code lives as long as it does. Arguments, all int64:

    w, scales, biases, x, out: addresses; of the first matrix row, of arranged x (plain x when
    unquantised), and of the first result.
    height: matrix rows to do. n: groups of a row, or values when unquantised.

    op "dot" writes a float32 for each matrix row, "unpack" the matrix rows themselves.
    """
    weight_bytes = bits * group_size // 8 if group_size else SIZES[dtype]
    scale_bytes = SIZES[dtype] if group_size else 0
    out_bytes = 4 * (group_size or 1)
    unpacks = op == "unpack"
    rows = 1 if unpacks else _ROWS

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def block(w, scales, biases, x, height, n, out):
        out_row = n * out_bytes if unpacks else 4
        for r in range(0, height, rows):
            at = r * n
            skip = at * scale_bytes
            to, left = out + r * out_row, height - 1 - r
            w_at = w + at * weight_bytes
            _emit(op, bits, group_size, dtype, w_at, scales + skip, biases + skip, x, n, to, left)

    return block
