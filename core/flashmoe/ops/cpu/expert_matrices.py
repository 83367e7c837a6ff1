"""See the slots of a layer as matrices for the kernels, and apply an expert of any form.

SwiGLU without biases, which most models have, takes two launches (`swiglu`). In other forms each
matrix is a launch of its own, and the activation is mlx-lm's own, on the products.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ...checkpoint.quantization import GLOBAL_SCALE_UNIT
from ...streaming.expert_form import SWIGLU
from ...streaming.slot_memory import SlotMemory
from ..arrays import to_numpy
from . import gemm, swiglu
from .matvec import Packed, matvec

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class ExpertMatrices:
    """The matrices of the experts in the slots of one layer.

    Use `of`, which makes them once for each layer.
    """

    def __init__(self, slots: SlotMemory):
        self._form = slots.form
        self._matrices = [_Matrix(slots, projection) for projection in slots.form.projections]
        stacks = [matrix.packed for matrix in self._matrices]
        self._swiglu = None
        if slots.form == SWIGLU and not any(matrix.extras for matrix in self._matrices):
            self._swiglu = swiglu.MlpMatrices(*stacks)
        self.few = min(stack.matvec_rows for stack in stacks)

    few: int
    """The most rows for one slot that go through `few_rows`."""

    @classmethod
    def of(cls, slots: SlotMemory) -> ExpertMatrices:
        """Return the matrices of a layer."""
        if "cpu" not in slots.views:
            slots.views["cpu"] = cls(slots)
        return slots.views["cpu"]

    def few_rows(self, slots: np.ndarray, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Compute pairs of a slot and a row of x: see `swiglu.few_rows`."""
        if self._swiglu is not None:
            return swiglu.few_rows(self._swiglu, slots, x, rows)
        *inner, outer = self._matrices
        h = self._activate([matrix.few_rows(slots, x, rows) for matrix in inner])
        return outer.few_rows(slots, h, np.arange(slots.size))

    def many_rows(self, slot: int, x: np.ndarray) -> np.ndarray:
        """Compute all rows of x with the expert in one slot: see `swiglu.many_rows`."""
        if self._swiglu is not None:
            return swiglu.many_rows(self._swiglu, slot, x)
        return self.outer(slot, self.intermediate(slot, x))

    def intermediate(self, slot: int, x: np.ndarray) -> np.ndarray:
        """Return what enters the last matrix, (rows, intermediate), for rows of x as many."""
        if self._swiglu is not None:
            gate, up, _ = self._swiglu
            h = np.empty((len(x), gate.shape[1]), np.float32)
            gemm.product(gate, slot, x, h, up)
            return h
        return self._activate([matrix.many_rows(slot, x) for matrix in self._matrices[:-1]])

    def outer(self, slot: int, h: np.ndarray) -> np.ndarray:
        """Apply the last matrix of the expert in a slot to h, (rows, intermediate), as many."""
        return self._matrices[-1].many_rows(slot, h)

    def _activate(self, products: list[np.ndarray]) -> np.ndarray:
        return to_numpy(self._form.activate([mx.array(y) for y in products]))[0]


class _Matrix:
    """One projection of the experts in the slots of a layer, with its bias and global scale."""

    def __init__(self, slots: SlotMemory, projection: str):
        self.packed = _packed(slots, projection)
        dtypes = {p.part: p.dtype for p in slots.layer.parts if p.projection == projection}
        self.extras: dict[str, tuple[np.ndarray, str]] = {
            name: (slots.host_bytes(projection, name), dtypes[name])
            for name in ("global_scale", "bias")
            if name in dtypes
        }

    def few_rows(self, slots: np.ndarray, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the products of pairs of a slot and a row of x, (pairs, out)."""
        y = np.empty((slots.size, self.packed.shape[1]), np.float32)
        matvec(self.packed, slots, x, rows, y)
        return self._finished(y, slots)

    def many_rows(self, slot: int, x: np.ndarray) -> np.ndarray:
        """Return the products of all rows of x with the matrix in one slot, (rows, out)."""
        y = np.empty((len(x), self.packed.shape[1]), np.float32)
        gemm.product(self.packed, slot, x, y)
        return self._finished(y, np.array([slot]))

    def _finished(self, y: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Multiply products by the global scales of their slots, and add the biases; in place."""
        if "global_scale" in self.extras:
            y *= self._rows("global_scale", slots) / np.float32(GLOBAL_SCALE_UNIT)
        if "bias" in self.extras:
            y += self._rows("bias", slots)
        return y

    def _rows(self, name: str, slots: np.ndarray) -> np.ndarray:
        """Return one part of the experts in some slots, (slots, values) float32."""
        stack, dtype = self.extras[name]
        raw = stack[slots]
        if dtype == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _packed(slots: SlotMemory, projection: str) -> Packed:
    """Return the stack of one projection of a layer's experts, as the kernels take it."""
    quantization = slots.layer.quantization[projection]
    parts = {p.part: p for p in slots.layer.parts if p.projection == projection}
    rows = parts["weight"].shape[0]

    def stack(name: str, dtype: type) -> np.ndarray:
        return slots.host_bytes(projection, name).view(dtype).reshape(slots.num_slots, rows, -1)

    weight = stack("weight", np.uint8)
    if quantization is None:
        dtype = _DTYPE_NAMES[parts["weight"].dtype]
        return Packed(weight, None, None, 32 if dtype == "float32" else 16, 0, dtype)
    form = quantization.bits, quantization.group_size
    if quantization.scale_dtype is not None:
        scales = stack("scales", np.uint8)
        return Packed(weight, scales, None, *form, quantization.scale_dtype, slots.activations)
    dtype = _DTYPE_NAMES[parts["scales"].dtype]
    raw = np.float32 if dtype == "float32" else np.uint16
    scales, biases = stack("scales", raw), stack("biases", raw)
    return Packed(weight, scales, biases, *form, dtype, slots.activations)
