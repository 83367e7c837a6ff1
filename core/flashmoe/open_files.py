"""Keep mlx-lm from lowering the limits on open files, or from failing at them.

mlx-lm sets the limits to (2048, 4096) when it is imported. That is an error where the hard limit is
lower, as in some containers, and lowers it where it is higher, as a server needs it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

#: The number of open files to ask for; many systems begin with 256 or 1024.
WANTED = 4096

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


def watch_import() -> None:
    """Call `raise_limit` in place of what mlx-lm does, once it is imported."""
    if _SETS_LIMITS not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def _only_raised() -> Iterator[None]:
    """Let `resource.setrlimit` raise the limit on open files meanwhile, whatever it is asked for."""
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
                with _only_raised():
                    run(module)

            loader.exec_module = exec_module
        return spec
