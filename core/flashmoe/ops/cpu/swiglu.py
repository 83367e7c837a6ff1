"""down(silu(gate(x)) * up(x)) with packed matrices, for routed experts and for dense MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import gemm
from . import matvec as kernels
from .matvec import Packed


def few_rows(
    gate: Packed, up: Packed, down: Packed, slots: np.ndarray, x: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """One row a pair: pair p is x[rows[p]] through the matrices in slots[p].

    x: (R, in) float32; slots, rows: (P,) int64. Returns (P, in) float32. The bits of a pair do not
    depend on the other pairs.
    """
    h = np.empty((slots.size, gate.weight.shape[1]), np.float32)
    y = np.empty((slots.size, x.shape[1]), np.float32)
    kernels.gate_up(gate, up, slots, x, rows, h)
    kernels.matvec(down, slots, h, np.arange(slots.size), y)
    return y


def many_rows(gate: Packed, up: Packed, down: Packed, slot: int, x: np.ndarray) -> np.ndarray:
    """All rows of x through the matrices in one slot: (R, in) -> (R, in) float32.

    The bits of a row do not depend on the other rows, nor on how many they are; they differ from
    those of `few_rows`.
    """
    h = np.empty((x.shape[0], gate.weight.shape[1]), np.float32)
    y = np.empty_like(x)
    gemm.product(gate, slot, x, h, up)
    gemm.product(down, slot, h, y)
    return y


def few(matrices: Sequence[Packed]) -> int:
    """Up to so many rows for one slot go through `few_rows`."""
    return min(w.matvec_rows for w in matrices)
