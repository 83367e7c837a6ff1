"""Checks the address spaces of a kernel with Clang, as Apple's compiler does.

MLX passes small inputs as `constant` and others as `device`: a pointer that is right for one is an
error for the other. The stand-in runs a kernel on one memory and cannot notice that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import msl_source
from msl_build import HERE

#: The first version of Clang with half and bfloat for x86, which the check needs.
OLDEST = 17

PREFIX = """\
#define MSL_SPACES
#include <metal_stdlib>
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
"""


@cache
def clang() -> str | None:
    """Return a Clang that is new enough, or None: $CLANG, `clang++` or `clang++-NN`."""
    names = [os.environ.get("CLANG", ""), "clang++", *(f"clang++-{n}" for n in range(30, 16, -1))]
    return next((path for path in filter(None, map(shutil.which, names)) if _new(path)), None)


def _new(path: str) -> bool:
    ran = subprocess.run([path, "--version"], capture_output=True, text=True)
    version = re.search(r"clang version (\d+)", ran.stdout)
    # Apple numbers its versions differently, and there Metal itself is available.
    return bool(version) and "Apple" not in ran.stdout and int(version[1]) >= OLDEST


def errors(kernel, *, inputs: list[mx.array], title: str = "kernel", **call) -> str:
    """Return the errors that Clang reports about an `mx.fast.metal_kernel` for a call, or "".

    Args:
        title: the name of the kernel's text in messages.
        call: the other arguments of the call.
    """
    source = msl_source.source(kernel, inputs=inputs, **call)
    # The instantiation is kept, since a template's body is checked only with its arguments.
    text = source.text.replace(source.head, f'{source.head}\n#line 1 "{title}.metal"\n', 1)
    # Only static variables of a function may have an address space.
    text = msl_source.SHARED_ARRAY.sub(r"\1static threadgroup \2 \3\4;", text)
    text = re.sub(r"\[\[.*?\]\]", "", text)
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "kernel.cpp"
        file.write_text(f'{PREFIX}#line 1 "{title}.metal (header)"\n{text}')
        command = [clang(), "-std=c++17", "-fsyntax-only", "-w", f"-I{HERE}", str(file)]
        ran = subprocess.run(command, capture_output=True, text=True)
    return ran.stderr if ran.returncode else ""
