"""The stand-in for Metal notices the faults that kernels have, and computes as MLX's kernels do."""

import importlib
import sys
from pathlib import Path

import mlx
import mlx.core as mx
import numpy as np
import pytest

import msl_build
import msl_cpu
import msl_cuda
import msl_spaces
import sanitized
from flashmoe_metal.kernel import launched_by
from toy_kernel import TextKernel, matvec, multiply, problem

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kernels run on Metal itself"),
    pytest.mark.skipif(msl_build.compiler() is None, reason="no C++ compiler"),
]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUM = "sum = simd_sum(sum);"
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def product(kernel, arguments, *, seed=0, **options) -> np.ndarray:
    with launched_by(msl_cpu.launcher(seed=seed, **options)):
        return np.array(multiply(kernel, *arguments).astype(mx.float32))


def error(*changes, seed=0, dtype=mx.float32) -> float:
    """Of the matvec with these faults, over the largest value; NaN is infinitely wrong."""
    arguments, exact = problem(dtype=dtype)
    found = product(matvec(*changes), arguments, seed=seed)
    return float(np.nan_to_num(np.abs(found - exact).max() / np.abs(exact).max(), nan=np.inf))


def launch(body: str, inputs: dict[str, mx.array], outputs: dict, *, lanes=32, groups=1, **options):
    """One launch of a kernel in a line. outputs: {name: (shape, dtype)}."""
    shapes, dtypes = zip(*outputs.values(), strict=True)
    kernel = TextKernel("line", list(inputs), list(outputs), body)
    return msl_cpu.run(
        kernel.metal,
        inputs=list(inputs.values()),
        grid=(lanes * groups, 1, 1),
        threadgroup=(lanes, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
        **options,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sound_kernel_fails(dtype):
    arguments, exact = problem(dtype=dtype)
    first = product(matvec(), arguments)
    assert np.abs(first - exact).max() < TOLERANCE[dtype] * np.abs(exact).max()
    for seed in (1, 2, 3):
        np.testing.assert_array_equal(first, product(matvec(), arguments, seed=seed))


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    "change",
    [
        ("(4 * j)", "(4 * (j ^ 1))"),
        ("i < K / 8", "i < K / 8 + 32"),
        ("row * (K / G);\nauto bias", "(row + 1) * (K / G);\nauto bias"),
        # Nobody has written it: it is not zero, as it often is on a GPU.
        (
            "if (lane == 0) {\n  partial[simd] = sum;",
            "if (lane == 0 && simd) {\n  partial[simd] = sum;",
        ),
        ("y[row] = static_cast<T>(sum);", ""),
    ],
    ids=["wrong nibble", "past the row", "wrong row", "unwritten threadgroup memory", "no output"],
)
def test_a_wrong_result_passes(change, seed):
    assert error(change, seed=seed) > 1e-3


def test_a_missing_barrier_passes():
    # It may pass where lanes run in order; so tests shuffle.
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
def test_a_fault_passes(change, what, seed):
    with pytest.raises(msl_cpu.KernelError, match=what):
        error(change, seed=seed)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("simd_sum(sum);", "simd_total(sum);"), "simd_total"),
        (("float product", "double product"), "double|poisoned"),
        (
            ("threadgroup float partial[SIMDS];", "threadgroup float partial[SIMDS], more[2];"),
            "one",
        ),
    ],
)
def test_what_metal_does_not_know_compiles(change, what):
    with pytest.raises(ValueError, match=what):
        error(change)


def test_a_threadgroup_array_is_overrun():
    """Through a pointer, where the compiler does not see how long the array is."""
    body = """
      threadgroup float shared[4];
      threadgroup float* p = shared;
      p[lanes + int(thread_index_in_simdgroup / 32)] = 1;
      y[thread_position_in_grid.x] = shared[0];
    """
    for index in ("4", "-1"):
        with pytest.raises(msl_cpu.KernelError, match="a write outside a threadgroup array"):
            launch(body.replace("lanes", index), {}, {"y": ((32,), mx.float32)})


INTEGERS = [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, *TOLERANCE, mx.bool_])
def test_a_type_is_passed_wrongly(dtype):
    many, few = mx.arange(-20, 20).astype(dtype), mx.array([3, 0, 1]).astype(dtype)
    one = mx.array(7).astype(dtype)
    body = """
      uint i = thread_position_in_grid.x;
      y[i] = i < 40 ? many[i] : i < 43 ? few[i - 40] : one;
    """
    inputs = {"many": many, "few": few, "one": one}
    (y,) = launch(body, inputs, {"y": ((4, 11), dtype)}, lanes=44)
    assert y.dtype == dtype
    assert mx.array_equal(y.reshape(-1), mx.concatenate([many, few, one[None]]))


def test_shapes_are_passed_wrongly():
    body = """
      uint i = thread_position_in_grid.x;
      y[i] = i < 3 ? x_shape[i] : i < 6 ? int(x_strides[i - 3]) : i < 7 ? x_ndim : e_shape[i - 7];
    """
    inputs = {"x": mx.zeros((2, 3, 5)).transpose(0, 2, 1), "e": mx.zeros((2, 0), mx.int8)}
    (y,) = launch(body, inputs, {"y": ((9,), mx.int32)}, lanes=9)
    assert y.tolist() == [2, 5, 3, 15, 3, 1, 3, 2, 0]


def test_lanes_stand_elsewhere():
    """A grid that ends within a threadgroup, in two dimensions."""
    body = """
      uint3 at = thread_position_in_grid;
      y[at.y * 10 + at.x] = thread_index_in_threadgroup + 100 * threads_per_threadgroup.x
        + 1000 * threadgroup_position_in_grid.x + 10000 * simd_sum(1u)
        + 1000000 * thread_position_in_threadgroup.y + 10000000 * threadgroups_per_grid.x;
    """
    kernel = TextKernel("places", [], ["y"], body)
    call = {"grid": (10, 3, 1), "threadgroup": (8, 2, 1), "inputs": []}
    call |= {"output_shapes": [(3, 10)], "output_dtypes": [mx.uint32]}
    expected = np.zeros((3, 10))
    for j, i in np.ndindex(3, 10):
        width, height = min(8, 10 - i // 8 * 8), min(2, 3 - j // 2 * 2)
        index = j % 2 * width + i % 8
        expected[j, i] = index + 100 * width + 1000 * (i // 8) + 10000 * width * height
        expected[j, i] += 1000000 * (j % 2) + 10000000 * 2
    for seed in (0, 1):
        np.testing.assert_array_equal(msl_cpu.run(kernel.metal, seed=seed, **call)[0], expected)


def test_collectives_mix_lanes():
    body = """
      uint lane = thread_index_in_simdgroup;
      float v = x[lane];
      uint k = as_type<uint>(v);
      y[lane] = simd_max(v) + simd_shuffle_xor(v, 5) + simd_shuffle_down(v, 3);
      z[lane] = simd_max(k) ^ simd_shuffle_xor(k, 16) ^ uint(simd_max(int(k)));
    """
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    k, lanes = x.view(np.uint32), np.arange(32)
    outputs = {"y": ((32,), mx.float32), "z": ((32,), mx.uint32)}
    y, z = launch(body, {"x": mx.array(x)}, outputs, seed=3)
    down = np.where(lanes + 3 < 32, x[np.minimum(lanes + 3, 31)], x)
    np.testing.assert_array_equal(y, x.max() + x[lanes ^ 5] + down)
    top = k.view(np.int32).max().astype(np.uint32)
    np.testing.assert_array_equal(z, k.max() ^ k[lanes ^ 16] ^ top)


def test_vectors_are_read_wrongly():
    body = """
      uint i = thread_index_in_simdgroup;
      uint4 a = *(const device uint4*)(x + 4 * i);
      float4 f = *(const device float4*)(v + 4 * i) * 2.0f + float4(1, 2, 3, 4);
      *(device uint4*)(y + 4 * i) = uint4(a.w, a.z, a.y, a.x) >> 1;
      *(device float2*)(z + 2 * i) = float2(dot(f, float4(1.0f)), f.zw.x);
    """
    x = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32)
    v = np.arange(128, dtype=np.float32).reshape(32, 4)
    outputs = {"y": ((32, 4), mx.uint32), "z": ((32, 2), mx.float32)}
    y, z = launch(body, {"x": mx.array(x), "v": mx.array(v)}, outputs)
    np.testing.assert_array_equal(y, x[:, ::-1] >> 1)
    f = v * 2 + np.arange(1, 5)
    np.testing.assert_array_equal(z, np.stack([f.sum(1), f[:, 2]], 1))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_small_float_is_rounded_wrongly(dtype):
    raw = np.arange(2**16, dtype=np.uint16)
    values = mx.array(raw).view(dtype)
    between = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32).view(np.float32)
    halfway = np.array(values.astype(mx.float32)).view(np.uint32) + np.uint32(0x1000)
    floats = mx.array(np.concatenate([between, halfway.view(np.float32)]))
    body = """
      uint i = thread_position_in_grid.x;
      wide[i] = i < 65536 ? float(values[i]) : 0.0f;
      narrow[i] = T(floats[i]);
    """
    outputs = {"wide": ((2**17,), mx.float32), "narrow": ((2**17,), dtype)}
    inputs = {"values": values, "floats": floats}
    wide, narrow = launch(body, inputs, outputs, lanes=1024, groups=128, template=[("T", dtype)])
    np.testing.assert_array_equal(wide[: 2**16], values.astype(mx.float32))
    np.testing.assert_array_equal(
        narrow.astype(mx.float32), floats.astype(dtype).astype(mx.float32)
    )


def test_a_kernel_of_mlx_lm_differs(monkeypatch):
    module = importlib.import_module("mlx_lm.kernels.expert_routing")
    kernel = module._routing_kernel
    monkeypatch.setattr(module, "_routing_kernel", lambda **call: msl_cpu.run(kernel, **call))
    logits = mx.random.normal((5, 128), key=mx.random.key(0))
    bias = mx.random.normal((128,), key=mx.random.key(1)) * 0.1
    found, weights = module.expert_routing(
        logits, bias, top_k=8, multiplier=1.5, score_eps=1e-9, route_scale=2.5
    )
    scores = mx.sigmoid(logits * 1.5)
    top = mx.argsort(-(scores + bias), axis=-1)[:, :8]
    np.testing.assert_array_equal(found, top)
    scores = mx.take_along_axis(scores, top, -1)
    expected = scores / (scores.sum(-1, keepdims=True) + 1e-9) * 2.5
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 2])
def test_a_kernel_of_mlx_differs(bits):
    include = Path(next(iter(mlx.__path__))) / "include"
    header = (include / "mlx/backend/metal/kernels/quantized.h").read_text()
    # What comes after needs matrices of a simdgroup.
    header = header[: header.rindex("template <", 0, header.index("METAL_FUNC void qvm_impl("))]
    kernel = mx.fast.metal_kernel(
        name="mlx",
        input_names=["w", "scales", "biases", "x", "K", "N"],
        output_names=["y"],
        header=header,
        source="""qmv_fast_impl<T, G, BITS>(
            w, scales, biases, x, y, K, N, threadgroup_position_in_grid,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);""",
    )
    w = mx.random.normal((16, 1024), key=mx.random.key(0))
    x = mx.random.normal((1024,), key=mx.random.key(1))
    q = mx.quantize(w, group_size=64, bits=bits)
    (y,) = msl_cpu.run(
        kernel,
        inputs=[*q, x, mx.array(1024), mx.array(16)],
        template=[("T", mx.float32), ("G", 64), ("BITS", bits)],
        grid=(32, 4, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(16,)],
        output_dtypes=[mx.float32],
        seed=1,
    )
    expected = mx.quantized_matmul(x[None], *q, transpose=True, group_size=64, bits=bits)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
def test_a_pointer_to_device_memory_points_to_a_constant():
    kernel = matvec(("auto scale =", "const device T* scale ="))
    for rows, width, expected in ((3, 512, ""), (1, 128, "matvec.metal:13:")):
        arguments, _ = problem(rows, width)

        def launch(kernel, expected=expected, **call):
            errors = msl_spaces.errors(kernel.metal, title=kernel.name, **call)
            assert errors.startswith(expected)
            assert bool(errors) == bool(expected)
            return [mx.zeros(3)]

        with launched_by(launch):
            multiply(kernel, *arguments)


@pytest.mark.skipif(msl_spaces.clang() is None, reason="no Clang of version 17 or later")
def test_vectors_have_no_address_space():
    """What is right must pass: vectors of all types, from and to all memories."""
    body = """
      threadgroup float4 shared[2];
      threadgroup float4* p = shared;
      auto xs = (const device float4*)(x);
      p[0] = xs[0] * 2.0f + float4(1, 2, 3, 4) + float4(half4(1.0f));
      p[1] = float4(p[0].xy, float2(few[0], float(T(1))));
      *(device uint2*)(y) = *(const device uint2*)(x) >> 1;
      *(device float2*)(y + 2) = float2(dot(p[0], p[1]), simd_max(p[1].x));
    """
    kernel = TextKernel("vectors", ["x", "few"], ["y"], body)
    for dtype in TOLERANCE:
        call = {"template": [("T", dtype)], "grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
        call |= {"output_shapes": [(32,)], "output_dtypes": [mx.float32]}
        inputs = [mx.zeros(32), mx.zeros(3, dtype)]
        assert not msl_spaces.errors(kernel.metal, inputs=inputs, **call)


@pytest.mark.skipif(msl_cuda.toolkit() is None, reason="no NVRTC, or no MLX for CUDA")
def test_a_word_of_metal_alone_compiles_for_cuda():
    kernel = matvec(("float sum = 0;", "float sum = metal::sinpi(0.0f);"))
    arguments, _ = problem()

    def launch(kernel, **call):
        assert "metal" in msl_cuda.errors(kernel, **call)
        return [mx.zeros(3)]

    with launched_by(launch):
        multiply(kernel, *arguments)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_a_read_past_the_end_that_changes_nothing_passes():
    done = sanitized.run("planted_cases")
    assert done.stdout.split("\n")[:2] == ["sound", "past the end"], done.stderr
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "matvec.metal:16" in done.stderr


def test_a_kernel_runs_elsewhere_than_its_tests_say(on_device):
    arguments, exact = problem()
    found = np.array(multiply(matvec(), *arguments))
    assert np.abs(found - exact).max() < TOLERANCE[mx.float32] * np.abs(exact).max(), on_device
