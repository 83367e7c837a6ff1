"""Matrices as the kernels read them, and how their rows are shared out over lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

#: Bits that a weight may take: packed codes below 16, plain floats from there.
BITS = (2, 3, 4, 5, 6, 8, 16, 32)
GROUP_SIZES = (32, 64, 128)

#: Columns that a lane takes at once. A row is a whole number of them.
CHUNK = 32

_FLOATS = {mx.bfloat16: 16, mx.float16: 16, mx.float32: 32}


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns), or a stack of them, one in each slot.

    Attributes:
        weight: uint32 ([slots,] rows, columns * bits / 32); not packed: ([slots,] rows, columns).
        scales, biases: ([slots,] rows, columns / group_size) of bf16, f16 or f32; None where weight
            is not packed.
        bits: one of BITS. group_size: one of GROUP_SIZES.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    def __post_init__(self):
        if self.scales is None:
            object.__setattr__(self, "bits", _FLOATS[self.weight.dtype])
            object.__setattr__(self, "group_size", CHUNK)
            # The kernels take them and do not read them.
            object.__setattr__(self, "scales", self.weight)
            object.__setattr__(self, "biases", self.weight)
        object.__setattr__(self, "rows", self.weight.shape[-2])
        object.__setattr__(self, "columns", self.weight.shape[-1] * _word_bits(self) // self.bits)
        object.__setattr__(self, "arrays", [self.weight, self.scales, self.biases])

    def reason(self) -> str | None:
        """Why the kernels cannot read it; None: they can."""
        if self.bits not in BITS:
            return f"weights of {self.bits} bits are not one of {', '.join(map(str, BITS))}"
        if self.group_size not in GROUP_SIZES:
            return f"groups of {self.group_size} are not one of {', '.join(map(str, GROUP_SIZES))}"
        if self.columns % CHUNK or self.columns % self.group_size:
            return f"{self.columns} columns are not a multiple of {max(CHUNK, self.group_size)}"
        # Of fewer than 8 scales, MLX makes a constant, for which the kernels have no pointer.
        if self.rows * self.columns < 8 * self.group_size:
            return f"{self.rows} x {self.columns} is too small"
        return None

    def template(self, prefix: str = "") -> list[tuple[str, int | mx.Dtype]]:
        """Its template arguments."""
        return [
            (f"{prefix}BITS", self.bits),
            (f"{prefix}GROUP", self.group_size),
            (f"{prefix}W", self.scales.dtype),
        ]


def _word_bits(matrix: Matrix) -> int:
    return 8 * matrix.weight.itemsize


@cache
def lanes(columns: int) -> int:
    """How many lanes share a row: the most of which none, or few, have nothing to do at its end."""
    chunks = columns // CHUNK
    for n in (32, 16, 8, 4, 2):
        if chunks / (-(-chunks // n) * n) >= 0.9:
            return n
    return 1
