"""Hold the experts of one layer that are resident: for each part one stacked array, `(slots, ...)`.

The reader writes an expert's bytes into its slot; compute backends index experts by slot. The
stacks are allocated once and never move; `release` gives the memory of a slot back to the system
until the slot is written again. On the CPU the stacks are plain memory, because the CPU kernels are
numba loops. On a GPU they are MLX arrays: written through a host view of the same memory, or, where
the GPU has memory of its own, by copies (see `flashmoe.streaming.device_copy`).
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.expert_layers import ExpertLayer, ExpertPart
from .device_copy import DeviceBytes, DeviceMemory
from .expert_form import SWIGLU, ExpertForm
from .io_modes import BLOCK
from .reader import ReadRequest

#: Tells the system that pages are free; macOS keeps them when it is told MADV_DONTNEED.
_GIVE_BACK = mmap.MADV_FREE if sys.platform == "darwin" else mmap.MADV_DONTNEED

MLX_DTYPES = {
    "U8": mx.uint8,
    "U32": mx.uint32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
}


class SlotMemory:
    """The memory of the slots of one layer.

    Args:
        layer: shapes, dtypes and file ranges of the layer's experts.
        num_slots: how many experts fit at one time.
        on_gpu: hold the stacks as MLX arrays for a GPU, not as host memory.
        device: the GPU's own memory, where the stacks then stay: the host must not look at them,
            nor at slices of them (see `DeviceMemory.address`). None: memory that both share.
        activations: how activations meet the packed weights; see `flashmoe.ops.activations`.
        form: what an expert computes.

    Attributes:
        views: what a compute backend has made of the stacks, kept here by the backend so that it
            makes it once.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        num_slots: int,
        *,
        on_gpu: bool,
        device: DeviceMemory | None = None,
        activations: str = "float32",
        form: ExpertForm = SWIGLU,
    ):
        self.layer = layer
        self.num_slots = num_slots
        self.on_gpu = on_gpu
        self.device = device
        self.activations = activations
        self.form = form
        self.views: dict[str, Any] = {}
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
                pages = allocate_pages(phase + num_slots * part.nbytes)
                self._pages.append((pages, phase, part.nbytes))
                stack = np.frombuffer(pages, np.uint8)[phase:]
                self._bytes[key] = stack.reshape(num_slots, part.nbytes)

    def requests(self, expert: int, slot: int) -> list[ReadRequest]:
        """Return the reads that bring `expert` into `slot`: one for each part."""
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
        """Give the pages of a slot back to the system; its contents are lost. CPU only."""
        for pages, phase, nbytes in self._pages:
            # Pages that the slot shares with its neighbours stay.
            start = -(-(phase + slot * nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (phase + (slot + 1) * nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                pages.madvise(_GIVE_BACK, start, stop - start)

    def host_bytes(self, projection: str, part: str) -> np.ndarray:
        """Return the stack of one part as bytes, (slots, bytes of a slot) uint8. CPU only."""
        stack = self._bytes[projection, part]
        assert isinstance(stack, np.ndarray), "the stacks are in the memory of a GPU"
        return stack

    def stacks(self, projection: str) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
        """Return (weight, scales, biases) of one projection, each `(slots, ...)`. GPU only.

        Those that its quantisation does not have are None.
        """
        weight, scales, biases = (
            self.stack(projection, part) for part in ("weight", "scales", "biases")
        )
        return weight, scales, biases

    def stack(self, projection: str, part: str) -> mx.array | None:
        """Return one part of one projection, `(slots, ...)`, or None where it has none. GPU only.

        part: "weight", "scales", "biases", "bias" or "global_scale".
        """
        return self._arrays.get((projection, part))

    def expert_arrays(self, projection: str, slot: int) -> dict[str, mx.array]:
        """Return the parts of one projection of the expert in `slot`, without the slot axis.

        On the CPU this copies: it is for the reference backend only.
        """
        arrays: dict[str, mx.array] = {}
        for part in self.layer.parts:
            if part.projection == projection:
                if self.on_gpu:
                    arrays[part.part] = self._arrays[projection, part.part][slot]
                    continue
                raw = mx.array(self.host_bytes(projection, part.part)[slot])
                arrays[part.part] = raw.view(MLX_DTYPES[part.dtype]).reshape(part.shape)
        return arrays

    def _buffer(self, part: ExpertPart, slot: int) -> np.ndarray | DeviceBytes:
        stack = self._bytes[part.projection, part.part]
        if isinstance(stack, DeviceBytes):
            return stack[slot * part.nbytes : (slot + 1) * part.nbytes]
        return stack[slot]


def allocate_pages(nbytes: int) -> mmap.mmap:
    """Return memory whose pages the system provides when they are first written."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, and fewer pieces for the drive
    return pages
