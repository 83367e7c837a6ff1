"""Plants faults in the package's kernels for test_kernel_faults.py.

It is also a module of cases for sanitized.py: a call that reads past the end of a matrix and does
not use what it reads.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import msl_build
import msl_cpu
from expert_problems import Case, matvec_problem

from flashmoe_metal import kernel


@contextmanager
def planted(file: str, old: str, new: str, *, seed: int = 0, flags: tuple[str, ...] = ()):
    """Let the stand-in launch kernels in whose text `old` is replaced with `new`."""
    text = kernel.read_text

    def changed(path: str) -> str:
        return text(path).replace(old, new) if path == f"kernels/{file}" else text(path)

    def launch(k: kernel.Kernel, **call):
        # A new kernel, since a kernel keeps what it compiled.
        other = kernel.Kernel(k.name, k.inputs, k.outputs, k.helpers, **k.defines)
        return msl_cpu.launcher(seed=seed, flags=flags)(other, **call)

    assert old in text(f"kernels/{file}"), old
    with mock.patch.object(kernel, "read_text", changed), kernel.launched_by(launch):
        yield


def cases():
    problem = matvec_problem(Case())
    yield "sound", problem.call
    clamp = "rows.h", "first + r < last ? first + r : last", "first + r"

    def call():
        with planted(*clamp, flags=msl_build.SANITIZERS):
            return problem.call()

    yield "past the end", call
