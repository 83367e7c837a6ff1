"""Matrix products on the CPU with matrices as they lie in an MLX checkpoint; numpy in and out.

Here each row of x meets the packed weights; `gemm` multiplies many rows by one matrix.

The result of a row does not depend by a single bit on the number of threads, on the other pairs of
the call, or on the slot: each (matrix row, row of x) is summed in one fixed order by one thread.

Weights are read without the GIL, so reader threads go on meanwhile.
"""

import os
import threading
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from . import int8
from .llvm import SIZES
from .multi_row import BLOCK, rows_kernel, rows_scratch
from .unpack import BITS, GROUP_SIZES, arrange, arrangement, block_kernel

# GNU OpenMP's threads spin for about 10 ms after a launch, which takes the CPU from reader threads.
# Asleep at once (OMP_WAIT_POLICY=passive), they wake so late that a call of one
# expert ran at a third of its speed on a virtual machine. So many rounds, about 0.4 ms, bridge the
# launches of a layer but not a read. OpenMP looks at this when numba first launches.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

#: Held by each parallel launch: numba's portable threading layer dies of two at one time.
launching = threading.Lock()

#: Up to so many rows of x for one matrix, `matvec` is faster than `gemm.product`, which unpacks the
#: weights once for all rows.
MATVEC_ROWS = 2

#: Up to so many rows are rounded to int8, where that is asked for: more are a prompt. Integers
#: would be faster for any number of them.
INT8_ROWS = 20

_MANY = 4  # rows of x that one unpacking of the weights serves
_SCRATCH = rows_scratch(_MANY)


@dataclass(frozen=True, eq=False)
class Packed:
    """A stack of matrices as they lie in an MLX checkpoint, seen by numpy.

    weight: (S, out, row_bytes) uint8. Affine: MLX's little-endian bit stream, `bits` for each
        value along `in`. Unquantised: the raw bytes of bf16, f16 or f32 values.
    scales, biases: (S, out, in // group_size) uint16 (raw bits of bf16 or f16) or float32; None
        when unquantised.
    bits: 2, 3, 4, 5, 6, 8 (affine), 16 or 32. group_size: 32, 64, 128, or 0 when unquantised.
    dtype: of scales and biases, or of the weights: "bfloat16", "float16" or "float32".
    activations: "float32", or "int8": products of up to INT8_ROWS rows round x, where
        `int8.supports` the format.

    value = scale * q + bias. All arrays are C-contiguous. Raises ValueError otherwise.
    Keep the object: it holds what each call needs of these arrays.
    """

    weight: np.ndarray
    scales: np.ndarray | None
    biases: np.ndarray | None
    bits: int
    group_size: int
    dtype: str
    activations: str = "float32"

    def __post_init__(self):
        affine = self.bits in BITS and self.group_size in GROUP_SIZES and self.dtype in SIZES
        if not affine and (self.group_size or self.bits != 8 * SIZES.get(self.dtype, 0)):
            raise ValueError(
                f"no CPU kernel for {self.bits} bits, group size {self.group_size}, {self.dtype}"
            )
        slots, height, width = self.shape
        check("weight", self.weight, np.uint8, (slots, height, width * self.bits // 8))
        stored = np.float32 if self.dtype == "float32" else np.uint16
        for name in ("scales", "biases") if affine else ():
            shape = slots, height, width // self.group_size
            check(name, getattr(self, name), stored, shape)
            if width % self.group_size:
                raise ValueError(f"{width} inputs are not whole groups of {self.group_size}")

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(S, out, in)"""
        slots, height, row_bytes = self.weight.shape
        return slots, height, row_bytes * 8 // self.bits

    @property
    def rounds_x(self) -> bool:
        """Whether products of few rows round x to int8."""
        return self.activations == "int8" and int8.supports(self.bits, self.group_size)

    @property
    def matvec_rows(self) -> int:
        """Up to so many rows of x for one matrix go through `matvec`."""
        return INT8_ROWS if self.rounds_x else MATVEC_ROWS

    @cached_property
    def place(self) -> tuple[int, ...]:
        """(weight, scales, biases: addresses; weight, scale bytes of a row; groups or inputs)"""
        parts = map(address, (self.weight, self.scales, self.biases))
        n, scale_row = self.shape[2], 0
        if self.group_size:
            n //= self.group_size
            scale_row = n * SIZES[self.dtype]
        return *parts, self.weight.shape[2], scale_row, n

    @property
    def reads(self) -> tuple[int, int, bool]:
        """What the order of x in memory depends on."""
        return self.bits, self.group_size, self.rounds_x

    def kernel(self, op: str) -> int:
        """Address of a kernel for this format. See `block_kernel`."""
        if op == "dot" and self.rounds_x:
            how = int8.instruction()
            return int8.dot_kernel(self.bits, self.group_size, self.dtype, how).address
        return block_kernel(op, self.bits, self.group_size, self.dtype).address

    @property
    def many_kernel(self) -> int:
        """Address of the kernel for _MANY rows of x that are not rounded."""
        return rows_kernel(_MANY, self.bits, self.group_size, self.dtype).address


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def aligned(*shape: int) -> np.ndarray:
    """New float32 from a line of 64 bytes on: a vector load that crosses lines costs two."""
    size = prod(shape)
    raw = np.empty(size + 16, np.float32)
    start = -address(raw) % 64 // 4
    return raw[start : start + size].reshape(shape)


def check(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the kernels, which know addresses only, can use this array."""
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape} with strides {array.strides}; "
            f"needed: C-contiguous {np.dtype(dtype)} {shape}"
        )


@intrinsic
def call(typingctx, kernel, w, scales, biases, x, height, n, out):
    """Call the kernel at an address. So `_launch`, slow to compile, is compiled once for all."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 7)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@njit(cache=True, nogil=True)
def _gated(gate, up):
    """silu(gate) * up"""
    return gate / (np.float32(1) + np.exp(-gate)) * up


@njit(parallel=True, cache=True, nogil=True)
def _launch(first, second, slots, rows, tiles, limits, height, out, row):
    """Run a kernel over (tile of pairs, block of matrix rows), shared out among the threads.

    first, second: (kernel, that of _MANY rows, *place, x, bytes of a row of x); see Packed. Where
    second has a kernel, out = silu(first) * second.
    tiles: see `_tiles`. Those of one slot take a block one after the other: it is read once.
    limits: how many slots and rows of x there are. Returns the first pair outside them, or -1.
    height: matrix rows. Row r's result for pair p starts at out[(p * height + r) * row].
    """
    for p in range(len(slots)):
        if not (0 <= slots[p] < limits[0] and 0 <= rows[p] < limits[1]):
            return p
    kernel, wide, w, scales, biases, w_row, s_row, n, x, x_row = first
    kernel2, wide2, w2, scales2, biases2, w_row2, s_row2, n2, x2, x_row2 = second
    xs, xs2 = x + rows * x_row, x2 + rows * x_row2
    blocks = (height + BLOCK - 1) // BLOCK
    base = out.ctypes.data
    for task in prange(len(tiles) * blocks):
        begin, of_run = tiles[task // blocks, 2], tiles[task // blocks, 3]
        place = task - begin * blocks
        tile, start = begin + place % of_run, place // of_run * BLOCK
        p, pairs = tiles[tile, 0], tiles[tile, 1]
        count = min(BLOCK, height - start)
        line = slots[p] * height + start
        at, skip = w + line * w_row, line * s_row
        at2, skip2 = w2 + line * w_row2, line * s_row2
        if pairs == 1:
            to = (p * height + start) * row
            call(kernel, at, scales + skip, biases + skip, xs[p], count, n, base + 4 * to)
            if kernel2 != 0:
                up = np.empty(BLOCK, np.float32)
                into = up.ctypes.data
                call(kernel2, at2, scales2 + skip2, biases2 + skip2, xs2[p], count, n2, into)
                for i in range(count):
                    out[to + i] = _gated(out[to + i], up[i])
            continue
        one, two = np.empty(_SCRATCH, np.float32), np.empty(_SCRATCH, np.float32)
        from_, into = xs[p:].ctypes.data, one.ctypes.data
        call(wide, at, scales + skip, biases + skip, from_, count, n, into)
        if kernel2 != 0:
            from_, into = xs2[p:].ctypes.data, two.ctypes.data
            call(wide2, at2, scales2 + skip2, biases2 + skip2, from_, count, n2, into)
        for i in range(pairs):
            to = (p + i) * height + start
            for j in range(count):
                value = one[i * BLOCK + j]
                out[to + j] = _gated(value, two[i * BLOCK + j]) if kernel2 != 0 else value
    return -1


_NONE = (0,) * 10  # no second operand


@cache
def _apart(count: int) -> np.ndarray:
    """The tiles of pairs that are taken one by one, each a run of its own."""
    first = np.arange(count)
    return np.stack([first, np.ones_like(first), first, np.ones_like(first)], axis=1)


def _tiles(slots: np.ndarray, many: int) -> np.ndarray:
    """How pairs are taken together, (T, 4): the first of `many` neighbours of one slot, or one; how
    many they are; the first tile of that slot's run, and how many tiles the run has."""
    if many == 1 or len(slots) < many or not (slots[1:] == slots[:-1]).any():
        return _apart(len(slots))
    found = []
    begin = 0
    for end in [*np.flatnonzero(np.diff(slots)) + 1, len(slots)]:
        whole = (end - begin) // many * many
        firsts = [*range(begin, begin + whole, many), *range(begin + whole, end)]
        run = len(found), len(firsts)
        found += [(p, many if p < begin + whole else 1, *run) for p in firsts]
        begin = end
    return np.array(found)


def _arranged(w: Packed, x: np.ndarray) -> np.ndarray:
    """x (R, in) as the kernels of w read it: (R, ...)."""
    if not w.group_size:
        return x
    if w.rounds_x:
        return int8.quantised(x, w.bits, w.group_size)
    index, factor, sums = arrangement(w.bits, w.group_size, w.scales.shape[2])
    out = aligned(len(x), index.size)
    arrange(x, index, factor, sums, out)
    return out


def _operand(w: Packed, xs: np.ndarray, wide: bool) -> tuple[int, ...]:
    """As `_launch` takes it. xs: arranged. wide: whether there are tiles of _MANY rows, for which a
    kernel is compiled."""
    many = w.many_kernel if wide else 0
    return w.kernel("dot"), many, *w.place, address(xs), xs.strides[0]


def _pairs(gate: Packed, up: Packed | None, slots, x, rows, out) -> None:
    for w in (gate,) if up is None else (gate, up):
        check("x", x, np.float32, (len(x), w.shape[2]))
        check("out", out, np.float32, (slots.size, w.shape[1]))
    check("slots", slots, np.int64, (slots.size,))
    check("rows", rows, np.int64, (slots.size,))
    if len(x) > slots.size:  # arrange only the rows that are used
        used, rows = np.unique(rows, return_inverse=True)
        for row in used[(used < 0) | (used >= len(x))]:
            raise IndexError(f"row {row} of {len(x)}")
        x = x[used]
    tiles = _tiles(slots, 1 if gate.rounds_x or (up and up.rounds_x) else _MANY)
    wide = len(tiles) < len(slots)
    xs = _arranged(gate, x)
    first, second = _operand(gate, xs, wide), _NONE
    if up is not None:
        ys = xs if up.reads == gate.reads else _arranged(up, x)
        second = _operand(up, ys, wide)
    height = out.shape[1]
    limits = min(w.shape[0] for w in (gate, up or gate)), len(x)
    with launching:
        bad = _launch(first, second, slots, rows, tiles, limits, height, out.reshape(-1), 1)
    if bad >= 0:
        raise IndexError(
            f"pair {bad}: slot {slots[bad]} of {limits[0]}, row {rows[bad]} of {limits[1]}"
        )


def matvec(w: Packed, slots: np.ndarray, x: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """out[p] = W[slots[p]] @ x[rows[p]].

    slots, rows: (P,) int64. x: (R, in) float32. out: (P, out) float32. All C-contiguous.
    Raises ValueError for other shapes or dtypes, IndexError for a slot or row that is not there.
    """
    _pairs(w, None, slots, x, rows, out)


def gate_up(
    gate: Packed,
    up: Packed,
    slots: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """out[p] = silu(gate[slots[p]] @ x[rows[p]]) * (up[slots[p]] @ x[rows[p]]).

    silu(g) = g * sigmoid(g). Arrays and errors as in `matvec`. The formats of gate and up may
    differ.
    """
    _pairs(gate, up, slots, x, rows, out)


def dequantize(w: Packed, slot: int, out: np.ndarray) -> None:
    """out = W[slot] in float32. out: (out, in) float32. Errors as in `matvec`."""
    check("out", out, np.float32, w.shape[1:])
    if not 0 <= slot < w.shape[0]:
        raise IndexError(f"slot {slot} of {w.shape[0]}")
    first, zero = (w.kernel("unpack"), 0, *w.place, 0, 0), np.zeros(1, np.int64)
    flat, limits = out.reshape(-1), (w.shape[0], 1)
    with launching:
        _launch(first, _NONE, zero + slot, zero, _apart(1), limits, len(out), flat, out.shape[1])
