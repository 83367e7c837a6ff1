"""Compiles kernels for the CPU, and keeps the results for the next run of the tests."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "msl"
#: Flags of a build that stops the process at its first fault and describes the fault.
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
COMMON = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{HERE}")


@cache
def compiler() -> str | None:
    """Return the C++ compiler, or None: $CXX, else GCC, which is faster here, else Clang."""
    return next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None
    )


@cache
def library(cpp: str, flags: tuple[str, ...] = ()):
    """Return the function `run` of a kernel's C++ text (see `msl_source.to_cpp`).

    The test is skipped if there is no compiler.

    Raises:
        ValueError: The text does not compile.
    """
    cxx = compiler()
    if cxx is None:
        pytest.skip("the stand-in needs a C++ compiler: g++ or clang++")
    sanitizers = [f for f in flags if f.startswith("-fsanitize")]
    command = [cxx, *_flags("clang" in cxx), *flags]
    if "clang" not in cxx:
        # The headers take most of the time that it takes to compile a small kernel.
        headers = _built("metal_stdlib.gch", [*command, "-x", "c++-header"], _text("metal_stdlib"))
        command.insert(1, f"-I{headers.parent}")
    kernel = _built("kernel.o", [*command, "-c", "-x", "c++"], cpp)
    linked = [str(kernel), str(_lanes(cxx, bool(sanitizers))), *sanitizers]
    function = ctypes.CDLL(str(_built("kernel.so", [cxx, "-shared", *linked]))).run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    return function


def _flags(clang: bool) -> list[str]:
    """Return flags that make literals floats, as in Metal, and turn on checks.

    The checks report to lanes.cpp.
    """
    checks = "alignment,shift-exponent,integer-divide-by-zero"
    if clang:
        own = [f"-fsanitize=bounds,{checks}", "-Xclang", "-cl-single-precision-constant"]
    else:
        own = [f"-fsanitize=bounds-strict,{checks}", "-fsingle-precision-constant"]
        # Without this flag kernels share their static variables.
        own += ["-fno-gnu-unique"]
    return [*COMMON, "-ffp-contract=off", "-w", *own]


def _lanes(cxx: str, sanitized: bool) -> Path:
    """Return the object file of the lanes.

    It is compiled without sanitizers, which take seconds, since only kernels are checked.
    """
    more = ["-DMSL_SANITIZED"] if sanitized else []
    command = [cxx, *COMMON, "-U_FORTIFY_SOURCE", *more, "-c", "-x", "c++"]
    return _built("lanes.o", command, _text("lanes.cpp"))


@cache
def _text(name: str) -> str:
    return (HERE / name).read_text()


def cache_directory() -> Path:
    """Return the directory of compiled kernels, which only this user can read."""
    path = Path(tempfile.gettempdir()) / f"flashmoe-msl-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@cache
def _headers() -> str:
    return "".join(_text(p.name) for p in sorted(HERE.iterdir()) if p.suffix in ("", ".h"))


def _built(name: str, command: list[str], text: str = "") -> Path:
    """Return the file that a command makes of a text, from the cache if it is there.

    Several processes may build the same file at once; the first result is used.
    """
    key = hashlib.sha256("\0".join([*command, text, _headers()]).encode()).hexdigest()[:24]
    target = cache_directory() / key
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as d:
            output = Path(d) / "output"
            output.mkdir()
            if text:
                source = output / Path(name).stem
                source.write_text(text)
                command = [*command, str(source)]
            _compile([*command, "-o", str(output / name)])
            with suppress(OSError):  # another process was faster
                output.rename(target)
    return target / name


def _compile(command: list[str]):
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if "error" in line] or [ran.stderr]
        raise ValueError("\n".join(errors[:10]))
