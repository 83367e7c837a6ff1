"""CPU kernels (numba) for matrices as they lie in an MLX checkpoint.

A row of an affine matrix is a stream of little-endian 32-bit words. 32 values fill exactly `bits`
words and a group is a multiple of 32 values, so a word belongs to one group. The matvec never
shifts values into place: it masks them where they lie, converts, and multiplies by an `x` that
holds the missing power of two. `x` is arranged for that once per call, which costs one row of work.

Only one thread may launch at a time: numba's portable threading layer does not allow two.
"""

from functools import lru_cache
from math import lcm
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

_LANES = 16  # one AVX-512 register; LLVM splits it where registers are narrower
_BLOCK = 16  # matrix rows of one task
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_STORED = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}


class Packed(NamedTuple):
    """A stack of S matrices (out, in) as they lie in an MLX checkpoint, seen by numpy."""

    weight: np.ndarray
    scales: np.ndarray | None
    biases: np.ndarray | None
    bits: int
    group_size: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int]:
        slots, out, row_bytes = self.weight.shape
        return slots, out, row_bytes * 8 // self.bits


@lru_cache(maxsize=None)
def _pieces(bits: int):
    """How 32 values lie in `bits` words: (mask, source, factor), each (pieces, bits).

    Piece k of word c is `word & mask[k, c]`; it stands for value source[k, c] times 1 / factor.
    The last piece of each word is its top bits, and its mask entry is a right shift instead: so
    no piece has the sign bit. A value that crosses into the next word is two pieces.
    """
    words = [[] for _ in range(bits)]
    for value in range(32):
        at, end = value * bits, value * bits + bits
        while at < end:
            word, low = divmod(at, 32)
            width = min(end - at, 32 - low)
            done = at - value * bits
            words[word].append((low, width, value, done))
            at += width
    count = max(map(len, words))
    mask = np.zeros((count, bits), np.int64)
    source = np.zeros((count, bits), np.int64)
    factor = np.zeros((count, bits), np.float32)
    for c, pieces in enumerate(words):
        for k, (low, width, value, done) in enumerate(pieces[:-1]):
            mask[k, c] = ((1 << width) - 1) << low
            source[k, c], factor[k, c] = value, 2.0 ** (done - low)
        low, _, value, done = pieces[-1]
        mask[-1, c], source[-1, c], factor[-1, c] = low, value, 2.0**done
    return mask, source, factor


def _vector(builder, address, element, count):
    pointer = builder.inttoptr(address, ir.VectorType(element, count).as_pointer())
    return builder.load(pointer, align=1)


def _constant(values):
    return ir.Constant(ir.VectorType(_I32, len(values)), [int(v) for v in values])


def _floats(builder, address, count, dtype):
    """`count` stored values at an address, as float32 lanes."""
    if dtype == "float32":
        return _vector(builder, address, _F32, count)
    raw = _vector(builder, address, ir.IntType(16), count)
    wide = ir.VectorType(_F32, count)
    if dtype == "float16":
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), count)), wide)
    raw = builder.shl(builder.zext(raw, ir.VectorType(_I32, count)), _constant([16] * count))
    return builder.bitcast(raw, wide)


def _add_product(builder, total, a, b):
    """total + a * b; contracted to one instruction where the CPU has it."""
    product = builder.fmul(a, b, flags=("contract",))
    return product if total is None else builder.fadd(total, product, flags=("contract",))


def _sum(builder, vector):
    kind = ir.FunctionType(_F32, [_F32, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [_F32(0), vector], fastmath=("reassoc",))


def _at(builder, address, index, size):
    return builder.add(address, builder.mul(index, _I64(size)))


def _zeroed(builder, count):
    kind = ir.VectorType(_F32, count)
    return cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * count))


@intrinsic(prefer_literal=True)
def _affine_dot(typingctx, w, scales, biases, x, groups, bits, group_size, dtype):
    """float32 dot of one packed row with one arranged row of x; the first four are addresses."""
    bits_, group_, dtype_ = bits.literal_value, group_size.literal_value, dtype.literal_value
    mask, _, _ = _pieces(bits_)
    per_group = bits_ * group_ // 32
    size = _STORED[dtype_].itemsize

    def codegen(context, builder, signature, args):
        w, scales, biases, x, groups = args[:5]
        plane = builder.mul(groups, _I64(4 * per_group))

        def step(group, count, lanes, accumulator):
            """Adds `count` groups from `group` on, as whole vectors of `lanes` words."""
            scale = _floats(builder, _at(builder, scales, group, size), count, dtype_)
            bias = _floats(builder, _at(builder, biases, group, size), count, dtype_)
            total = builder.load(accumulator)
            for first in range(0, count * per_group, lanes):
                word = range(first, first + lanes)
                offset = builder.add(builder.mul(group, _I64(4 * per_group)), _I64(4 * first))
                q = _vector(builder, builder.add(w, offset), _I32, lanes)
                at = builder.add(x, offset)
                dot = None
                for k, row in enumerate(mask):
                    last = k == len(mask) - 1
                    place = (builder.lshr if last else builder.and_)(
                        q, _constant([row[m % bits_] for m in word])
                    )
                    value = builder.sitofp(place, ir.VectorType(_F32, lanes))
                    dot = _add_product(builder, dot, value, _vector(builder, at, _F32, lanes))
                    at = builder.add(at, plane)
                spread = _constant([m // per_group for m in word])
                total = _add_product(
                    builder, total, builder.shuffle_vector(scale, scale, spread), dot
                )
                total = _add_product(
                    builder,
                    total,
                    builder.shuffle_vector(bias, bias, spread),
                    _vector(builder, at, _F32, lanes),
                )
            builder.store(total, accumulator)

        stride = lcm(_LANES, per_group) // per_group
        body, rest = _zeroed(builder, _LANES), _zeroed(builder, per_group)
        steps = builder.udiv(groups, _I64(stride))
        with cgutils.for_range(builder, steps) as loop:
            step(builder.mul(loop.index, _I64(stride)), stride, _LANES, body)
        if stride > 1:
            with cgutils.for_range(builder, groups, start=builder.mul(steps, _I64(stride))) as loop:
                step(loop.index, 1, per_group, rest)
        return builder.fadd(
            _sum(builder, builder.load(body)), _sum(builder, builder.load(rest))
        )

    return types.float32(types.int64, types.int64, types.int64, types.int64, types.int64, bits, group_size, dtype), codegen


_KERNEL = types.void(*[types.int64] * 6, types.CPointer(types.float32))


@intrinsic
def _call(typingctx, kernel, w, scales, biases, x, rows, n, out):
    """Calls a compiled block kernel by its address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 6 + [_F32.as_pointer()])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [*args[1:7], builder.inttoptr(args[7], _F32.as_pointer())])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@lru_cache(maxsize=None)
def _matvec_kernel(bits, group_size, dtype):
    row_bytes = bits * group_size // 8
    size = _STORED[dtype].itemsize

    @cfunc(_KERNEL, cache=True)
    def matvec_block(w, scales, biases, x, rows, groups, out):
        for r in range(rows):
            g = r * groups
            out[r] = _affine_dot(
                w + g * row_bytes,
                scales + g * size,
                biases + g * size,
                x,
                groups,
                bits,
                group_size,
                dtype,
            )

    return matvec_block.address


@njit(cache=True, nogil=True)
def _arrange(x, source, factor, out):
    """x (R, in) -> out (R, pieces + 1, words): the planes that `_affine_dot` reads."""
    pieces, bits = source.shape
    for r in range(x.shape[0]):
        for block in range(x.shape[1] // 32):
            for k in range(pieces):
                for c in range(bits):
                    out[r, k, block * bits + c] = x[r, block * 32 + source[k, c]] * factor[k, c]
            total = np.float32(0)
            for i in range(32):
                total += x[r, block * 32 + i]
            out[r, pieces, block * bits] = total
            for c in range(1, bits):
                out[r, pieces, block * bits + c] = 0


@njit(parallel=True, cache=True, nogil=True)
def _launch(first, second, slots, rows, height, out, width):
    kernel, w, s, b, wn, sn, x, xn, n = first
    kernel2, w2, s2, b2, wn2, sn2, x2, xn2, n2 = second
    blocks = (height + _BLOCK - 1) // _BLOCK
    base = out.ctypes.data
    for task in prange(len(slots) * blocks):
        p = task // blocks
        row = task % blocks * _BLOCK
        count = min(_BLOCK, height - row)
        line = slots[p] * height + row
        target = p * height + row
        _call(kernel, w + line * wn, s + line * sn, b + line * sn, x + rows[p] * xn, count, n,
              base + target * width * 4)
        if kernel2 != 0:
            up = np.empty(_BLOCK, np.float32)
            _call(kernel2, w2 + line * wn2, s2 + line * sn2, b2 + line * sn2, x2 + rows[p] * xn2, count, n2, up.ctypes.data)
            for i in range(count):
                gate = out[target + i]
                out[target + i] = gate / (np.float32(1) + np.exp(-gate)) * up[i]


def _address(a):
    return a.__array_interface__["data"][0]

def _prepared(w, x):
    mask, source, factor = _pieces(w.bits)
    n = w.shape[2]
    a = np.empty((len(x), len(source) + 1, n * w.bits // 32), np.float32)
    _arrange(x, source, factor, a)
    g = w.scales.shape[2]
    return a, (_matvec_kernel(w.bits, w.group_size, w.dtype), _address(w.weight), _address(w.scales), _address(w.biases),
            w.weight.shape[2], g * w.scales.itemsize, _address(a), a[0].nbytes, g)

def matvec(w, slots, x, rows, out):
    keep, first = _prepared(w, x)
    _launch(first, (0,) * 9, slots, rows, w.weight.shape[1], out.reshape(-1), 1)

def gate_up(gate, up, slots, x, rows, out):
    k1, first = _prepared(gate, x)
    k2, second = _prepared(up, x)
    _launch(first, second, slots, rows, gate.weight.shape[1], out.reshape(-1), 1)
