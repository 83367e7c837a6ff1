"""Block kernels: rows of a packed matrix times x, or unpacked to float32.

A row of an affine matrix is a stream of little-endian 32-bit words. 32 values fill exactly `bits`
words, and a group is a multiple of 32 values, so each word lies in one group. The product never
shifts a value into place: it masks the values where they lie, converts them, and multiplies by
an x that holds the missing power of two (see `arrangement`). That is 3 vector instructions for a
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
_AHEAD = 2048  # bytes; the CPU's own prefetch stops at each page: this gave 1.4 times the speed
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


def _step_words(bits: int, group_size: int) -> int:
    """The words that the product takes in one step: whole vectors and whole groups."""
    return lcm(_LANES, bits * group_size // 32)


@cache
def arrangement(bits: int, group_size: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order in which the product of rows of n groups reads x: (index, factor, sums).

    Element i is x[index[i]] * factor[i]; but element sums[b] is the sum of values 32 * b and on,
    which meets the bias. For each vector of words, the values that meet its piece 0, then 1, ...
    and the sums lie together. Groups that do not fill a step are vectors of their own.
    """
    mask, source, power = pieces(bits)
    count, group = len(mask), bits * group_size // 32
    word = np.arange(n * group)
    whole = word.size - word.size % _step_words(bits, group_size)
    lanes = np.where(word < whole, _LANES, group)
    lane = np.where(word < whole, word, word - whole) % lanes
    at = (word - lane) * (count + 1) + lane + np.arange(count + 1)[:, None] * lanes
    index, factor = np.zeros(at.size, np.int32), np.zeros(at.size, np.float32)
    index[at[:-1]] = word // bits * 32 + source[:, word % bits]
    factor[at[:-1]] = power[:, word % bits]
    return index, factor, at[-1, ::bits].astype(np.int32)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def arrange(x, index, factor, sums, out):
    """Order each row of x, (R, in) float32, by its arrangement into out (R, ...) float32."""
    for r in range(len(x)):
        for i in range(len(index)):
            out[r, i] = x[r, index[i]] * factor[i]
        for b in range(len(sums)):
            total = np.float32(0)
            for i in range(32):
                total += x[r, 32 * b + i]
            out[r, sums[b]] = total


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
    ints, floats = ir.VectorType(_I32, count), ir.VectorType(_F32, count)

    def every(value):
        return _constants([value] * count)

    raw = builder.zext(_load(builder, address, ir.IntType(16), count), ints)
    if dtype == "bfloat16":
        return builder.bitcast(builder.shl(raw, every(16)), floats)
    # By integers: without F16C, LLVM calls a library function for fpext that numba does not have.
    size = builder.and_(raw, every(0x7FFF))
    sign = builder.shl(builder.xor(raw, size), every(16))
    low, high = every(112 << 23), every(224 << 23)  # the exponent's bias; that of inf and nan
    finite = builder.icmp_unsigned("<", size, every(0x7C00))
    normal = builder.add(builder.shl(size, every(13)), builder.select(finite, low, high))
    tiny = builder.fmul(builder.sitofp(size, floats), ir.Constant(floats, [2.0**-24] * count))
    is_tiny = builder.icmp_unsigned("<", size, every(0x400))
    bits = builder.select(is_tiny, builder.bitcast(tiny, ints), normal)
    return builder.bitcast(builder.or_(bits, sign), floats)


def _add_product(builder, total, a, b):
    """total + a * b, one instruction where the CPU has it. Nothing else may be reordered."""
    product = builder.fmul(a, b, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def _spread(builder, vector, lanes):
    """Lane i of the result is lane lanes[i] of the vector."""
    return builder.shuffle_vector(vector, vector, _constants(lanes))


def _prefetch(builder, address):
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    ahead = builder.inttoptr(builder.add(address, _I64(_AHEAD)), byte)
    builder.call(function, [ahead, _I32(0), _I32(3), _I32(1)])  # to read, to all caches, data


def _total(builder, count):
    """A zeroed vector sum. LLVM keeps it in registers."""
    zero = ir.Constant(ir.VectorType(_F32, count), [0.0] * count)
    return cgutils.alloca_once_value(builder, zero)


def _store_sum(builder, totals, out):
    sums = []
    for total in map(builder.load, totals):
        kind = ir.FunctionType(_F32, [_F32, total.type])
        name = f"llvm.vector.reduce.fadd.v{total.type.count}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        sums.append(builder.call(function, [_F32(0), total], fastmath=("reassoc",)))
    builder.store(builder.fadd(*sums), builder.inttoptr(out, _F32.as_pointer()))


def _affine_dot(builder, form, w, scales, biases, x, n, out):
    bits, group_size, dtype = form
    mask, _, _ = pieces(bits)
    words = bits * group_size // 32  # of a group

    def step(group, count, lanes, total):
        """Add `count` groups, as whole vectors of `lanes` words."""
        scale = _floats(builder, _offset(builder, scales, group, SIZES[dtype]), count, dtype)
        bias = _floats(builder, _offset(builder, biases, group, SIZES[dtype]), count, dtype)
        value = builder.load(total)
        for first in range(0, count * words, lanes):
            word = range(first, first + lanes)
            offset = builder.add(builder.mul(group, _I64(4 * words)), _I64(4 * first))
            at = builder.add(w, offset)
            _prefetch(builder, at)
            q = _load(builder, at, _I32, lanes)
            dot, at = None, _offset(builder, x, offset, len(mask) + 1)
            for k, numbers in enumerate(mask):
                place = builder.lshr if k == len(mask) - 1 else builder.and_
                piece = place(q, _constants([numbers[m % bits] for m in word]))
                factor = _load(builder, at, _F32, lanes)
                dot = _add_product(builder, dot, builder.sitofp(piece, factor.type), factor)
                at = builder.add(at, _I64(4 * lanes))
            group_of = [m // words for m in word]
            value = _add_product(builder, value, _spread(builder, scale, group_of), dot)
            sums = _load(builder, at, _F32, lanes)
            value = _add_product(builder, value, _spread(builder, bias, group_of), sums)
        builder.store(value, total)

    many = _step_words(bits, group_size) // words
    body, rest = _total(builder, _LANES), _total(builder, words)
    whole = builder.mul(builder.udiv(n, _I64(many)), _I64(many))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(many)) as (group, _):
        step(group, many, _LANES, body)
    with cgutils.for_range_slice(builder, whole, n, _I64(1)) as (group, _):
        step(group, 1, words, rest)
    _store_sum(builder, (body, rest), out)


def _plain_dot(builder, form, w, scales, biases, x, n, out):
    _, _, dtype = form

    def step(i, lanes, total):
        at = _offset(builder, w, i, SIZES[dtype])
        _prefetch(builder, at)
        values = _floats(builder, at, lanes, dtype)
        factor = _load(builder, _offset(builder, x, i, 4), _F32, lanes)
        builder.store(_add_product(builder, builder.load(total), values, factor), total)

    many = 2 * _LANES
    body, rest = _total(builder, many), _total(builder, 1)
    whole = builder.mul(builder.udiv(n, _I64(many)), _I64(many))
    with cgutils.for_range_slice(builder, _I64(0), whole, _I64(many)) as (i, _):
        step(i, many, body)
    with cgutils.for_range_slice(builder, whole, n, _I64(1)) as (i, _):
        step(i, 1, rest)
    _store_sum(builder, (body, rest), out)


def _affine_unpack(builder, form, w, scales, biases, x, n, out):
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


def _plain_unpack(builder, form, w, scales, biases, x, n, out):
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
def _emit(typingctx, op, bits, group_size, dtype, w, scales, biases, x, n, out):
    form = [t.literal_value for t in (bits, group_size, dtype)]
    emit = _EMIT[op.literal_value, bool(form[1])]

    def codegen(context, builder, signature, args):
        emit(builder, form, *args[4:])
        return context.get_dummy_value()

    return types.void(op, bits, group_size, dtype, *[types.int64] * 6), codegen


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

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def block(w, scales, biases, x, height, n, out):
        out_row = n * out_bytes if unpacks else 4
        for r in range(height):
            w_at, skip = w + r * n * weight_bytes, r * n * scale_bytes
            to = out + r * out_row
            _emit(op, bits, group_size, dtype, w_at, scales + skip, biases + skip, x, n, to)

    return block
