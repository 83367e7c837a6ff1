"""The memory of one layer's slots: for each part of an expert, one stacked array `(slots, ...)`.

The reader writes an expert's bytes into its slot; ops index experts by slot. The stacks are
allocated once and never move; `release` gives the memory of a slot back to the system until it is
written again. On the CPU they are numpy arrays, because the CPU ops are numba
loops. On a GPU they are MLX arrays: written through a host view of the same memory, or, where the
GPU has memory of its own, by copies (see `flashmoe.streaming.device_copy`).
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashmoe_metal.matrix import Matrix

from ..checkpoint.checkpoint import ExpertLayer, ExpertPart
from .device_copy import DeviceBytes, DeviceMemory
from .io_modes import BLOCK
from .reader import ReadRequest

if TYPE_CHECKING:
    from ..ops.cpu.matvec import Packed

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
MLX_DTYPES = {
    "U32": mx.uint32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
}


class SlotMemory:
    """Slots of one layer.

    Args:
        layer: shapes, dtypes and file ranges of the layer's experts.
        num_slots: how many experts fit at one time.
        on_gpu: hold the stacks as MLX arrays for GPU ops, not as numpy arrays.
        device: the GPU's own memory, where the stacks then stay: the host must not look at them,
            nor at slices of them (see `DeviceMemory.address`). None: memory that both share.
        activations: what `packed` gives: see `flashmoe.ops.activations`.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        num_slots: int,
        *,
        on_gpu: bool,
        device: DeviceMemory | None = None,
        activations: str = "float32",
    ):
        self.layer = layer
        self.num_slots = num_slots
        self.on_gpu = on_gpu
        self.device = device
        self.activations = activations
        self._arrays: dict[tuple[str, str], mx.array] = {}
        # (slots, bytes), or all bytes of the stack.
        self._bytes: dict[tuple[str, str], np.ndarray | DeviceBytes] = {}
        self._pages: list[tuple[mmap.mmap, int, int]] = []
        if device is not None:
            # Among what MLX keeps for new arrays there may be managed memory.
            mx.clear_cache()
        for part in layer.parts:
            key = (part.projection, part.part)
            if on_gpu:
                array = mx.zeros((num_slots, *part.shape), MLX_DTYPES[part.dtype])
                raw = array.view(mx.uint8)
                mx.eval(array, raw)
                self._arrays[key] = array
                if device is None:
                    self._bytes[key] = np.array(raw, copy=False).reshape(num_slots, part.nbytes)
                else:
                    self._bytes[key] = DeviceBytes.of(device, array)
            else:
                # Where experts are whole blocks, every slot lies in blocks as its bytes do in the
                # file, so that a drive can write into it.
                phase = part.start % BLOCK
                pages = pages_of(phase + num_slots * part.nbytes)
                self._pages.append((pages, phase, part.nbytes))
                stack = np.frombuffer(pages, np.uint8)[phase:]
                self._bytes[key] = stack.reshape(num_slots, part.nbytes)
        self._packed: dict[str, Packed] = {}
        self._matrices: list[Matrix] | None = None

    def requests(self, expert: int, slot: int) -> list[ReadRequest]:
        """The reads that bring `expert` into `slot`: one for each part."""
        return [
            ReadRequest(
                path=part.file,
                start=part.range(expert)[0],
                buffer=self._buffer(part, slot),
                layer=self.layer.layer,
                expert=expert,
            )
            for part in self.layer.parts
        ]

    def release(self, slot: int) -> None:
        """Give the pages of a slot to the system; what it held is lost. CPU only."""
        for pages, phase, nbytes in self._pages:
            # Those that it shares with its neighbours stay.
            start = -(-(phase + slot * nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (phase + (slot + 1) * nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                pages.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def packed(self, projection: str) -> Packed:
        """The stack of one projection for the numba ops. CPU only."""
        if projection not in self._packed:
            self._packed[projection] = self._pack(projection)
        return self._packed[projection]

    def stacks(self, projection: str) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
        """(weight, scales, biases) of one projection, each `(slots, ...)`. GPU only."""
        return tuple(self._arrays.get((projection, p)) for p in ("weight", "scales", "biases"))

    def matrices(self) -> list[Matrix] | None:
        """The stacks of gate, up and down for our GPU kernels; None when they cannot read one."""
        if self._matrices is None:
            self._matrices = [self._matrix(p) for p in ("gate_proj", "up_proj", "down_proj")]
        return None if any(m.reason() for m in self._matrices) else self._matrices

    def matrix(self, projection: str, slot: int) -> list[mx.array | None]:
        """(weight, scales, biases) of the expert in `slot`, as MLX arrays without the slot axis.

        On the CPU this copies: it serves the reference ops only.
        """
        if self.on_gpu:
            return [None if a is None else a[slot] for a in self.stacks(projection)]
        found = {}
        for part in self.layer.parts:
            if part.projection == projection:
                raw = mx.array(self._bytes[projection, part.part][slot])
                found[part.part] = raw.view(MLX_DTYPES[part.dtype]).reshape(part.shape)
        return [found.get(p) for p in ("weight", "scales", "biases")]

    def _buffer(self, part: ExpertPart, slot: int) -> np.ndarray | DeviceBytes:
        stack = self._bytes[part.projection, part.part]
        if isinstance(stack, DeviceBytes):
            return stack[slot * part.nbytes : (slot + 1) * part.nbytes]
        return stack[slot]

    def _matrix(self, projection: str) -> Matrix:
        quantization = self.layer.quantization[projection]
        bits = quantization and (quantization.bits, quantization.group_size)
        return Matrix(*self.stacks(projection), *(bits or ()))

    def _pack(self, projection: str) -> Packed:
        from ..ops.cpu.matvec import Packed

        quantization = self.layer.quantization[projection]
        parts = {p.part: p for p in self.layer.parts if p.projection == projection}
        rows = parts["weight"].shape[0]

        def stack(name: str, dtype: type) -> np.ndarray:
            return self._bytes[projection, name].view(dtype).reshape(self.num_slots, rows, -1)

        if quantization is None:
            dtype = parts["weight"].dtype
            bits = 32 if dtype == "F32" else 16
            return Packed(stack("weight", np.uint8), None, None, bits, 0, NAMES[dtype])
        dtype = parts["scales"].dtype
        scale_type = np.float32 if dtype == "F32" else np.uint16
        return Packed(
            stack("weight", np.uint8),
            stack("scales", scale_type),
            stack("biases", scale_type),
            quantization.bits,
            quantization.group_size,
            NAMES[dtype],
            self.activations,
        )


def pages_of(nbytes: int) -> mmap.mmap:
    """Memory whose pages the system gives when they are first written."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, and fewer pieces for the drive
    return pages
