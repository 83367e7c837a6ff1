"""All kernels, as compilers other than the stand-in's see them. What they compute: other tests."""

import mlx.core as mx
import pytest

import msl_cuda
import msl_spaces
import sanitized
from flashmoe_metal.kernel import launched_by
from kernel_cases import cases

CASES = [pytest.param(call, id=name) for name, call in cases()]


def launches(call) -> list[tuple]:
    """What a call launches, as (kernel, arguments); it gets zeros for results."""
    seen = []

    def launch(kernel, **arguments):
        seen.append((kernel, arguments))
        outputs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    with launched_by(launch):
        mx.eval(call())
    assert seen, "it launches no kernel"
    return seen


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
