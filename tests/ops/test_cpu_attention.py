"""Tests attention on the CPU against its definition in float64, over caches, and against MLX."""

import os

import mlx.core as mx
import numba
import numpy as np
import pytest
from matvec_problems import rerun_with_two_threads
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from flashmoe.ops import backend as ops
from flashmoe.ops.cpu import attention

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="tests the CPU's attention")


def tensors(heads, groups, length, count, width, seed=0):
    """Return queries (1, heads, length, width), and keys and values (1, groups, count, width)."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((1, heads, length, width), np.float32)
    k, v = random.standard_normal((2, 1, groups, count, width)).astype(np.float32)
    return q, k, v


def by_definition(q, k, v, scale):
    """Return causal attention in float64, of shape (heads, length, width)."""
    q, k, v = (x[0].astype(np.float64) for x in (q, k, v))
    heads, length, _ = q.shape
    shared, count = heads // k.shape[0], k.shape[1]
    out = np.empty_like(q)
    for h in range(heads):
        for i in range(length):
            seen = count - length + i + 1
            scores = k[h // shared, :seen] @ q[h, i] * scale
            weights = np.exp(scores - scores.max())
            out[h, i] = weights @ v[h // shared, :seen] / weights.sum()
    return out


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 16), (32, 2, 40)])
@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 1), (1, 256), (1, 257), (1, 700), (3, 5), (8, 600), (9, 9), (128, 128), (129, 400)],
)
def test_attention_equals_its_definition(heads, groups, width, length, count):
    q, k, v = tensors(heads, groups, length, count, width)
    mask = None if length == 1 else "causal"
    got = attention.attend(mx.array(q), mx.array(k), mx.array(v), None, 0.3, mask)
    assert got.shape == q.shape
    np.testing.assert_allclose(np.array(got)[0], by_definition(q, k, v, 0.3), atol=2e-5)


@pytest.mark.parametrize("length", [1, 5, 60])
def test_unused_positions_of_a_cache_are_ignored(length):
    """The arrays of a cache are allocated for more tokens than it has."""
    cache = KVCache()
    q, k, v = tensors(4, 2, 300 + length, 300 + length, 16)
    cache.update_and_fetch(mx.array(k[:, :, :300]), mx.array(v[:, :, :300]))
    keys, values = cache.update_and_fetch(mx.array(k[:, :, 300:]), mx.array(v[:, :, 300:]))
    assert cache.keys.shape[2] > keys.shape[2]
    mask = None if length == 1 else "causal"
    queries = q[:, :, 300:]
    got = attention.attend(mx.array(queries), keys, values, cache, 0.2, mask)
    np.testing.assert_allclose(np.array(got)[0], by_definition(queries, k, v, 0.2), atol=2e-5)
    whole = attention.attend(mx.array(queries), mx.array(k), mx.array(v), None, 0.2, mask)
    assert (np.array(whole) == np.array(got)).all()


def test_very_large_scores_do_not_overflow():
    q, k, v = tensors(2, 1, 30, 30, 8)
    for rows in (slice(0, 1), slice(0, 30)):
        queries = q[:, :, rows] * 1e4
        keys, values = (mx.array(x[:, :, : queries.shape[2]]) for x in (k, v))
        mask = None if queries.shape[2] == 1 else "causal"
        got = attention.attend(mx.array(queries), keys, values, None, 1.0, mask)
        assert np.isfinite(np.array(got)).all()


@pytest.mark.parametrize("case", ["batch", "array", "all", "quantised"])
def test_calls_that_the_kernel_does_not_support_go_to_mlx(case):
    q, k, v = (mx.array(x) for x in tensors(4, 2, 12, 12, 64))
    cache, mask = None, "causal"
    if case == "batch":
        q, k, v = (mx.concatenate([x, x * 2]) for x in (q, k, v))
    elif case == "array":
        mask = mx.array(np.random.default_rng(0).random((12, 12)) < 0.5) | mx.eye(12).astype(
            mx.bool_
        )
    elif case == "all":
        mask = None
    else:
        cache = QuantizedKVCache()
        k, v = cache.update_and_fetch(k, v)
    # The queries are copied, since mlx-lm scales those of a quantised cache in place.
    got = attention.attend(q * 1, k, v, cache, 0.3, mask)
    expected = attention.mlx_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
    assert mx.array_equal(got, expected)


@pytest.mark.skipif(os.cpu_count() < 2, reason="one CPU")
def test_bits_do_not_depend_on_the_number_of_threads():
    if numba.config.NUMBA_NUM_THREADS < 2:
        rerun_with_two_threads(__file__, "test_bits_do_not_depend_on_the_number_of_threads")
        return
    q, k, v = (mx.array(x) for x in tensors(8, 2, 70, 600, 32))
    results = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        for length in (1, 4, 70):
            mask = None if length == 1 else "causal"
            results.append(np.array(attention.attend(q[:, :, -length:], k, v, None, 0.3, mask)))
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert (one == other).all()
