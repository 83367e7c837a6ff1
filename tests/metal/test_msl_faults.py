"""Tests that the stand-in for Metal, Clang, NVRTC and AddressSanitizer notice faulty kernels."""

import sys

import mlx.core as mx
import msl_build
import msl_cpu
import msl_cuda
import msl_spaces
import numpy as np
import pytest
import sanitized
from kernel_cases import launches
from toy_kernel import TOLERANCE, launch, matvec, multiply, problem

from flashmoe_metal.kernel import launched_by

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kernels run on Metal itself"),
    pytest.mark.skipif(msl_build.compiler() is None, reason="no C++ compiler"),
]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUM = "sum = simd_sum(sum);"


def product(kernel, arguments, *, seed=0, **options) -> np.ndarray:
    with launched_by(msl_cpu.launcher(seed=seed, **options)):
        return np.array(multiply(kernel, *arguments).astype(mx.float32))


def error(*changes, seed=0, dtype=mx.float32) -> float:
    """Return the relative error of the matvec with these faults; inf if a result is NaN."""
    arguments, exact = problem(dtype=dtype)
    result = product(matvec(*changes), arguments, seed=seed)
    return float(np.nan_to_num(np.abs(result - exact).max() / np.abs(exact).max(), nan=np.inf))


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    "change",
    [
        ("(4 * j)", "(4 * (j ^ 1))"),
        ("i < K / 8", "i < K / 8 + 32"),
        ("row * (K / G);\nauto bias", "(row + 1) * (K / G);\nauto bias"),
        # The memory is unwritten. Here it is not zero, as it often is on a GPU.
        (
            "if (lane == 0) {\n  partial[simd] = sum;",
            "if (lane == 0 && simd) {\n  partial[simd] = sum;",
        ),
        ("y[row] = static_cast<T>(sum);", ""),
    ],
    ids=["wrong nibble", "past the row", "wrong row", "unwritten threadgroup memory", "no output"],
)
def test_wrong_result_is_noticed(change, seed):
    assert error(change, seed=seed) > 1e-3


def test_read_past_the_end_gives_nan():
    assert error(("auto xs = x + i * 8;", "auto xs = x + i * 8 + 1;")) == np.inf


def test_missing_barrier_changes_the_result():
    # The fault may go unnoticed where lanes run in their order, so tests shuffle them.
    assert max(error((BARRIER, ""), seed=seed) for seed in (0, 1, 2)) > 1e-3


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((SUM, f"if (lane < 16) {SUM}"), r"never come: 64 at simd_sum \(matvec.metal:28\), 64 at"),
        ((SUM, "sum = lane < 16 ? simd_max(sum) :\n simd_sum(sum);"),
         r"one group meet at simd_\w+ .* and at simd_"),
        ((BARRIER, f"if (simd != 1) {BARRIER}"), r"never come: .*96 at threadgroup_barrier \("),
        ((SUM, f"if (lane > 30) return;\n{SUM}"), r"never come: .*4 that returned"),
        ((SUM, f"if (simd == 2) return;\n{SUM}"), r"never come: .*32 that returned"),
        (("? partial[lane] :", "? partial[lane + 1] :"), r"outside an array \(matvec.metal:33\)"),
        (("y[row] =", "y[row * 2] ="), "a write past the end of y"),
        (("y[row] =", "y[int(row) - 1] ="), "a write before the beginning of y"),
        (("y[row] =", "y[row << 28] ="), "an access outside all memory"),
        (("y[row] =", "const_cast<device T&>(x[row]) ="), "a write to the input x"),
        (("SIMDS];", "9000];"), "36000 bytes of threadgroup memory, of at most 32768"),
        (("auto xs = x + i * 8;", "auto xs = x + i * 8; auto odd = words + 1;\n"
          "sum += float((*(const device uint4*)(odd)).x);"), "a misaligned access"),
        (("(4 * j)", "(4 * j + 4)"), "a shift by more than a word's bits"),
        (("i * 8 / G]) * product", "i * 8 / (G * (i - i))]) * product"), "integers by zero"),
    ],
)  # fmt: skip
def test_fault_raises_kernel_error(change, what, seed):
    with pytest.raises(msl_cpu.KernelError, match=what):
        error(change, seed=seed)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("simd_sum(sum);", "simd_total(sum);"), "simd_total"),
        (("float product", "double product"), "double|poisoned"),
        (
            ("threadgroup float partial[SIMDS];", "threadgroup float partial[SIMDS * 2], more[2];"),
            "one",
        ),
    ],
)
def test_code_that_metal_refuses_does_not_compile(change, what):
    with pytest.raises(ValueError, match=what):
        error(change)


@pytest.mark.parametrize("index", [4, -1])
def test_write_outside_a_threadgroup_array_raises_kernel_error(index):
    """The write goes through a pointer, where the compiler cannot see the length of the array."""
    body = f"""
      threadgroup float shared[4];
      threadgroup float* p = shared;
      p[{index} + int(thread_index_in_simdgroup / 32)] = 1;
      y[thread_position_in_grid.x] = shared[0];
    """
    with (
        launched_by(msl_cpu.launcher()),
        pytest.raises(msl_cpu.KernelError, match="a write outside a threadgroup array"),
    ):
        launch(body, {}, {"y": ((32,), mx.float32)})


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
def test_clang_reports_a_device_pointer_to_constant_memory():
    kernel = matvec(("auto scale =", "const device T* scale ="))
    assert not clang_errors(lambda: multiply(kernel, *problem()[0]))
    few = problem(rows=1, width=128)[0]
    assert clang_errors(lambda: multiply(kernel, *few)).startswith("matvec.metal:13:")


def clang_errors(call) -> str:
    """Return the errors that Clang reports about the one kernel that a call launches."""
    ((kernel, arguments),) = launches(call)
    built = kernel.built_for("metal", arguments["inputs"])
    return msl_spaces.errors(built, title=kernel.name, **arguments)


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
def test_clang_accepts_vectors_in_each_address_space():
    """Correct code must pass the check: vectors from and to memory of each kind."""
    body = """
      threadgroup float4 shared[2 * 1];
      threadgroup float4* p = shared;
      auto xs = (const device float4*)(x);
      p[0] = xs[0] * 2.0f + float4(1, 2, 3, 4) + float4(half4(1.0f));
      p[1] = float4(p[0].xy, float2(few[0], few[1]));
      *(device uint2*)(y) = *(const device uint2*)(x) >> 1;
      *(device float2*)(y + 2) = float2(dot(p[0], p[1]), simd_max(p[1].x));
    """
    for dtype in TOLERANCE:
        inputs = {"x": mx.zeros(32), "few": mx.zeros(3, dtype)}
        outputs = {"y": ((32,), mx.float32)}
        assert not clang_errors(lambda i=inputs, o=outputs: launch(body, i, o))


@pytest.mark.skipif(msl_cuda.toolkit() is None, reason="no NVRTC, or no MLX for CUDA")
def test_nvrtc_reports_a_word_that_only_metal_knows():
    kernel = matvec(("float sum = 0;", "float sum = metal::sinpi(0.0f);"))
    ((kernel, arguments),) = launches(lambda: multiply(kernel, *problem()[0]))
    assert "metal" in msl_cuda.errors(kernel, **arguments)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_address_sanitizer_notices_a_read_past_the_end():
    done = sanitized.run("planted_cases")
    assert done.stdout.split("\n")[:2] == ["sound", "past the end"], done.stderr
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "matvec.metal:16" in done.stderr
