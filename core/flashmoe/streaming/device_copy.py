"""Copy what was read into the memory of a discrete GPU, which a read cannot reach.

The bytes are read into a staging buffer in host memory, one for each reading thread, and copied
from there. The thread waits for its copy, so when a read has ended its bytes are in their slot, and
the code that submits reads and waits for them need not know. Knows no CUDA: see
`flashmoe.streaming.cuda`.
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

#: Bytes of a staging buffer. Longer ranges are read in pieces: one is copied while others are read,
#: and little memory is page-locked.
STAGING_NBYTES = 2 << 20


class DeviceMemory:
    """The memory of one device. Any number of threads may use one object."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def address(self, array: mx.array) -> int:
        """Return the address of an evaluated, contiguous array in the device's memory.

        The array stays there as long as the host does not look at it or at a slice of it: to let
        the host look, MLX moves an array into managed memory.
        """
        raise NotImplementedError

    def write(self, address: int, source: np.ndarray) -> None:
        """Copy `source` to an address, and return when the bytes are there.

        Raises:
            DeviceError: the copy failed.
        """
        raise NotImplementedError

    def lock(self, buffer: np.ndarray) -> None:
        """Page-lock a new staging buffer for fast copies, until `buffer` is garbage."""

    def mailbox(self, words: int) -> Mailbox | None:
        """Return a new mailbox, or None where the host may as well look at arrays."""
        return None

    def staging(self, start: int, nbytes: int) -> np.ndarray:
        """Return this thread's staging buffer for `nbytes` bytes from byte `start` of a file.

        It lies in blocks of memory as the range lies in blocks of the file, so that a drive can
        write into it; see `io_modes.BLOCK`.
        """
        if not hasattr(self._of_thread, "buffer"):
            # It begins and ends at a page.
            pages = np.frombuffer(mmap.mmap(-1, STAGING_NBYTES + BLOCK), np.uint8)
            self.lock(pages)
            self._of_thread.buffer = pages
        phase = start % BLOCK
        return self._of_thread.buffer[phase : phase + nbytes]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Host memory that kernels write to; the host sees the words when it has waited for the kernel.

    Attributes:
        words: (n,) uint32.
        address: (1,) uint64, the address of the words as kernels take it.
    """

    words: np.ndarray
    address: mx.array


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """A range of a device's memory, for a read in the place of a buffer.

    Attributes:
        owner: the object that keeps the memory allocated. A read holds it, so that its bytes never
            arrive in memory that was given to something else.
    """

    memory: DeviceMemory
    owner: Any
    address: int
    nbytes: int

    @classmethod
    def of(cls, memory: DeviceMemory, array: mx.array) -> DeviceBytes:
        """Return the bytes of an evaluated, contiguous array."""
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

    def staging(self, start: int) -> np.ndarray:
        """Return this thread's staging buffer for this range; see `DeviceMemory.staging`."""
        return self.memory.staging(start, self.nbytes)
