"""Multiply few rows by matrices as they are stored in an MLX checkpoint, on the CPU, in numpy.

Here each row of x is multiplied by the packed weights; `gemm` unpacks one matrix for many rows.

No bit of a row's result depends on the number of threads, on the other pairs of the call, or on the
slot: each product of a matrix row and a row of x is summed in one fixed order by one thread.

Weights are read without the GIL, so reader threads go on meanwhile.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from . import int8, small_floats
from .llvm import FLOATS, SIZES
from .multi_row import BLOCK, rows_kernel, rows_scratch
from .unpack import BITS, GROUP_SIZES, arrange, arrangement, block_kernel

# GNU OpenMP's threads spin for about 10 ms after a launch, which takes the CPU from reader threads.
# If they sleep at once (OMP_WAIT_POLICY=passive), they wake so late that a call of one expert ran
# at a third of its speed on a virtual machine. This many rounds, about 0.4 ms, bridge the launches
# of a layer but not a read. OpenMP reads the variable when numba first launches.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

#: Held by each parallel launch: numba's portable threading layer crashes if two run at one time.
launch_lock = threading.Lock()

#: The most rows of x for one matrix for which `matvec` is faster than `gemm.product`, which unpacks
#: the weights once for all rows.
MATVEC_ROWS = 2

#: The most rows that are rounded to int8, where that is asked for: more rows belong to a prompt.
#: Integers would be faster for any number of rows.
INT8_ROWS = 20

_MANY = 4  # rows of x for which the weights are unpacked once
_SCRATCH = rows_scratch(_MANY)


@dataclass(frozen=True, eq=False)
class Packed:
    """A stack of S matrices (out, in) as they are stored in an MLX checkpoint, seen by numpy.

    A quantised value is scale * q + bias, or scale * q where q is a small float. All arrays are
    C-contiguous. Keep the object: it holds what each call needs of these arrays.

    Attributes:
        weight: (S, out, row_bytes) uint8. Quantised: MLX's little-endian bit stream, `bits` for
            each value along `in`. Unquantised: the raw bytes of bf16, f16 or f32 values.
        scales, biases: (S, out, in // group_size) uint16 (raw bits of bf16 or f16), float32, or
            uint8 (the scales of small floats, which have no biases); None when unquantised.
        bits: 2, 3, 4, 5, 6, 8 (quantised), 16 or 32.
        group_size: 32, 64, 128, or 0 when unquantised; see `small_floats.FORMATS` too.
        dtype: the dtype of scales and biases, or of unquantised weights: "bfloat16", "float16" or
            "float32"; "e8m0" or "e4m3" for the scales of small floats.
        activations: "float32", or "int8": products of up to INT8_ROWS rows round x, where
            `int8.supports` the format.

    Raises:
        ValueError: there is no kernel for the format, or an array does not fit it.
    """

    weight: np.ndarray
    scales: np.ndarray | None
    biases: np.ndarray | None
    bits: int
    group_size: int
    dtype: str
    activations: str = "float32"

    def __post_init__(self):
        affine = self.bits in BITS and self.group_size in GROUP_SIZES and self.dtype in FLOATS
        plain = not self.group_size and self.dtype in FLOATS and self.bits == 8 * SIZES[self.dtype]
        if not (affine or plain or self.is_small_float):
            raise ValueError(
                f"no CPU kernel for {self.bits} bits, group size {self.group_size}, {self.dtype}"
            )
        slots, height, width = self.shape
        check_array("weight", self.weight, np.uint8, (slots, height, width * self.bits // 8))
        stored = np.uint16 if affine else np.uint8
        if self.dtype == "float32":
            stored = np.float32
        for name in ("scales", "biases") if affine else () if plain else ("scales",):
            shape = slots, height, width // self.group_size
            check_array(name, getattr(self, name), stored, shape)
            if width % self.group_size:
                raise ValueError(f"{width} inputs are not whole groups of {self.group_size}")

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The number of matrices and the size of each: (S, out, in)."""
        slots, height, row_bytes = self.weight.shape
        return slots, height, row_bytes * 8 // self.bits

    @property
    def is_small_float(self) -> bool:
        """Whether a quantised value is a float of 4 or 8 bits."""
        return (self.bits, self.group_size, self.dtype) in small_floats.FORMATS

    @property
    def rounds_x(self) -> bool:
        """Whether products of few rows round x to int8."""
        supported = not self.is_small_float and int8.supports(self.bits, self.group_size)
        return self.activations == "int8" and supported

    @property
    def matvec_rows(self) -> int:
        """The most rows of x for one matrix that go through `matvec`."""
        return INT8_ROWS if self.rounds_x else MATVEC_ROWS

    @cached_property
    def location(self) -> tuple[int, ...]:
        """Where the kernels find the matrices, six numbers.

        The addresses of weight, scales and biases; the bytes of a row's weights, and of its scales;
        the groups of a row, or its inputs when unquantised.
        """
        parts = map(address, (self.weight, self.scales, self.biases))
        n, scale_row = self.shape[2], 0
        if self.group_size:
            n //= self.group_size
            scale_row = n * SIZES[self.dtype]
        return *parts, self.weight.shape[2], scale_row, n

    @property
    def x_order(self) -> tuple[int, int, bool, bool]:
        """What the order of x in memory depends on: see `_arranged`."""
        return self.bits, self.group_size, self.rounds_x, self.is_small_float

    def kernel(self, op: str) -> int:
        """Return the address of the kernel for this format and `op`, see `block_kernel`."""
        if op == "dot" and self.rounds_x:
            how = int8.instruction()
            kernel = int8.dot_kernel(self.bits, self.group_size, self.dtype, how)
        else:
            kernel = block_kernel(op, self.bits, self.group_size, self.dtype)
        return kernel.address  # type: ignore[return-value]  # numba compiled it when it was made

    @property
    def many_kernel(self) -> int:
        """The address of the kernel for _MANY rows of x that are not rounded."""
        kernel = rows_kernel(_MANY, self.bits, self.group_size, self.dtype)
        return kernel.address  # type: ignore[return-value]  # numba compiled it when it was made


def address(array: np.ndarray | None) -> int:
    """Return the address of an array's first element, 0 for None."""
    if array is None:
        return 0
    interface: Any = array.__array_interface__
    return interface["data"][0]


def aligned(*shape: int) -> np.ndarray:
    """Return a new float32 array that begins at a cache line of 64 bytes; its values are undefined.

    A vector load that crosses cache lines costs two.
    """
    size = prod(shape)
    raw = np.empty(size + 16, np.float32)
    start = -address(raw) % 64 // 4
    return raw[start : start + size].reshape(shape)


def check_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    """Check that the kernels, which know addresses only, can use an array.

    Raises:
        ValueError: the array has another dtype or shape, or is not C-contiguous.
    """
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape} with strides {array.strides}: it must be "
            f"C-contiguous {np.dtype(dtype)} {shape}"
        )


@intrinsic
def call_kernel(typingctx, kernel, w, scales, biases, x, height, n, out):
    """Call the kernel at the address `kernel`, see `block_kernel` for its arguments.

    By addresses, `_launch`, which is slow to compile, is compiled once for all kernels.
    """

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 7)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@njit(cache=True, nogil=True)
def _gated(gate, up):
    """Return silu(gate) * up."""
    return gate / (np.float32(1) + np.exp(-gate)) * up


@njit(parallel=True, cache=True, nogil=True)
def _launch(first, second, slots, rows, tiles, limits, height, out, row):
    """Run a kernel over (tile of pairs, block of matrix rows), shared out among the threads.

    Tiles of one slot take a block one after the other, so that its weights are read once.

    Args:
        first, second: operands, see `_operand`. Where second has a kernel, the result is
            silu(first) * second.
        slots, rows: (P,), the slot and the row of x of each pair.
        tiles: see `_tiles`.
        limits: how many slots and rows of x there are.
        height: the rows of a matrix.
        out: float32. The result of matrix row r for pair p starts at out[(p * height + r) * row].

    Returns:
        The first pair outside of `limits`, in which case nothing is computed; otherwise -1.
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
            call_kernel(kernel, at, scales + skip, biases + skip, xs[p], count, n, base + 4 * to)
            if kernel2 != 0:
                up = np.empty(BLOCK, np.float32)
                into = up.ctypes.data
                s_at, b_at = scales2 + skip2, biases2 + skip2
                call_kernel(kernel2, at2, s_at, b_at, xs2[p], count, n2, into)
                for i in range(count):
                    out[to + i] = _gated(out[to + i], up[i])
            continue
        one, two = np.empty(_SCRATCH, np.float32), np.empty(_SCRATCH, np.float32)
        from_, into = xs[p:].ctypes.data, one.ctypes.data
        call_kernel(wide, at, scales + skip, biases + skip, from_, count, n, into)
        if kernel2 != 0:
            from_, into = xs2[p:].ctypes.data, two.ctypes.data
            call_kernel(wide2, at2, scales2 + skip2, biases2 + skip2, from_, count, n2, into)
        for i in range(pairs):
            to = (p + i) * height + start
            for j in range(count):
                value = one[i * BLOCK + j]
                out[to + j] = _gated(value, two[i * BLOCK + j]) if kernel2 != 0 else value
    return -1


_NONE: tuple[int, ...] = (0,) * 10  # no second operand


@cache
def _single_tiles(count: int) -> np.ndarray:
    """Return the tiles of pairs that are computed one by one, each a run of its own."""
    first = np.arange(count)
    return np.stack([first, np.ones_like(first), first, np.ones_like(first)], axis=1)


def _tiles(slots: np.ndarray, many: int) -> np.ndarray:
    """Divide pairs into tiles: `many` neighbours of one slot, or one pair where fewer are left.

    Returns:
        (T, 4): the first pair of a tile; how many pairs it has; the first tile of the run, which
        has the neighbouring pairs of one slot; and how many tiles the run has.
    """
    if many == 1 or len(slots) < many or not (slots[1:] == slots[:-1]).any():
        return _single_tiles(len(slots))
    tiles: list[tuple[int, int, int, int]] = []
    begin = 0
    for end in [*np.flatnonzero(np.diff(slots)) + 1, len(slots)]:
        whole = (end - begin) // many * many
        firsts = [*range(begin, begin + whole, many), *range(begin + whole, end)]
        run = len(tiles), len(firsts)
        tiles += [(p, many if p < begin + whole else 1, *run) for p in firsts]
        begin = end
    return np.array(tiles)


def _arranged(w: Packed, x: np.ndarray) -> np.ndarray:
    """Return the rows of x, (R, in), in the order in which the kernels of w read them: (R, ...)."""
    if not w.group_size or (w.is_small_float and w.bits == 8):
        return x
    if w.rounds_x:
        return int8.quantised(x, w.bits, w.group_size)
    groups = w.shape[2] // w.group_size
    how = small_floats.decoder() if w.is_small_float else ""
    index, factor, sums = arrangement(w.bits, w.group_size, groups, how)
    out = aligned(len(x), index.size)
    arrange(x, index, factor, sums, out)
    return out


def _operand(w: Packed, xs: np.ndarray, wide: bool) -> tuple[int, ...]:
    """Return a matrix and its x as `_launch` takes them.

    It is a plain tuple, since numba takes much longer to find the type of a named one.

    Args:
        xs: what `_arranged` returned.
        wide: whether there are tiles of _MANY rows, for which a kernel is compiled.

    Returns:
        The kernel of one row, that of _MANY rows, `Packed.location`, the address of xs, and the
        bytes of a row of xs.
    """
    many = w.many_kernel if wide else 0
    return w.kernel("dot"), many, *w.location, address(xs), xs.strides[0]


def _multiply_pairs(
    gate: Packed,
    up: Packed | None,
    slots: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """Compute `gate_up`, or `matvec` where up is None."""
    for w in (gate,) if up is None else (gate, up):
        check_array("x", x, np.float32, (len(x), w.shape[2]))
        check_array("out", out, np.float32, (slots.size, w.shape[1]))
    check_array("slots", slots, np.int64, (slots.size,))
    check_array("rows", rows, np.int64, (slots.size,))
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
        ys = xs if up.x_order == gate.x_order else _arranged(up, x)
        second = _operand(up, ys, wide)
    height = out.shape[1]
    limits = min(w.shape[0] for w in (gate, up or gate)), len(x)
    with launch_lock:
        bad = _launch(first, second, slots, rows, tiles, limits, height, out.reshape(-1), 1)
    if bad >= 0:
        raise IndexError(
            f"pair {bad}: slot {slots[bad]} of {limits[0]}, row {rows[bad]} of {limits[1]}"
        )


def matvec(w: Packed, slots: np.ndarray, x: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Set out[p] to W[slots[p]] @ x[rows[p]] for each pair p. All arrays are C-contiguous.

    Args:
        slots, rows: (P,) int64.
        x: (R, in) float32.
        out: (P, out) float32.

    Raises:
        ValueError: an array has another shape or dtype.
        IndexError: a slot or row is out of range.
    """
    _multiply_pairs(w, None, slots, x, rows, out)


def gate_up(
    gate: Packed,
    up: Packed,
    slots: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """Set out[p] to silu(gate[slots[p]] @ x[rows[p]]) * (up[slots[p]] @ x[rows[p]]) for each pair.

    silu(g) = g * sigmoid(g). The formats of gate and up may differ. Arrays and errors are those of
    `matvec`.
    """
    _multiply_pairs(gate, up, slots, x, rows, out)


def dequantize(w: Packed, slot: int, out: np.ndarray) -> None:
    """Set out, (out, in) float32, to W[slot]. Errors are those of `matvec`."""
    check_array("out", out, np.float32, w.shape[1:])
    if not 0 <= slot < w.shape[0]:
        raise IndexError(f"slot {slot} of {w.shape[0]}")
    first, zero = (w.kernel("unpack"), 0, *w.location, 0, 0), np.zeros(1, np.int64)
    tiles, limits, flat = _single_tiles(1), (w.shape[0], 1), out.reshape(-1)
    with launch_lock:
        _launch(first, _NONE, zero + slot, zero, tiles, limits, len(out), flat, out.shape[1])
