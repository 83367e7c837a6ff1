"""Load compiled code only if no other user of this machine can write it, and if it is up to date.

MLX on a CPU writes its compiled functions to $TMPDIR/mlx and loads whatever lies there under the
right name, whoever put it there; and a second user cannot write to the directory of the first. So
its compiling is turned off on a CPU, which costs no speed (docs/experiments.md) and changes no bit.
MLX on CUDA takes its directory from a variable. numba takes the first directory that it can write:
beside the package, else in the user's cache. It looks for changes in the module of a kernel alone,
while the kernels here are put together by several modules.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import private_dirs, user_dirs
from ..errors import SettingError
from ..sizes import format_size

log = logging.getLogger("flashmoe")

PTX_ENV = "MLX_PTX_CACHE_DIR"
NUMBA_ENV = "NUMBA_CACHE_DIR"
# The kernels of one CPU take some 5 MB.
_NEEDED_NBYTES = 32 * 2**20
_KERNELS = Path(__file__).parent / "cpu"


def protect_mlx() -> None:
    """Keep MLX from loading code that others may have written.

    It applies to all of this process, from now on: what was compiled before stays loaded.
    """
    if mx.default_device() == mx.cpu:
        mx.disable_compile()
    elif mx.cuda.is_available():
        asked = os.environ.get(PTX_ENV)
        if asked is None or _unfit(Path(asked)):
            os.environ[PTX_ENV] = str(_directory(PTX_ENV, asked) / "ptx")


def protect_numba() -> None:
    """Let numba keep the kernels that are defined from now on where others cannot write.

    Raises:
        SettingError: there is no such directory, or numba is told not to compile.
    """
    from numba.core import config as numba_config

    config: Any = numba_config  # it makes its names when it is imported
    if config.DISABLE_JIT:
        raise SettingError(
            "NUMBA_DISABLE_JIT is set, and the kernels only run when numba compiles them: unset it"
        )
    asked = config.CACHE_DIR or None
    if asked is None and _unfit(_KERNELS / "__pycache__") is None:
        return
    if asked is None or _unfit(Path(asked)):
        os.environ[NUMBA_ENV] = str(_directory(NUMBA_ENV, asked))
        config.reload_config()


def compare_all_sources() -> None:
    """Let numba compile a kernel of `ops.cpu` again when any source there has changed.

    It applies to kernels that are defined from now on.
    """
    from numba.core.caching import CacheImpl

    known: Any = CacheImpl
    known._locator_classes = [
        *(type(kind.__name__, (_AllSources, kind), {}) for kind in known._locator_classes),
        *known._locator_classes,
    ]


class _AllSources:
    """A mixin in front of numba's classes that say where a kernel is kept, and if it is old."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        if Path(py_file).parent != _KERNELS:
            return None
        return super().from_function(py_func, py_file)  # type: ignore[misc]  # of numba's class

    def get_source_stamp(self) -> str:
        return _sources_digest()


@cache
def _sources_digest() -> str:
    sources = sorted(_KERNELS.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _directory(variable: str, asked: str | None) -> Path:
    """Return a private directory for compiled code, and warn where it is not the usual one.

    Args:
        variable, asked: the environment variable that names the directory, and its value, which
            cannot be used.
    """
    reasons = [] if asked is None else [f"{variable}={asked}: {_unfit(Path(asked))}"]
    for find in (user_dirs.kernel_cache, private_dirs.temporary):
        try:
            path = find()
            why = _unfit(path)
        except (OSError, SettingError) as e:
            why = str(e)
        if why is None:
            if reasons:
                log.warning("compiled kernels are kept in %s (%s)", path, "; ".join(reasons))
            return path
        reasons.append(why)
    raise SettingError(
        f"there is no directory for compiled kernels ({'; '.join(reasons)}): set {variable} to one "
        f"that you alone may write, with {format_size(_NEEDED_NBYTES)} free"
    )


def _unfit(path: Path) -> str | None:
    """Return why compiled code cannot be kept in a directory; make it if it does not exist."""
    try:
        private_dirs.make(path)
        if any(entry.stat().st_uid not in (0, os.geteuid()) for entry in os.scandir(path)):
            return f"{path} holds files of another user"
        tempfile.TemporaryFile(dir=path).close()
        if (free := shutil.disk_usage(path).free) < _NEEDED_NBYTES:
            needed = format_size(_NEEDED_NBYTES)
            return f"{path} has {format_size(free)} free, and {needed} are needed"
    except OSError as e:
        return f"{path} cannot be used: {e.strerror or e}"
    return None
