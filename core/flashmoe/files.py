"""Replace files atomically, and ask how much space a disk has left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import locks
from .sizes import format_size

#: The suffix of a file that is not complete yet.
PARTIAL = ".partial"

# A directory on some network file systems cannot be synced; these errors say so.
_NO_DIRECTORY_SYNC = (errno.EBADF, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def replacing(path: Path, *, concurrent: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a partial file, which replaces `path` when the block ends.

    Other processes see the old file or all of the new one, never a part. When the block raises,
    the partial file is removed and `path` stays as it was.

    Args:
        concurrent: several processes may replace `path` at the same time, so the partial file gets
            a name of its own, only the user may read it, and it is locked meanwhile:
            `locks.remove_partials` removes what a killed process left. Otherwise the name is `path`
            + PARTIAL: what a killed process left there is overwritten by the next one, which
            matters for large files.
        durable: see `publish`.

    Raises:
        OSError: the file cannot be written.
    """
    with ExitStack() as stack:
        if concurrent:
            partial = stack.enter_context(locks.locked_partial(path))
        else:
            partial = path.with_name(path.name + PARTIAL)
        try:
            yield partial
            publish(partial, path, durable=durable)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def publish(partial: Path, path: Path, *, durable: bool = True) -> None:
    """Rename a complete file to its final name, replacing the file that has this name.

    Args:
        durable: sync the bytes to the disk before the rename, and the rename before returning, so
            that after a crash of the machine `path` is the old file or the complete new one. False
            saves the wait, for files whose content is verified when they are read.

    Raises:
        OSError: the file cannot be synced or renamed.
    """
    if not durable:
        os.replace(partial, path)
        return
    with open(partial, "rb") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes, *, concurrent: bool = False) -> None:
    """Replace the content of a file, as `replacing` does."""
    with replacing(path, concurrent=concurrent) as partial:
        partial.write_bytes(data)


def write_json(path: Path, content: object, *, concurrent: bool = False) -> None:
    """Replace a file by `content` as JSON, as `replacing` does."""
    write_bytes(path, json.dumps(content, indent=1).encode(), concurrent=concurrent)


def nearest_existing_parent(path: Path) -> Path:
    """Return `path` if it exists, else the nearest directory above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def free_nbytes(path: Path) -> int:
    """Return the bytes that are free on the disk of `path`, which need not exist."""
    return shutil.disk_usage(nearest_existing_parent(path)).free


def disk_too_full(path: Path, needed: int, free: int, way_out: str) -> str:
    """Return the error text for a disk with too little space.

    Args:
        path: the directory to be written.
        needed: bytes that will be written.
        free: bytes that are free, less than `needed`.
        way_out: what the user can do instead of freeing space, after "or".
    """
    return (
        f"{format_size(needed)} are needed in {path}, and its disk has {format_size(free)} free: "
        f"free {format_size(needed - free)}, or {way_out}"
    )
