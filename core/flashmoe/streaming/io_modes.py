"""Read bytes from a drive into buffers, through the page cache or past it. Knows no experts.

    buffered   through the page cache, which keeps the bytes
    uncached   through the page cache, which does not keep them (RWF_DONTCACHE of Linux 6.14, or
               dropped after the read; F_NOCACHE on macOS)
    direct     past the page cache (O_DIRECT; on macOS F_NOCACHE with whole blocks): the drive
               writes into the buffer itself if the buffer lies in blocks of memory as the range
               lies in blocks of the file (see `BLOCK`), and otherwise into an aligned buffer of
               each thread, from which the bytes are copied. Where the system has neither, the
               same as uncached

The last two are for slots that hold most of what is used again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

_RWF_DONTCACHE = 0x80
F_NOCACHE = 48
_O_DIRECT = getattr(os, "O_DIRECT", 0)
#: The alignment in bytes that drives require of addresses, offsets and lengths; some require 512. A
#: buffer whose address equals, modulo this, the offset of its bytes in the file is read without a
#: copy.
BLOCK = 4096
_BOUNCE_NBYTES = 1 << 20


class Buffered:
    """Opens files and reads ranges of them. Several threads may use one object."""

    def open(self, path: Path) -> int:
        """Open a file and return its descriptor, which the caller closes."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, buffer: Any, start: int) -> int:
        """Fill `buffer` from byte `start` on; return the bytes read, fewer at the file's end."""
        nbytes = memoryview(buffer).nbytes
        done = got = self._preadv(fd, buffer, start)
        while done < nbytes and got:
            rest = memoryview(buffer).cast("B")[done:]
            got = self._preadv(fd, rest, start + done)
            done += got
        return done

    def _preadv(self, fd: int, buffer: Any, start: int) -> int:
        return os.preadv(fd, [buffer], start)


class Uncached(Buffered):
    """Reads through the page cache, which does not keep the bytes.

    Attributes:
        flags: of preadv; they become 0 when a file system does not support them.
    """

    def __init__(self) -> None:
        self.flags = _RWF_DONTCACHE if sys.platform == "linux" else 0

    def open(self, path: Path) -> int:
        fd = super().open(path)
        if sys.platform == "darwin":
            fcntl.fcntl(fd, F_NOCACHE, 1)
        return fd

    def read(self, fd: int, buffer: Any, start: int) -> int:
        done = super().read(fd, buffer, start)
        if not self.flags and sys.platform == "linux":
            os.posix_fadvise(fd, start, memoryview(buffer).nbytes, os.POSIX_FADV_DONTNEED)
        return done

    def _preadv(self, fd: int, buffer: Any, start: int) -> int:
        if self.flags:
            try:
                return os.preadv(fd, [buffer], start, self.flags)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.flags = 0  # an older kernel, or a file system without it
        return super()._preadv(fd, buffer, start)


class Direct(Uncached):
    """Reads past the page cache.

    Attributes:
        direct: the descriptors that are open in this way; others are read as `Uncached` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direct: set[int] = set()
        self._of_thread = threading.local()

    def open(self, path: Path) -> int:
        if not _O_DIRECT:
            fd = super().open(path)
            if sys.platform == "darwin":
                # macOS copies a read through the page cache unless it is of whole blocks.
                self.direct.add(fd)
            return fd
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return super().open(path)  # a file system without it
        self.direct.add(fd)
        return fd

    def read(self, fd: int, buffer: Any, start: int) -> int:
        if fd not in self.direct:
            return super().read(fd, buffer, start)
        try:
            return self._read_aligned(fd, buffer, start)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        # The file was opened for direct reads, and cannot be read so.
        self.direct.discard(fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_DIRECT)
        return super().read(fd, buffer, start)

    def _read_aligned(self, fd: int, buffer: Any, start: int) -> int:
        """Read whole blocks into the bounce buffer, and copy the requested bytes from there."""
        bounce, blocks = self._bounce()
        wanted = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)
        done = 0
        if (wanted.__array_interface__["data"][0] - start) % BLOCK == 0:
            done = self._read_in_place(fd, wanted, start)
        while done < wanted.size:
            first = (start + done) // BLOCK * BLOCK
            skip = start + done - first
            length = min(_BOUNCE_NBYTES, -(-(skip + wanted.size - done) // BLOCK) * BLOCK)
            got = os.preadv(fd, [blocks[:length]], first)
            usable = min(got - skip, wanted.size - done)
            if usable <= 0:
                break  # the end of the file
            # Not by slices of memoryviews: they hold the interpreter's lock.
            np.copyto(wanted[done : done + usable], bounce[skip : skip + usable])
            done += usable
        return done

    def _read_in_place(self, fd: int, wanted: np.ndarray, start: int) -> int:
        """Read whole blocks straight into `wanted`, in one call.

        The blocks at its two ends, which it shares with its neighbours, go through the bounce
        buffer.

        Returns:
            How many bytes of `wanted`, from its start, are there without a gap.
        """
        bounce, blocks = self._bounce()
        skip = start % BLOCK
        head = min(-start % BLOCK, wanted.size)
        tail = (wanted.size - head) % BLOCK
        end = wanted.size - tail
        first = [blocks[:BLOCK]] if head else []
        last = [blocks[BLOCK : 2 * BLOCK]] if tail else []
        middle: Any = wanted[head:end]  # numpy's stubs know it as a buffer from Python 3.12 on
        got = os.preadv(fd, [*first, middle, *last], start - skip)
        done = max(0, min(got - skip, wanted.size))
        np.copyto(wanted[:head], bounce[skip : skip + head])
        if done > end:
            np.copyto(wanted[end:done], bounce[BLOCK : BLOCK + done - end])
        return done

    def _bounce(self) -> tuple[np.ndarray, memoryview]:
        """Return the aligned buffer of this thread, in two views."""
        if not hasattr(self._of_thread, "bounce"):
            blocks = memoryview(mmap.mmap(-1, _BOUNCE_NBYTES))
            self._of_thread.bounce = np.frombuffer(blocks, np.uint8), blocks
        return self._of_thread.bounce


#: The name of each mode and the class that reads so.
IO_MODES: dict[str, type[Buffered]] = {"buffered": Buffered, "uncached": Uncached, "direct": Direct}
