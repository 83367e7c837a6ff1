"""Explain errors of the operating system that no other module has explained."""

from __future__ import annotations

import errno
import os

# Errors of a write, which name no file.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def explain(error: BaseException) -> str | None:
    """Return what is wrong with the machine, as one line; None if the error may be a bug.

    A pipe whose reader has ended is nothing wrong.
    """
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return (
            "the system starts no more threads: raise the limit on processes (ulimit -u, or the "
            "container's), or end other programs"
        )
    if not isinstance(error, OSError) or error.errno in (None, errno.EPIPE):
        return None
    what = error.strerror or str(error)
    if error.filename is not None:
        return f"{_readable(error.filename)}: {what}"
    if error.errno in _NOT_WRITTEN:
        return f"the output or a temporary file cannot be written: {what}; free some space"
    try:
        os.getcwd()
    except OSError:
        return "the working directory is not there any more: change to another one (cd)"
    return f"the system refused an operation: {what}"


def _readable(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
