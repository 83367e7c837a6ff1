"""Tell whether an open file is still the file that it was when its header was read."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What distinguishes a file, as it was at one moment, from what is at its path later.

    Attributes:
        linked: the file had a name in some directory.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    linked: bool

    @classmethod
    def from_fd(cls, fd: int) -> FileIdentity:
        """Return the identity of an open file, as it is now."""
        stat = os.fstat(fd)
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_nlink > 0)

    def change(self, fd: int) -> str | None:
        """Compare with the open file `fd`.

        Returns:
            The words for what happened to the file since, such as "was written to". None: nothing
            happened.
        """
        stat = os.fstat(fd)
        # A file that was replaced by a rename is an unlinked one behind our descriptor.
        unlinked = self.linked and stat.st_nlink == 0
        if unlinked or (stat.st_dev, stat.st_ino) != (self.device, self.inode):
            return "was deleted or replaced"
        if stat.st_size != self.nbytes:
            return f"changed its size from {self.nbytes} to {stat.st_size} bytes"
        if stat.st_mtime_ns != self.mtime_ns:
            return "was written to"
        return None
