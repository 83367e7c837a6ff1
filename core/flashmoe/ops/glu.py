"""down(silu(gate(x)) * up(x)) with packed matrices, for routed experts and for dense MLPs."""

from __future__ import annotations

import numpy as np

from . import kernels
from .kernels import Packed


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
    """All rows of x through the matrices in one slot: (R, in) -> (R, in) float32."""
    h = np.empty((x.shape[0], gate.weight.shape[1]), np.float32)
    u = np.empty_like(h)
    y = np.empty_like(x)
    kernels.matmul(gate, slot, x, h)
    kernels.matmul(up, slot, x, u)
    h *= 1 / (1 + np.exp(-h))
    h *= u
    kernels.matmul(down, slot, h, y)
    return y
