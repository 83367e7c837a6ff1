"""Emit LLVM vector code: the parts that all kernels written in it share.

The functions add instructions to an LLVM `builder` and return LLVM values. LLVM splits a vector
where the CPU's registers are narrower. An address is an int64.
"""

from functools import reduce

from llvmlite import ir
from numba.core import cgutils

FLOATS = ("bfloat16", "float16", "float32")
#: Bytes of a stored value of each dtype. e8m0 and e4m3 are the scales of small floats.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "e8m0": 1, "e4m3": 1}

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32 = ir.FloatType()

# Bytes between an address and what is prefetched for it. The CPU's own prefetch stops at each page:
# this made the products 1.4 times as fast.
_AHEAD = 2048


def constants(values):
    """Return a constant vector of int32."""
    return ir.Constant(ir.VectorType(I32, len(values)), [int(v) for v in values])


def pointer(builder, address, element, count):
    """Return an address as a pointer to a vector of `count` elements of an LLVM type."""
    return builder.inttoptr(address, ir.VectorType(element, count).as_pointer())


def load(builder, address, element, count):
    """Load a vector of `count` elements of an LLVM type; the address need not be aligned."""
    return builder.load(pointer(builder, address, element, count), align=1)


def offset(builder, address, index, size):
    """Return the address of element `index` of an array whose elements have `size` bytes."""
    return builder.add(address, builder.mul(index, I64(size)))


def floats(builder, address, count, dtype):
    """Load `count` stored values of a dtype, widened exactly to float32."""
    if dtype == "float32":
        return load(builder, address, F32, count)
    ints, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)

    def every(value):
        return constants([value] * count)

    raw = builder.zext(load(builder, address, ir.IntType(8 * SIZES[dtype]), count), ints)
    if dtype == "e4m3":
        return e4m3(builder, raw)
    if dtype == "e8m0":  # the exponent; that of 0 is a denormal
        denormal = builder.icmp_unsigned("==", raw, every(0))
        power = builder.select(denormal, every(1 << 22), builder.shl(raw, every(23)))
        return builder.bitcast(power, floats)
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


def e4m3(builder, raw):
    """Return the values of a vector of int32 that hold e4m3, in float32."""
    ints, floats = raw.type, ir.VectorType(F32, raw.type.count)

    def every(value):
        return constants([value] * ints.count)

    size = builder.and_(raw, every(0x7F))
    sign = builder.shl(builder.xor(raw, size), every(24))
    normal = builder.add(builder.shl(size, every(20)), every(120 << 23))
    tiny = builder.fmul(builder.sitofp(size, floats), ir.Constant(floats, [2.0**-9] * ints.count))
    is_tiny = builder.icmp_unsigned("<", size, every(8))
    bits = builder.select(is_tiny, builder.bitcast(tiny, ints), normal)
    is_nan = builder.icmp_unsigned("==", size, every(0x7F))
    bits = builder.select(is_nan, every(0x7FC00000), bits)
    return builder.bitcast(builder.or_(bits, sign), floats)


def in_steps(builder, part, many, sums, step, rest) -> None:
    """Emit loops over the part start..stop of n, in steps of `many`.

    If it is the last part, what is left of n after whole steps follows one by one.

    Args:
        part: (start, stop, n).
        sums: two for each row of x: for `step` and for `rest`.
        step, rest: emit the body of a loop, from the index and the sums.
    """
    start, stop, n = part
    whole = builder.mul(builder.udiv(n, I64(many)), I64(many))
    is_last = builder.icmp_signed("==", stop, n)
    end, left = builder.select(is_last, whole, stop), builder.select(is_last, whole, n)
    bodies, rests = zip(*sums, strict=True)
    with cgutils.for_range_slice(builder, start, end, I64(many)) as (at, _):
        step(at, bodies)
    with cgutils.for_range_slice(builder, left, n, I64(1)) as (at, _):
        rest(at, rests)


def add_product(builder, total, a, b):
    """Return total + a * b, in one instruction where the CPU has it; a * b if total is None.

    Only this contraction is allowed: nothing else may be reordered.
    """
    product = builder.fmul(a, b, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def shuffle(builder, a, b, lanes):
    """Return a vector whose lane i is lane lanes[i] of a and b, one after the other."""
    return builder.shuffle_vector(a, b, constants(lanes))


def spread(builder, vector, lanes):
    """Return a vector whose lane i is lane lanes[i] of the given one."""
    return shuffle(builder, vector, vector, lanes)


def prefetch(builder, address):
    """Prefetch the cache line that is _AHEAD bytes after an address."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    ahead = builder.inttoptr(builder.add(address, I64(_AHEAD)), byte)
    builder.call(function, [ahead, I32(0), I32(3), I32(1)])  # to read, to all caches, data


def zeros(builder, count):
    """Return the address of a new vector sum of `count` zeros. LLVM keeps it in registers."""
    zero = ir.Constant(ir.VectorType(F32, count), [0.0] * count)
    return cgutils.alloca_once_value(builder, zero)


def store_sum(builder, totals, out):
    """Store one float32 at `out`: the sum of all lanes of the vector sums, made by `zeros`."""
    sums = []
    for total in map(builder.load, totals):
        kind = ir.FunctionType(F32, [F32, total.type])
        name = f"llvm.vector.reduce.fadd.v{total.type.count}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        sums.append(builder.call(function, [F32(0), total], fastmath=("reassoc",)))
    builder.store(reduce(builder.fadd, sums), builder.inttoptr(out, F32.as_pointer()))
