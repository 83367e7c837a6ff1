"""Compute down(silu(gate(x)) * up(x)) with packed matrices, of experts and of dense MLPs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import gemm
from .matvec import Packed, gate_up, matvec


class MlpMatrices(NamedTuple):
    """The matrices of an expert or of a dense MLP, or the stacks of those of several experts."""

    gate: Packed
    up: Packed
    down: Packed

    @property
    def few(self) -> int:
        """The most rows for one slot that go through `few_rows`."""
        return min(w.matvec_rows for w in self)


def few_rows(
    matrices: MlpMatrices, slots: np.ndarray, x: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Compute pairs of a slot and a row of x: pair p is x[rows[p]] and the matrices in slots[p].

    The bits of a pair do not depend on the other pairs.

    Args:
        slots, rows: (P,) int64.
        x: (R, in) float32.

    Returns:
        (P, in) float32.
    """
    gate, up, down = matrices
    h = np.empty((slots.size, gate.weight.shape[1]), np.float32)
    y = np.empty((slots.size, x.shape[1]), np.float32)
    gate_up(gate, up, slots, x, rows, h)
    matvec(down, slots, h, np.arange(slots.size), y)
    return y


def many_rows(matrices: MlpMatrices, slot: int, x: np.ndarray) -> np.ndarray:
    """Compute all rows of x with the matrices in one slot.

    The bits of a row do not depend on the other rows, nor on how many there are; they differ from
    those of `few_rows`.

    Args:
        x: (R, in) float32.

    Returns:
        (R, in) float32.
    """
    gate, up, down = matrices
    h = np.empty((x.shape[0], gate.weight.shape[1]), np.float32)
    y = np.empty_like(x)
    gemm.product(gate, slot, x, h, up)
    gemm.product(down, slot, h, y)
    return y
