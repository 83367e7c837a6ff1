"""Tests the products of many rows with the matrices of their experts; kernels on CUDA only."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_metal import grouped
from flashmoe_metal.matrix import Matrix

cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernels are for CUDA")

TOKENS, TOP_K, EXPERTS, HIDDEN, EXPERT = 70, 3, 5, 256, 192


def matrix(rows: int, columns: int, bits: int, dtype: mx.Dtype) -> Matrix:
    words = mx.random.randint(0, 1 << 16, (EXPERTS, rows, columns * bits // 16))
    scales = mx.random.uniform(0.5, 1.5, (EXPERTS, rows, columns // 64)) * columns**-0.5 / 2**bits
    scales = scales.astype(dtype)
    biases = (scales * -(2 ** (bits - 1))).astype(dtype)
    return Matrix(words.astype(mx.uint16).view(mx.uint32), scales, biases, bits, 64)


def products(x: mx.array, m: Matrix, experts: mx.array) -> mx.array:
    """Return x times the matrix of each row's expert, in float32."""
    scales, biases = (a.astype(mx.float32) for a in (m.scales, m.biases))
    w = mx.dequantize(m.weight, scales, biases, group_size=m.group_size, bits=m.bits)
    return (x.astype(mx.float32)[:, None] @ w[experts].swapaxes(1, 2))[:, 0]


def choices() -> np.ndarray:
    """Return experts of tokens, (tokens, top_k), of which one is never chosen."""
    rng = np.random.default_rng(0)
    return np.array([rng.permutation([0, 1, 3, 4])[:TOP_K] for _ in range(TOKENS)], np.uint32)


def test_tiles_hold_each_pair_once():
    rows = np.arange(300) // 2
    groups = grouped.group(np.array([7, 2]), np.array([270, 30]), rows)
    assert np.array(groups.tiles).tolist() == [
        [7, 0, 128],
        [7, 128, 256],
        [7, 256, 270],
        [2, 270, 300],
    ]
    np.testing.assert_array_equal(np.array(groups.rows), rows)


def test_supports_matrices_of_whole_steps():
    x = mx.bfloat16
    gate, down = matrix(EXPERT, HIDDEN, 4, x), matrix(HIDDEN, EXPERT, 8, x)
    assert grouped.supports(x, gate, gate, down)
    assert not grouped.supports(mx.float16, gate, gate, down)
    assert not grouped.supports(x, gate, matrix(EXPERT, HIDDEN, 3, x), down)
    assert not grouped.supports(mx.float32, *[matrix(64, 64, 4, mx.float32)] * 3)


@cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_products_are_those_of_float32_within_rounding(bits, dtype):
    gate, up = (matrix(EXPERT, HIDDEN, bits, dtype) for _ in range(2))
    down = matrix(HIDDEN, EXPERT, bits, dtype)
    x = mx.random.normal((TOKENS, HIDDEN)).astype(dtype)
    groups, places = grouped.group_on_gpu(mx.array(choices()), EXPERTS)
    h = grouped.grouped_gate_up(x, groups, gate, up)
    y = grouped.grouped_down(h, groups, down)
    experts = mx.array(choices().reshape(-1))
    at = places.reshape(-1)
    repeated = mx.repeat(x, TOP_K, axis=0)
    g, u = products(repeated, gate, experts), products(repeated, up, experts)
    eps = 2**-8 if dtype == mx.bfloat16 else 2**-11
    for ours, exact in (
        (h[at], g * mx.sigmoid(g) * u),
        (y[at], products(h[at], down, experts)),
    ):
        error = mx.square(ours.astype(mx.float32) - exact).mean() / mx.square(exact).mean()
        assert error.item() < (2 * eps) ** 2


@cuda
def test_bits_of_a_pair_depend_on_nothing_else():
    gate, up = (matrix(EXPERT, HIDDEN, 4, mx.bfloat16) for _ in range(2))
    x = mx.random.normal((TOKENS, HIDDEN)).astype(mx.bfloat16)
    chosen = choices().reshape(-1)
    groups, places = grouped.group_on_gpu(mx.array(choices()), EXPERTS)
    together = grouped.grouped_gate_up(x, groups, gate, up)[places.reshape(-1)]
    for expert in np.unique(chosen):
        pairs = np.flatnonzero(chosen == expert)[::-1].copy()
        alone = grouped.group(np.array([expert]), np.array([pairs.size]), pairs // TOP_K)
        h = grouped.grouped_gate_up(x, alone, gate, up)
        assert mx.array_equal(h, together[mx.array(pairs)])


@cuda
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_unpacked_weights_are_rounded_once(bits):
    m = matrix(64, HIDDEN, bits, mx.bfloat16)
    one = Matrix(m.weight[0], m.scales[0], m.biases[0], bits, 64)
    scales, biases = (a.astype(mx.float32) for a in (one.scales, one.biases))
    exact = mx.dequantize(one.weight, scales, biases, group_size=64, bits=bits)
    assert mx.array_equal(grouped.unpack(one), exact.astype(mx.bfloat16))
