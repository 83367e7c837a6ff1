"""Multiply a block of matrix rows by several rows of x, for which the weights are unpacked once.

Each row of x gets the bits that it has alone, from `unpack.block_kernel`: its sums are the same
vectors, to which the same products are added in the same order. The sums wait in memory while other
matrix rows are multiplied: all rows of a block take one part of the inputs, whose values of x stay
in the CPU's first-level cache, before the next part.
"""

from __future__ import annotations

from functools import cache

from numba import cfunc, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from .llvm import F32, I64, load, offset, pointer, store_sum, zeros
from .small_floats import decoder
from .unpack import emitters, row_bytes, step_words, sum_lanes

#: The most matrix rows of a task.
BLOCK = 16
#: Inputs of a part, at most.
_DEPTH = 1024
#: How many float32 the sums of a matrix row and a row of x take.
_SUMS = 64


@intrinsic(prefer_literal=True)
def _emit_part(
    typingctx, rows, bits, group_size, dtype, how, w, scales, biases, xs, start, stop, n, out, kept
):
    """Multiply the part start..stop of a matrix row by `rows` rows of x.

    The sums are stored at the address `kept` between parts, and added up into `out` after the last.

    Args:
        rows, bits, group_size, dtype, how: literals, the number of rows of x and the format.
        w, scales, biases: addresses, of the matrix row.
        xs: the address of the addresses of the rows of x.
        start, stop, n: groups, or inputs when unquantised; n is those of the whole row.
        out, kept: addresses.
    """
    form = [t.literal_value for t in (bits, group_size, dtype, how)]
    count, (_, dot) = rows.literal_value, emitters(form)

    def codegen(context, builder, signature, args):
        *weights, xs, start, stop, n, out, kept = args[5:]
        ats = [offset(builder, xs, I64(r), 8) for r in range(count)]
        xs = [builder.load(builder.inttoptr(at, I64.as_pointer())) for at in ats]
        sums, places = [], []
        for r in range(count):
            at = builder.add(kept, I64(4 * _SUMS * r))
            sizes = sum_lanes(*form[:2])
            places.append([at, builder.add(at, I64(4 * sizes[0]))])
            sums.append([zeros(builder, size) for size in sizes])
            for total, place, size in zip(sums[r], places[r], sizes, strict=True):
                with builder.if_then(builder.icmp_signed(">", start, I64(0))):
                    builder.store(load(builder, place, F32, size), total)
        dot(builder, form, *weights, xs, (start, stop, n), sums)
        with builder.if_else(builder.icmp_signed("<", stop, n)) as (more, done):
            with more:
                for r in range(count):
                    for total, place in zip(sums[r], places[r], strict=True):
                        value = builder.load(total)
                        target = pointer(builder, place, F32, value.type.count)
                        builder.store(value, target, align=1)
            with done:
                for r in range(count):
                    store_sum(builder, sums[r], builder.add(out, I64(4 * BLOCK * r)))
        return context.get_dummy_value()

    return types.void(rows, bits, group_size, dtype, how, *[types.int64] * 9), codegen


@cache
def rows_kernel(rows: int, bits: int, group_size: int, dtype: str) -> CFunc:
    """Return the "dot" kernel for `rows` rows of x, for which the weights are unpacked once.

    Each row of x gets the bits that it has alone: the order of its sum is the same.

    The kernel's arguments are those of `unpack.block_kernel`, except:
        x: the address of the rows' addresses.
        height: at most BLOCK.
        out: memory for `rows_scratch(rows)` float32. The first of them are the results,
            (rows, BLOCK).
    """
    weight_bytes, scale_bytes = row_bytes(bits, group_size, dtype)
    depth, how = _DEPTH, decoder()
    if group_size:
        whole = step_words(bits, group_size) * 32 // (bits * group_size)
        depth = max(1, _DEPTH // (whole * group_size)) * whole

    @cfunc(types.void(*[types.int64] * 7), cache=True)
    def block(w, scales, biases, x, height, n, out):
        kept = out + 4 * BLOCK * rows
        for start in range(0, n, depth):
            stop = min(n, start + depth)
            for r in range(height):
                w_at, skip = w + r * n * weight_bytes, r * n * scale_bytes
                to, sums = out + 4 * r, kept + r * (4 * _SUMS * rows)
                _emit_part(
                    rows,
                    bits,
                    group_size,
                    dtype,
                    how,
                    w_at,
                    scales + skip,
                    biases + skip,
                    x,
                    start,
                    stop,
                    n,
                    to,
                    sums,
                )

    return block


def rows_scratch(rows: int) -> int:
    """Return how many float32 a `rows_kernel` writes."""
    return rows * BLOCK * (1 + _SUMS)
