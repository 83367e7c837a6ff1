"""All kernels, as compilers other than the stand-in's see them. What they compute: other tests."""

import mlx.core as mx
import msl_cuda
import msl_spaces
import pytest
import sanitized
from expert_problems import Case, Kind, down_problem
from kernel_cases import cases, launches

from flashmoe_metal.kernel import Kernel

CASES = [pytest.param(call, id=name) for name, call in cases()]


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
@pytest.mark.parametrize("call", CASES)
def test_address_spaces_mix(call):
    for kernel, arguments in launches(call):
        made = kernel.made("metal", arguments["inputs"])
        assert not msl_spaces.errors(made, title=kernel.name, **arguments)


@pytest.mark.skipif(msl_cuda.toolkit() is None, reason="no NVRTC, or no MLX for CUDA")
@pytest.mark.parametrize("call", CASES)
def test_cuda_does_not_know_a_word(call):
    for kernel, arguments in launches(call):
        assert not msl_cuda.errors(kernel, **arguments)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_a_kernel_reads_where_it_may_not():
    done = sanitized.run("kernel_cases")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_of_other_types_or_inputs_share_a_name(monkeypatch):
    """By its name CUDA's back end tells what it compiled. It is not here, so MLX only says it."""
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda name, **_: name)
    cases = [{}, {"shared": Kind(8), "gate": mx.bfloat16}, {"shared": Kind(8), "gate": mx.float16}]
    cases += [case | {"residual": dtype} for case in cases for dtype in (mx.bfloat16, mx.float16)]
    names = set()
    for case in cases:
        ((kernel, arguments),) = launches(down_problem(Case(**case)).call)
        # Another one, which has no kernel of this back end yet and keeps none.
        other = Kernel("down", kernel.inputs, ["y"], kernel.helpers, **kernel.defines)
        names.add(other.made("cuda", arguments["inputs"]))
    assert len(names) == len(cases)
