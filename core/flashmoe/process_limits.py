"""Prepare this process for MLX and mlx-lm: open files, standard streams, threads.

mlx-lm sets the limits on open files to (2048, 4096) when it is imported. That is an error where the
hard limit is lower, as in some containers, and lowers it where it is higher, as a server needs it.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .errors import SettingError

#: The number of open files to ask for; many systems begin with 256 or 1024.
WANTED = 4096

# Threads of the engine and its reads; per core: those of MLX, numba and the tokenizer.
_THREADS, _THREADS_PER_CORE = 24, 2

_SETS_LIMITS = "mlx_lm.utils"


def raise_limit(set_limit: Callable[[int, tuple[int, int]], None] = resource.setrlimit) -> int:
    """Raise the soft limit on open files to WANTED, as far as the hard limit allows.

    Args:
        set_limit: the system's setrlimit.

    Returns:
        The soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft
    set_limit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def fill_standard_streams() -> None:
    """Open the null device in place of a standard stream that is closed.

    Otherwise the next file that is opened takes its place. MLX cannot read a file that took the
    place of standard input, and errors would be written into one that took that of standard error.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


@functools.cache
def check_threads() -> None:
    """Check that as many threads can run as a model needs.

    Libraries end the process, wait for ever or blame the model when they cannot start a thread.

    Raises:
        SettingError: they cannot.
    """
    count = _THREADS + _THREADS_PER_CORE * (os.cpu_count() or 1)
    end = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as e:
        raise SettingError(
            f"this process may start {len(threads)} threads, and a model needs {count}: raise the "
            "limit on processes (ulimit -u, or the container's), or end other programs"
        ) from e
    finally:
        end.set()
        for thread in threads:
            thread.join()


def watch_import() -> None:
    """Call `raise_limit` in place of what mlx-lm does, once it is imported."""
    if _SETS_LIMITS not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def _only_raised() -> Iterator[None]:
    """Let `resource.setrlimit` only raise the limit on open files, whatever it is asked for."""
    real = resource.setrlimit

    def set_limit(which: int, limits: tuple[int, int]) -> None:
        if which == resource.RLIMIT_NOFILE:
            raise_limit(real)
        else:
            real(which, limits)

    resource.setrlimit = set_limit
    try:
        yield
    finally:
        resource.setrlimit = real


class _Finder(MetaPathFinder):
    """Finds the module that sets the limits, and runs it inside of `_only_raised`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _SETS_LIMITS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                fill_standard_streams()
                with _only_raised():
                    run(module)

            loader.exec_module = exec_module
        return spec
