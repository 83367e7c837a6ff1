"""Describe matrices as the kernels read them, and how lanes share their rows."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

#: Bits of a weight: packed codes below 16, unquantised floats from 16 on.
BITS = (2, 3, 4, 5, 6, 8, 16, 32)
GROUP_SIZES = (32, 64, 128)

#: Columns that a lane reads at a time. A row is a whole number of chunks.
CHUNK = 32

_FLOATS = (mx.bfloat16, mx.float16, mx.float32)


class Matrix:
    """A matrix (rows, columns), or a stack of them, one in each slot.

    Args:
        weight: uint32 ([slots,] rows, columns * bits / 32); unquantised: ([slots,] rows, columns).
        scales, biases: ([slots,] rows, columns / group_size) of bf16, f16 or f32; None where weight
            is unquantised.
        bits: one of BITS.
        group_size: one of GROUP_SIZES.

    Attributes:
        rows, columns: the size of one matrix.
        arrays: weight, scales and biases, as kernels take them.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        bits: int = 0,
        group_size: int = 0,
    ):
        if scales is None:
            bits, group_size = 8 * weight.itemsize, CHUNK
            # The kernels take scales and biases in any case, and do not read these.
            scales = biases = weight
        self.weight, self.scales, self.biases = weight, scales, biases
        self.arrays = [weight, scales, weight if biases is None else biases]
        self.bits, self.group_size = bits, group_size
        self.rows = weight.shape[-2]
        self.columns = weight.shape[-1] * 8 * weight.itemsize // bits

    def reason(self) -> str | None:
        """Return why the kernels cannot read the matrix, or None if they can."""
        if self.bits not in BITS:
            return f"weights of {self.bits} bits are not one of {', '.join(map(str, BITS))}"
        if self.group_size not in GROUP_SIZES:
            return f"groups of {self.group_size} are not one of {', '.join(map(str, GROUP_SIZES))}"
        if self.scales.dtype not in _FLOATS:
            return f"scales of {self.scales.dtype} are not floats, as those of affine weights are"
        if self.biases is None:
            return "there are no biases, as affine weights have them"
        if self.columns % CHUNK or self.columns % self.group_size:
            return f"{self.columns} columns are not a multiple of {max(CHUNK, self.group_size)}"
        # MLX makes fewer than 8 scales a constant, for which the kernels have no pointer.
        if self.rows * self.columns < 8 * self.group_size:
            return f"{self.rows} x {self.columns} is too small"
        return None

    def template(self, prefix: str = "") -> list[tuple[str, int | mx.Dtype]]:
        """Return the template arguments that describe the matrix, their names after `prefix`."""
        return [
            (f"{prefix}BITS", self.bits),
            (f"{prefix}GROUP", self.group_size),
            (f"{prefix}W", self.scales.dtype),
        ]


@cache
def lanes(columns: int) -> int:
    """Return how many lanes share a row: the most of which at most a tenth idle at its end."""
    chunks = columns // CHUNK
    for n in (32, 16, 8, 4, 2):
        if chunks / (-(-chunks // n) * n) >= 0.9:
            return n
    return 1
