"""Tests that the stand-in computes as Metal does; where there is Metal, Metal runs these tests."""

import importlib
import sys
from pathlib import Path

import mlx
import mlx.core as mx
import msl_cpu
import numpy as np
import pytest
from toy_kernel import TOLERANCE, TextKernel, launch, matvec, multiply, problem

from flashmoe_metal.kernel import launched_by

stand_in_only = pytest.mark.skipif(sys.platform != "linux", reason="tests the stand-in alone")


@pytest.fixture
def on_metal(on_device):
    """Launch kernels on Metal or the stand-in; skip the test on CUDA."""
    if on_device == "cuda":
        pytest.skip("words of Metal that no kernel of the package uses are not defined for CUDA")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matvec_equals_the_exact_product(dtype, on_device):
    arguments, exact = problem(dtype=dtype)
    outputs = np.array(multiply(matvec(), *arguments).astype(mx.float32))
    assert np.abs(outputs - exact).max() < TOLERANCE[dtype] * np.abs(exact).max()


@stand_in_only
def test_result_does_not_depend_on_the_order_of_lanes():
    arguments, _ = problem()

    def product(seed):
        with launched_by(msl_cpu.launcher(seed=seed)):
            return np.array(multiply(matvec(), *arguments))

    for seed in (1, 2, 3):
        np.testing.assert_array_equal(product(0), product(seed))


INTEGERS = [mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, *TOLERANCE, mx.bool_])
def test_inputs_of_each_type_are_passed(dtype, on_metal):
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


def test_shapes_and_strides_are_passed(on_metal):
    body = """
      uint i = thread_position_in_grid.x;
      y[i] = i < 3 ? x_shape[i] : i < 6 ? int(x_strides[i - 3]) : i < 7 ? x_ndim : e_shape[i - 7];
    """
    inputs = {"x": mx.zeros((2, 3, 5)).transpose(0, 2, 1), "e": mx.zeros((2, 1), mx.int8)}
    (y,) = launch(body, inputs, {"y": ((9,), mx.int32)}, lanes=9)
    assert y.tolist() == [2, 5, 3, 15, 3, 1, 3, 2, 1]


def test_lanes_know_their_positions(on_metal):
    """The grid ends within a threadgroup, in two dimensions."""
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
    np.testing.assert_array_equal(kernel(template=[], **call)[0], expected)


def test_collectives_exchange_values_between_lanes(on_metal):
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
    y, z = launch(body, {"x": mx.array(x)}, outputs)
    # The last lanes have no lane below them.
    down = x[np.minimum(lanes + 3, 31)]
    np.testing.assert_array_equal(np.array(y)[:29], (x.max() + x[lanes ^ 5] + down)[:29])
    top = k.view(np.int32).max().astype(np.uint32)
    np.testing.assert_array_equal(z, k.max() ^ k[lanes ^ 16] ^ top)


def test_vectors_are_read_and_written(on_metal):
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


@stand_in_only
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_floats_round_as_in_mlx(dtype, on_metal):
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


def test_half_keeps_its_size_in_expressions(on_metal):
    body = """
      y[0] = sizeof(x[0] * 1.5f);
      y[1] = sizeof(1.5f - x[0]);
      y[2] = sizeof(x[0] * 2);
      y[3] = sizeof(2u + x[0]);
      y[4] = sizeof(x[0] / x[1]);
      y[5] = sizeof(-x[0]);
    """
    inputs = {"x": mx.zeros(32, mx.float16)}
    assert launch(body, inputs, {"y": ((6,), mx.uint32)}, lanes=1)[0].tolist() == [4, 4] + 4 * [2]


@stand_in_only
def test_stand_in_runs_a_kernel_of_mlx_lm(monkeypatch):
    module = importlib.import_module("mlx_lm.kernels.expert_routing")
    kernel = module._routing_kernel
    monkeypatch.setattr(module, "_routing_kernel", lambda **call: msl_cpu.run(kernel, **call))
    logits = mx.random.normal((5, 128), key=mx.random.key(0))
    bias = mx.random.normal((128,), key=mx.random.key(1)) * 0.1
    indices, weights = module.expert_routing(
        logits, bias, top_k=8, multiplier=1.5, score_eps=1e-9, route_scale=2.5
    )
    scores = mx.sigmoid(logits * 1.5)
    top = mx.argsort(-(scores + bias), axis=-1)[:, :8]
    np.testing.assert_array_equal(indices, top)
    scores = mx.take_along_axis(scores, top, -1)
    expected = scores / (scores.sum(-1, keepdims=True) + 1e-9) * 2.5
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@stand_in_only
@pytest.mark.parametrize("bits", [4, 2])
def test_stand_in_runs_a_kernel_of_mlx(bits):
    include = Path(next(iter(mlx.__path__))) / "include"
    header = (include / "mlx/backend/metal/kernels/quantized.h").read_text()
    # The rest of the header needs simdgroup matrices, which the stand-in does not have.
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
