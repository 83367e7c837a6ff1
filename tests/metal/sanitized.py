"""Runs kernels on the stand-in under AddressSanitizer, which ends the process at a fault.

python sanitized.py MODULE      # runs each case of MODULE.cases(); see kernel_cases.py
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import msl_build
import msl_cpu

from flashmoe_metal.kernel import launched_by


@cache
def library() -> str | None:
    """Return the library of GCC's AddressSanitizer, with which Python must be started, or None."""
    cxx = msl_build.compiler()
    if sys.platform != "linux" or cxx is None or "clang" in cxx:
        return None
    command = [cxx, "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def run(module: str) -> subprocess.CompletedProcess:
    """Run the cases of a module in a new process, whose stdout has their names as they begin."""
    options = "detect_leaks=0:allocator_may_return_null=1"
    env = {
        **os.environ,
        "LD_PRELOAD": library(),
        "ASAN_OPTIONS": options,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, __file__, module]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)


if __name__ == "__main__":
    # Compilers take nearly twice as long with it.
    os.environ.pop("LD_PRELOAD", None)
    for name, call in importlib.import_module(sys.argv[1]).cases():
        print(name, flush=True)
        with launched_by(msl_cpu.launcher(seed=1, flags=msl_build.SANITIZERS)):
            mx.eval(call())
