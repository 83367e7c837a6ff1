"""Tells whether an open file is still the file that it was when its header was read."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells a file, as it was at one moment, from what stands at its path later."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    linked: bool  # it has a name in some directory

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """The identity of an open file."""
        now = os.fstat(fd)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_nlink > 0)

    def change(self, fd: int) -> str | None:
        """What happened to the file to make it the open file `fd`, in words. None: nothing."""
        now = os.fstat(fd)
        # A file that was replaced by a rename is an unlinked one behind our descriptor.
        unlinked = self.linked and now.st_nlink == 0
        if unlinked or (now.st_dev, now.st_ino) != (self.device, self.inode):
            return "was deleted or replaced"
        if now.st_size != self.nbytes:
            return f"changed its size from {self.nbytes} to {now.st_size} bytes"
        if now.st_mtime_ns != self.mtime_ns:
            return "was written to"
        return None
