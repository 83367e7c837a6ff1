"""The program of a helper process: it runs one function after the other, within limits.

A request is a pickled `Work`, as the parent is trusted. A reply is JSON, since what ran on hostile
input is not. Each is a frame: 8 bytes with its length, then its bytes.

The limit of time counts processor time, so a busy machine does not make it shorter. The timer's
signal has no handler, so it ends the process also inside of C code that never returns.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO

from ..errors import FlashMoEError

_LENGTH = struct.Struct(">Q")
#: A process that has grown by this many bytes is replaced by a new one.
GROWTH_NBYTES = 256 << 20


@dataclass(frozen=True)
class Work:
    """A call for a helper process.

    Attributes:
        module, name: where the function is.
        args: its arguments, pickled.
        seconds: the limit of processor time. The import of the module is not counted.
        nbytes: the memory that the call may take.
    """

    module: str
    name: str
    args: bytes
    seconds: float
    nbytes: int


def write_frame(file: BinaryIO, data: bytes) -> None:
    """Write one frame.

    Raises:
        OSError: the other side is gone.
    """
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read_frame(file: BinaryIO) -> bytes | None:
    """Return the bytes of the next frame, or None when the other side is gone."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = file.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Answer requests on standard input until it is closed.

    The arguments of the process are its niceness, and modules to import before the first request.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    niceness, *modules = sys.argv[1:]
    os.nice(int(niceness))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The parent may have other ideas of the signal that ends a call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for module in modules:
        import_module(module)
    # What a function prints must not come between the replies, nor disturb the terminal.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    base = _resident_nbytes()
    while (request := read_frame(requests)) is not None:
        reply = _run(pickle.loads(request))
        grown = _resident_nbytes() - base > GROWTH_NBYTES
        write_frame(replies, json.dumps({**reply, "last": grown}).encode())


def _run(work: Work) -> dict[str, Any]:
    """Run a function; return its value, or the error that it raised, and what it logged."""
    function, args = getattr(import_module(work.module), work.name), pickle.loads(work.args)
    with _records() as records, _limits(work.seconds, work.nbytes):
        try:
            value = function(*args)
            json.dumps(value)
            reply = {"value": value}
        except FlashMoEError as e:
            reply = {"error": type(e).__name__, "text": str(e)}
        except MemoryError:
            reply = {"memory": True}
        except BaseException:  # a panic of a Rust library is no Exception
            reply = {"fault": traceback.format_exc()}
    logged = [(r.levelno, r.getMessage()) for r in records]
    return {**reply, "logged": logged}


@contextmanager
def _limits(seconds: float, nbytes: int) -> Iterator[None]:
    """End the process when the block takes more processor time; refuse it more memory."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _address_space() + nbytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    # macOS does not take it; there the parent looks at the process.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


@contextmanager
def _records() -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged meanwhile, for the parent to log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    log = logging.getLogger("flashmoe")
    log.addHandler(handler)
    try:
        yield records
    finally:
        log.removeHandler(handler)


def _address_space() -> int:
    """Return the bytes of this process's address space, 0 where /proc is missing."""
    return _statm(0)


def _resident_nbytes() -> int:
    """Return the bytes of memory of this process, 0 where /proc is missing."""
    return _statm(1)


def _statm(field: int) -> int:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[field]) * resource.getpagesize()
    except OSError:
        return 0
