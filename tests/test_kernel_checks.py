"""All kernels, as compilers other than the stand-in's see them. What they compute: other tests."""

import pytest

import msl_cuda
import msl_spaces
import sanitized
from kernel_cases import cases, launches

CASES = [pytest.param(call, id=name) for name, call in cases()]


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
@pytest.mark.parametrize("call", CASES)
def test_address_spaces_mix(call):
    for kernel, arguments in launches(call):
        assert not msl_spaces.errors(kernel.metal, title=kernel.name, **arguments)


@pytest.mark.skipif(msl_cuda.toolkit() is None, reason="no NVRTC, or no MLX for CUDA")
@pytest.mark.parametrize("call", CASES)
def test_cuda_does_not_know_a_word(call):
    for kernel, arguments in launches(call):
        assert not msl_cuda.errors(kernel, **arguments)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_a_kernel_reads_where_it_may_not():
    done = sanitized.run("kernel_cases")
    assert done.returncode == 0, done.stdout + done.stderr
