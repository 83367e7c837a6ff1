"""Attention by our loops against MLX's own, in float64 by hand, and over a cache."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from flashmoe.ops import backend as ops
from flashmoe.ops.cpu import attention

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="the CPU's")


def tensors(heads, groups, length, count, width, seed=0):
    random = np.random.default_rng(seed)
    q = random.standard_normal((1, heads, length, width), np.float32)
    k, v = random.standard_normal((2, 1, groups, count, width)).astype(np.float32)
    return q, k, v


def by_hand(q, k, v, scale):
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
def test_attention_differs_from_its_definition(heads, groups, width, length, count):
    q, k, v = tensors(heads, groups, length, count, width)
    mask = None if length == 1 else "causal"
    got = attention.attend(mx.array(q), mx.array(k), mx.array(v), None, 0.3, mask)
    assert got.shape == q.shape
    np.testing.assert_allclose(np.array(got)[0], by_hand(q, k, v, 0.3), atol=2e-5)


@pytest.mark.parametrize("length", [1, 5, 60])
def test_room_of_a_cache_is_attended_to(length):
    """The arrays of a cache are longer than its tokens."""
    cache = KVCache()
    q, k, v = tensors(4, 2, 300 + length, 300 + length, 16)
    cache.update_and_fetch(mx.array(k[:, :, :300]), mx.array(v[:, :, :300]))
    keys, values = cache.update_and_fetch(mx.array(k[:, :, 300:]), mx.array(v[:, :, 300:]))
    assert cache.keys.shape[2] > keys.shape[2]
    mask = None if length == 1 else "causal"
    mine = q[:, :, 300:]
    got = attention.attend(mx.array(mine), keys, values, cache, 0.2, mask)
    np.testing.assert_allclose(np.array(got)[0], by_hand(mine, k, v, 0.2), atol=2e-5)
    whole = attention.attend(mx.array(mine), mx.array(k), mx.array(v), None, 0.2, mask)
    assert (np.array(whole) == np.array(got)).all()


def test_very_large_scores_overflow():
    q, k, v = tensors(2, 1, 30, 30, 8)
    for some in (slice(0, 1), slice(0, 30)):
        mine = q[:, :, some] * 1e4
        keys, values = (mx.array(x[:, :, : mine.shape[2]]) for x in (k, v))
        mask = None if mine.shape[2] == 1 else "causal"
        got = attention.attend(mx.array(mine), keys, values, None, 1.0, mask)
        assert np.isfinite(np.array(got)).all()


@pytest.mark.parametrize("case", ["batch", "array", "all", "quantised"])
def test_what_is_not_ours_is_computed_wrong(case):
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
    # A copy: mlx-lm's scales the queries of a quantised cache in place.
    got = attention.attend(q * 1, k, v, cache, 0.3, mask)
    expected = attention.mlx_attention(q, k, v, cache=cache, scale=0.3, mask=mask)
    assert mx.array_equal(got, expected)


def test_number_of_threads_changes_a_bit():
    import numba

    q, k, v = (mx.array(x) for x in tensors(8, 2, 70, 600, 32))
    found = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        for length in (1, 4, 70):
            mask = None if length == 1 else "causal"
            found.append(np.array(attention.attend(q[:, :, -length:], k, v, None, 0.3, mask)))
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert (one == other).all()
