"""Tell whether other users of this machine could change what lies in a directory.

Compiled code that is loaded from a directory runs, and cached conversations are believed. So both
come only from directories in which nobody but the user and root can put anything.
"""

from __future__ import annotations

import atexit
import grp
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path


def other_writer(path: Path) -> str | None:
    """Return who else could change what is in a directory, as text; None: nobody could.

    Neither the directory nor one above it may belong to another user than root, and others may
    write only to those above it that are sticky, such as /tmp. What does not exist yet is left out.

    Raises:
        OSError: a directory cannot be looked at.
    """
    path = Path(os.path.realpath(path))
    for directory in (path, *path.parents):
        try:
            status = os.stat(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if status.st_uid not in (0, os.geteuid()):
            return f"{directory} belongs to user {status.st_uid}"
        shared = status.st_mode & stat.S_IWOTH or (
            status.st_mode & stat.S_IWGRP and not _own_group(status.st_gid)
        )
        if shared and (directory == path or not status.st_mode & stat.S_ISVTX):
            return f"others may write to {directory} ({stat.filemode(status.st_mode)})"
    return None


def make(path: Path) -> None:
    """Make a directory that nobody else may read, unless it exists.

    Raises:
        OSError: it cannot be made, or others could change what is in it (PermissionError).
    """
    for made in (False, True):  # before, so that nothing is left in another user's home directory
        if (why := other_writer(path)) is not None:
            raise PermissionError(why)
        if not made:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)


def temporary() -> Path:
    """Return a private directory among the temporary files: the same one for all of a user's runs.

    If somebody else took its name, it is another one, which is removed when this process ends.

    Raises:
        OSError: there is no place for temporary files, or others may change it.
    """
    parent = Path(tempfile.gettempdir())
    path = parent / f"flashmoe-{os.geteuid()}"
    try:
        path.mkdir(exist_ok=True, mode=0o700)
        if not path.is_symlink() and other_writer(path) is None:
            return path
    except FileExistsError:  # a file
        pass
    path = Path(tempfile.mkdtemp(prefix="flashmoe-", dir=parent))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    if (why := other_writer(path)) is not None:
        raise PermissionError(why)
    return path


def _own_group(gid: int) -> bool:
    """Return whether nobody but this user and root is in a group."""
    if gid == 0:
        return True
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
