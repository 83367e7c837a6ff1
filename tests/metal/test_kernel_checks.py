"""Tests that all kernels compile with Clang and NVRTC and run clean under AddressSanitizer."""

import mlx.core as mx
import msl_cuda
import msl_spaces
import pytest
import sanitized
from expert_problems import Case, Kind, down_problem
from kernel_cases import cases, cuda_cases, launches

from flashmoe_metal.kernel import Kernel

CASES = [pytest.param(call, id=name) for name, call in cases()]
CUDA_CASES = [pytest.param(call, id=name) for name, call in cuda_cases()]


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
@pytest.mark.parametrize("call", CASES)
def test_address_spaces_are_right(call):
    for kernel, arguments in launches(call):
        built = kernel.built_for("metal", arguments["inputs"])
        assert not msl_spaces.errors(built, title=kernel.name, **arguments)


@pytest.mark.skipif(msl_cuda.toolkit() is None, reason="no NVRTC, or no MLX for CUDA")
@pytest.mark.parametrize("call", CASES + CUDA_CASES)
def test_kernel_compiles_for_cuda(call):
    for kernel, arguments in launches(call):
        assert not msl_cuda.errors(kernel, **arguments)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_kernels_run_clean_under_address_sanitizer():
    done = sanitized.run("kernel_cases")
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_variant_of_down_has_its_own_cuda_name(monkeypatch):
    """MLX's CUDA back end caches kernels by name. A stub of it shows the names without a GPU."""
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda name, **_: name)
    cases = [{}, {"shared": Kind(8), "gate": mx.bfloat16}, {"shared": Kind(8), "gate": mx.float16}]
    cases += [case | {"residual": dtype} for case in cases for dtype in (mx.bfloat16, mx.float16)]
    names = set()
    for case in cases:
        ((kernel, arguments),) = launches(down_problem(Case(**case)).call)
        # A new kernel, which has not been built for this back end yet.
        fresh = Kernel("down", kernel.inputs, ["y"], kernel.helpers, **kernel.defines)
        names.add(fresh.built_for("cuda", arguments["inputs"]))
    assert len(names) == len(cases)
