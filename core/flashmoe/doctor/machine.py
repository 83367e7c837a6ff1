"""What `flashmoe doctor` says of the machine and of what is installed. Imports nothing heavy."""

from __future__ import annotations

import getpass
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ..memory import system as memory

DISTRIBUTION = "llm-flashmoe"

#: What is installed besides flashmoe; MLX's back end on Linux is a package of its own.
PACKAGES = ("mlx", "mlx-lm", "numba", "llvmlite", "numpy", "llm", "langchain-core", "transformers")
BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")

_PREFIXES = ("FLASHMOE_", "MLX_", "NUMBA_", "GOMP_", "OMP_")
_NAMES = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "OPENBLAS_NUM_THREADS")
_NAMES += ("CUDA_VISIBLE_DEVICES",)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")

#: Of LLVM's names, those that the kernels use.
_FEATURES = ("avx2", "fma", "avx512f", "avx512vl", "avx512vnni", "avxvnni", "neon", "dotprod")

#: Limits on open files, soft and hard, that mlx-lm sets when it is imported.
MLX_LM_FILES = (2048, 4096)
#: Open files besides those of a checkpoint: those of Python, of llm's database, of a terminal.
OTHER_FILES = 64
#: For each shard: the reader's and, while the model is loaded, MLX's.
FILES_A_SHARD = 2


def versions() -> dict[str, str | None]:
    """Of flashmoe, of what it runs on, and of Python and the system; None: not installed."""
    found = {"flashmoe": _version(DISTRIBUTION)}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {name: version for name in BACKENDS if (version := _version(name))}
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return found | {"python": platform.python_version(), "system": system}


def unmet() -> list[str]:
    """What is installed in another version than flashmoe asks for, or not at all."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    found = []
    for needed in requirements:
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name}{needed.specifier} is needed, {version or 'none'} is here")
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that change what flashmoe does. Secrets are not shown."""
    return {
        name: "(set, not shown)" if _SECRET.search(name) else _IN_URL.sub("...@", value)
        for name, value in sorted(variables.items())
        if name.startswith(_PREFIXES) or name in _NAMES
    }


def memory_facts() -> dict:
    """total, available, default: bytes of the machine, that are left, and that a load takes when
    nothing is asked for. limit: what binds, "machine" or "cgroup"."""
    limit = "machine"
    if sys.platform == "linux":
        rooms = memory.available_by_limit()
        limit = min(rooms, key=rooms.get)
    free = memory.available()
    return {
        "total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available": free,
        "limit": limit,
        "default": memory.resident() + memory.default_budget(free),
    }


def open_files() -> dict:
    """soft, hard: limits on open files, None without one. shards: that a model may have.

    To be called before mlx-lm is imported, which sets MLX_LM_FILES, as this does: where the hard
    limit is lower, that import fails; then shards is 0.
    """
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, MLX_LM_FILES)
        shards = (MLX_LM_FILES[0] - OTHER_FILES) // FILES_A_SHARD
    except (OSError, ValueError):
        shards = 0
    return {"soft": soft, "hard": hard, "shards": shards}


def processor() -> dict:
    """cores: of the machine; usable: by this process. What numba compiles for, and how it runs."""
    import numba
    from numba.core.registry import cpu_target

    from ..ops.cpu import int8

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    has = {f[1:] for f in features.split(",") if f.startswith("+")}
    try:
        layer = numba.threading_layer()
    except ValueError:  # nothing was launched
        layer = None
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cores": os.cpu_count(),
        "usable": len(affinity(0)) if affinity else os.cpu_count(),
        "name": name,
        "features": [f for f in _FEATURES if f in has],
        "int8": int8.fastest(features),
        "numba threads": numba.get_num_threads(),
        "threading layer": layer,
    }


def anonymous(found):
    """The same facts without the user's name: its home is `~`, a directory of that name `USER`."""
    if isinstance(found, dict):
        return {name: anonymous(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [anonymous(value) for value in found]
    return _anonymous(found) if isinstance(found, str | Path) else found


def _anonymous(text: str | Path) -> str:
    text = str(text)
    home = Path.home()
    for path in {str(home), os.path.realpath(home)} - {"/"}:
        text = re.sub(re.escape(path) + r"(?![\w.-])", "~", text)
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return text
    return re.sub(rf"(?<=/){re.escape(name)}(?![\w.-])", "USER", text)
