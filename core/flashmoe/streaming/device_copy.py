"""Bytes that a read cannot reach, because they lie in the memory of a discrete GPU.

They are read into a place in the host's memory, one for each thread that reads, and copied from
there. The thread waits for its copy, so a read that has ended is a read whose bytes are in their
slot: who submits and waits for reads need not know. Knows no CUDA: see `flashmoe.streaming.cuda`.
"""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .io_modes import BLOCK

if TYPE_CHECKING:
    import mlx.core as mx

#: What a place holds. Longer ranges are read in pieces: one is copied while others are read, and
#: little memory is page-locked.
PLACE_NBYTES = 2 << 20


class DeviceMemory:
    """The memory of one device. Any number of threads may use one."""

    def __init__(self):
        self._of_thread = threading.local()

    def address(self, array: mx.array) -> int:
        """Where an evaluated, contiguous array lies. It stays there as long as the host does not
        look at the array or at a slice of it: for that, MLX moves it into managed memory."""
        raise NotImplementedError

    def write(self, address: int, source: np.ndarray) -> None:
        """Copy `source` to an address; returns when the bytes are there.

        Raises:
            DeviceError: they are not.
        """
        raise NotImplementedError

    def lock(self, place: np.ndarray) -> None:
        """Ready a new place for fast copies. It is unlocked when `place` is garbage."""

    def mailbox(self, words: int) -> Mailbox | None:
        """A new mailbox; None where the host may as well look at arrays."""

    def place(self, start: int, nbytes: int) -> np.ndarray:
        """This thread's place, for `nbytes` bytes that start at the byte `start` of their file. It
        lies in blocks as they do, so that a drive can write into it; see `io_modes.BLOCK`."""
        if not hasattr(self._of_thread, "place"):
            # Its first byte is that of a page, and its end is one, too.
            pages = np.frombuffer(mmap.mmap(-1, PLACE_NBYTES + BLOCK), np.uint8)
            self.lock(pages)
            self._of_thread.place = pages
        phase = start % BLOCK
        return self._of_thread.place[phase : phase + nbytes]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Words that kernels write for the host; it sees them when it has waited for the kernel.

    words: (n,) uint32. address: (1,) uint64, theirs, as kernels take it.
    """

    words: np.ndarray
    address: mx.array


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """A range of a device's memory; where a read can have a buffer, it can have one of these.

    owner: what keeps the memory. A read holds it, so that its bytes never arrive in memory that was
    given to something else.
    """

    memory: DeviceMemory
    owner: Any
    address: int
    nbytes: int

    @classmethod
    def of(cls, memory: DeviceMemory, array: mx.array) -> DeviceBytes:
        """The bytes of an evaluated, contiguous array."""
        return cls(memory, array, memory.address(array), array.nbytes)

    def __getitem__(self, part: slice) -> DeviceBytes:
        start, stop, step = part.indices(self.nbytes)
        if step != 1 or stop < start:
            raise IndexError(f"{part} of {self.nbytes} bytes is not a range")
        return replace(self, address=self.address + start, nbytes=stop - start)

    def __setitem__(self, part: slice, source: np.ndarray) -> None:
        target = self[part]
        if source.nbytes != target.nbytes:
            raise ValueError(f"{source.nbytes} bytes do not fill a range of {target.nbytes}")
        if source.nbytes:
            self.memory.write(target.address, np.ascontiguousarray(source))

    def place(self, start: int) -> np.ndarray:
        """Where this thread reads the bytes for this range; see `DeviceMemory.place`."""
        return self.memory.place(start, self.nbytes)
