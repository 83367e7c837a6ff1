"""Multiply by the matrix of a router that holds it itself, as DeepSeek's and GLM's do, by BLAS.

MLX's own product of float32 matrices is scalar on x86: one token of DeepSeek-V3 spent 6 ms in each
layer's router. What such a router does with the products differs from model to model, and stays
mlx-lm's.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import to_numpy

#: mlx-lm's classes whose input is only used in `x @ self.weight.T`.
NAMES = ("MoEGate", "BailingGate", "Dots1TopkRouter", "Router")


def gate_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that computes a router by BLAS, or None if `module` is none of them."""
    kind = type(module)
    of_mlx_lm = kind.__module__.startswith("mlx_lm.models.") and kind.__name__ in NAMES
    weight = module.get("weight")
    if not of_mlx_lm or not isinstance(weight, mx.array) or weight.ndim != 2:
        return None
    return _subclass(kind)


@cache
def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Gate, kind), {"__doc__": kind.__doc__})


class _Gate(nn.Module):
    """A router that gets its logits in the place of x, and the identity in that of its matrix."""

    weight: mx.array

    def __call__(self, x: mx.array):
        weight = self.weight
        rows, matrix = to_numpy(x, weight)
        # BLAS rounds by the number of rows: one product for each sequence.
        logits = np.matmul(rows, matrix.T)
        self.weight = mx.eye(len(matrix))
        try:
            return super().__call__(mx.array(logits))  # type: ignore[misc]  # the class behind it
        finally:
            self.weight = weight
