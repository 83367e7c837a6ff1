"""Let processes take turns at a file, and remove what writers that were killed left behind.

All locks are `flock`: the system releases them when a process ends, however it ends. Linux passes
them to the server of an NFS mount, so they also hold between hosts. A file system that has no locks
is used without them, and then nothing there counts as left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from time import monotonic, sleep, time

# Errors of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_POLL_SECONDS = 0.02
# In each directory of `temporary_directory`.
_LOCK_NAME = ".flashmoe.lock"
# The age at which a directory without a lock counts as left behind: its process was killed right
# after it had made the directory.
_STALE_SECONDS = 3600


def try_lock(fd: int) -> bool | None:
    """Lock a file without waiting.

    Returns:
        True: it is locked until the descriptor is closed. False: another process has the lock.
        None: its file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def locked(path: Path, *, seconds: float = 30) -> Iterator[None]:
    """Let no other process into such a block at the same time.

    Args:
        path: the lock file, which stays.
        seconds: how long to wait for another process.

    Raises:
        OSError: the file cannot be opened, or another process kept the lock (TimeoutError).
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = monotonic() + seconds
        while try_lock(fd) is False:
            if monotonic() > end:
                text = f"another process has kept it locked for {seconds:.0f} seconds"
                raise TimeoutError(errno.ETIMEDOUT, text, str(path))
            sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


@contextmanager
def locked_partial(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`, locked for as long as the block runs.

    Its name matches `partial_name`, and only the user may read it. The block renames or removes it.
    """
    while True:
        fd, name = tempfile.mkstemp(path.suffix, f".{path.stem}-", path.parent)
        try:
            # Another process may have taken it for left behind before it was locked.
            if try_lock(fd) is not False and os.fstat(fd).st_nlink:
                yield Path(name)
                return
        finally:
            os.close(fd)


def partial_name(stem: str, suffix: str) -> re.Pattern[str]:
    """Return the pattern of the names of partial files.

    Args:
        stem: a regex for the stem of the final name.
        suffix: the suffix of the final name.
    """
    return re.compile(rf"\.{stem}-[a-z0-9_]{{8}}{re.escape(suffix)}")


def remove_partials(directory: Path, name: re.Pattern[str]) -> None:
    """Remove the partial files that no process is writing any more. Raises nothing.

    Args:
        name: see `partial_name`; all of a file's name must match it.
    """
    for path in _matching(directory, name, S_ISREG):
        with suppress(OSError), open(path, "r+b") as f:
            if try_lock(f.fileno()):
                path.unlink()


@contextmanager
def temporary_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new private directory, and remove it afterwards.

    What killed processes left of the same prefix is removed first.

    Args:
        prefix: begins its name; no other program may use it.
        parent: where to make it. None: the system's directory of temporary files.

    Raises:
        OSError: it cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for left in _matching(parent, re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}"), S_ISDIR):
        with suppress(OSError):
            _remove_unless_used(left)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            with open(directory / _LOCK_NAME, "w") as lock:
                # As in `locked_partial`.
                if try_lock(lock.fileno()) is not False and os.fstat(lock.fileno()).st_nlink:
                    yield directory
                    return
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _remove_unless_used(directory: Path) -> None:
    try:
        fd = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if directory.stat().st_mtime < time() - _STALE_SECONDS:
            shutil.rmtree(directory)
        return
    try:
        if try_lock(fd):
            shutil.rmtree(directory)
    finally:
        os.close(fd)


def _matching(directory: Path, name: re.Pattern[str], is_kind: Callable[[int], bool]) -> list[Path]:
    """Return the user's own entries of a directory that are of a kind and whose names match."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(directory):
            if name.fullmatch(entry.name):
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_uid == os.geteuid() and is_kind(stat.st_mode):
                        found.append(Path(entry.path))
    return found
