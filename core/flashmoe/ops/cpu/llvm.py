"""LLVM vectors: what the kernels that are written in them share.

LLVM splits a vector where the CPU's registers are narrower. An address is an int64.
"""

from functools import reduce

from llvmlite import ir
from numba.core import cgutils

#: Bytes of a stored value.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F32 = ir.FloatType()

_AHEAD = 2048  # bytes; the CPU's own prefetch stops at each page: this gave 1.4 times the speed


def constants(values):
    return ir.Constant(ir.VectorType(I32, len(values)), [int(v) for v in values])


def pointer(builder, address, element, count):
    return builder.inttoptr(address, ir.VectorType(element, count).as_pointer())


def load(builder, address, element, count):
    return builder.load(pointer(builder, address, element, count), align=1)


def offset(builder, address, index, size):
    return builder.add(address, builder.mul(index, I64(size)))


def floats(builder, address, count, dtype):
    """`count` stored values from an address on, widened exactly to float32."""
    if dtype == "float32":
        return load(builder, address, F32, count)
    ints, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)

    def every(value):
        return constants([value] * count)

    raw = builder.zext(load(builder, address, ir.IntType(16), count), ints)
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


def add_product(builder, total, a, b):
    """total + a * b, one instruction where the CPU has it. Nothing else may be reordered."""
    product = builder.fmul(a, b, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def shuffle(builder, a, b, lanes):
    """Lane i of the result is lane lanes[i] of a, followed by those of b."""
    return builder.shuffle_vector(a, b, constants(lanes))


def spread(builder, vector, lanes):
    """Lane i of the result is lane lanes[i] of the vector."""
    return shuffle(builder, vector, vector, lanes)


def prefetch(builder, address):
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    ahead = builder.inttoptr(builder.add(address, I64(_AHEAD)), byte)
    builder.call(function, [ahead, I32(0), I32(3), I32(1)])  # to read, to all caches, data


def zeros(builder, count):
    """A zeroed vector sum. LLVM keeps it in registers."""
    zero = ir.Constant(ir.VectorType(F32, count), [0.0] * count)
    return cgutils.alloca_once_value(builder, zero)


def store_sum(builder, totals, out):
    """Store one float32: the sum of all lanes of vector sums made by `zeros`."""
    sums = []
    for total in map(builder.load, totals):
        kind = ir.FunctionType(F32, [F32, total.type])
        name = f"llvm.vector.reduce.fadd.v{total.type.count}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        sums.append(builder.call(function, [F32(0), total], fastmath=("reassoc",)))
    builder.store(reduce(builder.fadd, sums), builder.inttoptr(out, F32.as_pointer()))
