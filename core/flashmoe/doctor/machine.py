"""Collect facts about this machine and what is installed. Nothing heavy is imported."""

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
from typing import Any

from ..memory import system
from ..process_limits import raise_limit

DISTRIBUTION = "llm-flashmoe"

#: The packages whose versions are reported. MLX's back end on Linux is a package of its own.
PACKAGES = ("mlx", "mlx-lm", "numba", "llvmlite", "numpy", "llm", "langchain-core", "transformers")
BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")

_PREFIXES = ("FLASHMOE_", "MLX_", "NUMBA_", "GOMP_", "OMP_")
_NAMES = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")

#: The CPU features that the kernels use, as LLVM names them.
_FEATURES = ("avx2", "fma", "avx512f", "avx512vl", "avx512vnni", "avxvnni", "neon", "dotprod")

#: Open files that are not a checkpoint's: Python's, llm's database, the terminal.
OTHER_FILES = 32
#: Open files per shard: the reader's and, while the model is loaded, MLX's.
FILES_PER_SHARD = 2


def versions() -> dict[str, str | None]:
    """Return the versions of flashmoe, its packages, Python and the system.

    The version of a package that is not installed is None; MLX's back ends are then left out.
    """
    installed = {"flashmoe": _version(DISTRIBUTION)}
    installed |= {name: _version(name) for name in PACKAGES}
    installed |= {name: version for name in BACKENDS if (version := _version(name))}
    running_on = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "darwin":
        running_on = f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return installed | {"python": platform.python_version(), "system": running_on}


def unmet() -> list[str]:
    """Return the requirements of flashmoe that are not met, each with what is installed."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    problems = []
    for needed in requirements:
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            installed = f"{version} is installed" if version else "it is not installed"
            problems.append(f"{needed.name}{needed.specifier} is needed, but {installed}")
    return problems


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that change what flashmoe does, with secrets replaced."""
    return {
        name: "(set, not shown)" if _SECRET.search(name) else _IN_URL.sub("...@", value)
        for name, value in sorted(variables.items())
        if name.startswith(_PREFIXES) or name in _NAMES
    }


def memory_facts(working_set: int | None = None) -> dict[str, Any]:
    """Return the memory of the machine.

    Args:
        working_set: bytes that Metal recommends to use at most, on a Mac's GPU.

    Returns:
        total, available: bytes of the machine, and bytes that are free. limit: which limit is the
        lowest, "machine" or "cgroup". default: bytes of the process with a model that is loaded
        without a memory limit.
    """
    limit = "machine"
    if sys.platform == "linux":
        available_by_limit = system.available_by_limit()
        limit = min(available_by_limit, key=lambda name: available_by_limit[name])
    return {
        "total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available": system.available(),
        "limit": limit,
        "default": system.default_total(system.resident(), working_set),
    }


def open_files() -> dict[str, int | None]:
    """Return the limits on open files, and raise the soft one as a load does.

    Returns:
        soft, hard: the limits, None without one. raised: the soft limit afterwards. shards: how
        many shards a model may have.
    """
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    raised = raise_limit()
    shards = max(0, raised - OTHER_FILES) // FILES_PER_SHARD
    return {"soft": soft, "hard": hard, "raised": raised, "shards": shards}


def processor() -> dict[str, Any]:
    """Return what numba compiles for, and how it runs.

    Returns:
        cores, usable: the number of cores of the machine, and that this process may use. name,
        features: the CPU and its features, as LLVM names them. int8: the instructions of int8
        kernels. numba threads, threading layer: how kernels run in parallel; the layer is None
        before the first one.
    """
    import numba
    from numba.core.registry import cpu_target

    from ..ops.cpu import int8

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    has = {f[1:] for f in features.split(",") if f.startswith("+")}
    try:
        layer = numba.threading_layer()
    except ValueError:  # no kernel has run in parallel yet
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


def anonymous(value: Any) -> Any:
    """Return the same value without the user's name in any text.

    The home directory becomes `~`, and another directory with the user's name becomes `USER`.
    """
    if isinstance(value, dict):
        return {name: anonymous(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(item) for item in value]
    return _anonymous_text(value) if isinstance(value, str | Path) else value


def _anonymous_text(value: str | Path) -> str:
    text = str(value)
    home = os.path.expanduser("~")  # which stays as it is for a user without one
    for path in {home, os.path.realpath(home)} - {"/", "~"}:
        text = re.sub(re.escape(path) + r"(?![\w.-])", "~", text)
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<=/){re.escape(name)}(?![\w.-])", "USER", text)
