"""How bytes get from a drive into buffers. Knows files, not experts.

    buffered   through the page cache, which keeps them
    uncached   through the page cache, which does not keep them (RWF_DONTCACHE of Linux 6.14, or
               dropped after the read; F_NOCACHE on macOS)
    direct     past the page cache (O_DIRECT): the drive writes into the buffer itself, if that lies
               in its blocks as the range lies in the file's (see `BLOCK`), else into an aligned
               buffer of each thread, from which it is copied. Where there is none, as uncached

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
#: What drives ask of addresses, offsets and lengths, in bytes: some ask for 512. A buffer whose
#: address is, modulo this, the offset of its bytes in the file is read without a copy.
BLOCK = 4096
_BOUNCE_NBYTES = 1 << 20


class Buffered:
    """Opens files and reads ranges of them. Several threads may use one."""

    def open(self, path: Path) -> int:
        """The descriptor of a file; who asks closes it."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, buffer: Any, start: int) -> int:
        """Fill `buffer` from the byte `start` on; how many there were, fewer at the file's end."""
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
    """flags: of preadv; 0 from when a file system says that it does not know them."""

    def __init__(self):
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
    """direct: the descriptors that are open so; others are read as `Uncached` does."""

    def __init__(self):
        super().__init__()
        self.direct: set[int] = set()
        self._of_thread = threading.local()

    def open(self, path: Path) -> int:
        if not _O_DIRECT:
            return super().open(path)
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
        # It was opened so, and cannot be read so.
        self.direct.discard(fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_DIRECT)
        return super().read(fd, buffer, start)

    def _read_aligned(self, fd: int, buffer: Any, start: int) -> int:
        """Whole blocks go to the bounce buffer; the bytes that were asked for, from there."""
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
        """One read: the blocks that `wanted` has whole arrive there, the two at its ends, which it
        shares with its neighbours, in the bounce buffer. Returns how many of its bytes are there
        without a gap."""
        bounce, blocks = self._bounce()
        skip = start % BLOCK
        head = min(-start % BLOCK, wanted.size)
        tail = (wanted.size - head) % BLOCK
        end = wanted.size - tail
        ends = [blocks[:BLOCK]] if head else [], [blocks[BLOCK : 2 * BLOCK]] if tail else []
        got = os.preadv(fd, [*ends[0], wanted[head:end], *ends[1]], start - skip)
        done = max(0, min(got - skip, wanted.size))
        np.copyto(wanted[:head], bounce[skip : skip + head])
        if done > end:
            np.copyto(wanted[end:done], bounce[BLOCK : BLOCK + done - end])
        return done

    def _bounce(self) -> tuple[np.ndarray, memoryview]:
        """The aligned buffer of this thread, in two views."""
        if not hasattr(self._of_thread, "bounce"):
            blocks = memoryview(mmap.mmap(-1, _BOUNCE_NBYTES))
            self._of_thread.bounce = np.frombuffer(blocks, np.uint8), blocks
        return self._of_thread.bounce


IO_MODES = {"buffered": Buffered, "uncached": Uncached, "direct": Direct}
