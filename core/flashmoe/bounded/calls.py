"""Call a function in a helper process, which ends when the function takes too much.

There are two lanes, so that a call that takes long does not hold up those that do not: a call first
runs in the fast lane, and when it takes longer than all but a few do, again in the slow lane, which
has one process of low priority. Each group of functions has lanes of its own: a request that needs
only what one group does never waits for what others do. Processes start with the first call and are
kept.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from .. import errors
from ..errors import HelperError, LimitError
from .child import Work
from .process import HelperProcess, OutOfMemory, OutOfTime

log = logging.getLogger("flashmoe")

#: Processor seconds of a call in the fast lane. Ordinary calls take some milliseconds.
FAST_SECONDS = 0.2
#: Processor seconds and bytes of memory of a call, unless others are given.
SECONDS, NBYTES = 2.0, 1 << 30
#: Seconds for which a call waits for a process.
WAIT_SECONDS = 10.0
#: The groups of functions: what reads schemas, grammars and values, and what renders templates.
VALUES, TEMPLATES = "values", "templates"
FAST_PROCESSES, SLOW_PROCESSES, SLOW_NICENESS = 2, 1, 5
#: Characters of the text of an error.
MAX_CHARACTERS = 1000
#: Calls that were refused and are refused at once when they come again.
REFUSALS = 256


class _Lane:
    """Some processes, of which each runs one call at a time."""

    def __init__(self, count: int, niceness: int):
        self._free = threading.Semaphore(count)
        self._niceness = niceness
        self._idle: list[HelperProcess] = []
        self._all: set[HelperProcess] = set()
        self._modules: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def start(self, module: str) -> None:
        """Start a process that imports a module, unless there is one."""
        with self._lock:
            self._know(module)
            if not self._all:
                self._idle.append(self._new())

    def run(self, work: Work) -> dict[str, Any]:
        """Run a call in a free process.

        Raises:
            OutOfTime, OutOfMemory: the limit was reached.
            HelperError: no process can be started.
            LimitError: all processes stayed busy.
        """
        request = pickle.dumps(work)
        if not self._free.acquire(timeout=WAIT_SECONDS):
            raise LimitError(f"had to wait for other requests for {WAIT_SECONDS:g} seconds")
        try:
            with self._lock:
                self._know(work.module)
                process = self._idle_process() or self._new()
            try:
                return process.run(request, work.seconds, work.nbytes)
            finally:
                self._put_back(process)
        finally:
            self._free.release()

    def close(self) -> None:
        """End all processes. Calls in them are ended, too."""
        with self._lock:
            for process in self._all:
                process.kill()
            self._idle, self._all = [], set()

    def _know(self, module: str) -> None:
        if module not in self._modules:
            self._modules = (*self._modules, module)

    def _idle_process(self) -> HelperProcess | None:
        while self._idle:
            process = self._idle.pop()
            if process.alive():
                return process
            self._all.discard(process)  # killed by somebody, or by the system for its memory
        return None

    def _new(self) -> HelperProcess:
        process = HelperProcess(self._niceness, self._modules)
        self._all.add(process)
        return process

    def _put_back(self, process: HelperProcess) -> None:
        with self._lock:
            if process not in self._all:
                process.kill()  # the lane was closed meanwhile
            elif process.usable:
                self._idle.append(process)
            else:
                self._all.discard(process)
                with suppress(HelperError):  # the next call says so
                    # The next call finds a process that has imported what it needs.
                    self._idle.append(self._new())


class _Group:
    """The two lanes of a group of functions."""

    def __init__(self) -> None:
        self.fast = _Lane(FAST_PROCESSES, 0)
        self.slow = _Lane(SLOW_PROCESSES, SLOW_NICENESS)


class _Calls:
    """The lanes of this process, and the calls that were refused."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()
        self.refused: dict[bytes, str] = {}

    def group(self, name: str) -> _Group:
        """Return the lanes of a group."""
        with self._lock:
            return self._groups.setdefault(name, _Group())

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for group in self._groups.values():
                group.fast.close()
                group.slow.close()

    def refuse(self, key: bytes, text: str) -> LimitError:
        while len(self.refused) >= REFUSALS:
            self.refused.pop(next(iter(self.refused)), None)
        self.refused[key] = text
        return LimitError(text)


@lru_cache(maxsize=1)
def _calls() -> _Calls:
    calls = _Calls()
    atexit.register(close)
    return calls


# The processes of a parent do not belong to its forks.
os.register_at_fork(after_in_child=_calls.cache_clear)


def start(module: str, group: str = VALUES) -> None:
    """Start a process for functions of a module that will be called soon; do not wait for it.

    Raises:
        HelperError: no process can be started.
    """
    _calls().group(group).fast.start(module)


def call(
    function: Callable,
    *args: Any,
    seconds: float = SECONDS,
    nbytes: int = NBYTES,
    group: str = VALUES,
) -> Any:
    """Run a function of a module in a helper process, and return its value as JSON gives it.

    Args:
        args: can be pickled.
        seconds: processor seconds that it may take. Its imports are not counted.
        nbytes: memory that it may take.
        group: VALUES or TEMPLATES: the calls that it shares processes with.

    Raises:
        LimitError: it takes too much; the text begins with a verb, as in "takes more than 2 s".
        HelperError: no process can be started.
        FlashMoEError: the function raised it.
        SettingError: the arguments are nested too deeply.
    """
    calls = _calls()
    module, name = function.__module__, function.__qualname__
    try:
        data = pickle.dumps(args)
    except RecursionError as e:
        raise errors.SettingError("the request is nested too deeply: use flatter data") from e
    key = hashlib.sha256(f"{module} {name} ".encode() + data).digest()
    if key in calls.refused:
        raise LimitError(calls.refused[key])
    lanes = calls.group(group)
    try:
        try:
            fast = min(seconds, FAST_SECONDS)
            reply = lanes.fast.run(Work(module, name, data, fast, nbytes))
        except (OutOfTime, OutOfMemory) as e:
            # A process that broke may have been killed for what others did.
            if isinstance(e, OutOfTime) and seconds <= FAST_SECONDS:
                raise
            reply = lanes.slow.run(Work(module, name, data, seconds, nbytes))
    except OutOfTime:
        text = f"takes more than {seconds:g} seconds of processor time"
        raise calls.refuse(key, text) from None
    except OutOfMemory:
        raise calls.refuse(key, _memory(nbytes)) from None
    for level, text in reply["logged"]:
        log.log(level, "%s", text)
    if "value" in reply:
        return reply["value"]
    if "memory" in reply:
        raise calls.refuse(key, _memory(nbytes))
    if "error" in reply:
        raise getattr(errors, reply["error"])(_shorten(reply["text"]))
    raise RuntimeError(f"{module}.{name} failed in a helper process:\n{reply['fault']}")


def _shorten(text: str) -> str:
    """Cut the middle out of a long text: what a library quotes may be all of a hostile schema."""
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _memory(nbytes: int) -> str:
    return f"takes more than {nbytes / 2**30:g} GB of memory"


def close() -> None:
    """End all helper processes; calls under way raise HelperError. The next call starts others."""
    if _calls.cache_info().currsize:
        calls = _calls()
        _calls.cache_clear()
        calls.close()
        atexit.unregister(close)
