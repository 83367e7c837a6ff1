"""Tests the kernel of a prompt's GatedDeltaNet against mlx-lm's loop over its tokens."""

import mlx.core as mx
import numpy as np
import pytest
from gated_delta_problems import numpy
from launching import launched
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk

from flashmoe_metal.gated_delta_prompt import gated_delta_prompt, supports

#: Tokens, key heads, value heads, width of keys, rows of a state.
SHAPES = {"plain": (5, 2, 4, 32, 32), "odd": (3, 1, 3, 20, 21), "one": (1, 1, 1, 128, 16)}


def problem(shape: tuple, dtype: mx.Dtype) -> list[mx.array]:
    tokens, key_heads, heads, width, rows = shape
    keys = iter(mx.random.split(mx.random.key(5), 6))
    q, k = (mx.random.normal((1, tokens, key_heads, width), key=next(keys)) for _ in range(2))
    q, k = normalize_qk(q, k, inv_scale=width**-0.5, eps=1e-6)
    v = mx.random.normal((1, tokens, heads, rows), key=next(keys))
    decay, beta = (mx.random.uniform(shape=(1, tokens, heads), key=next(keys)) for _ in range(2))
    state = mx.random.normal((1, heads, rows, width), key=next(keys))
    return [*(x.astype(dtype) for x in (q, k, v)), decay, beta, state]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prompt_equals_mlx_lm_in_float32(shape, dtype):
    inputs = problem(shape, dtype)
    with launched():
        y, state = gated_delta_prompt(*inputs)
    assert (y.dtype, state.dtype) == (dtype, mx.float32)
    exact = [x.astype(mx.float32) for x in inputs]
    expected = gated_delta_ops(*exact)
    eps = 2**-8 if dtype == mx.bfloat16 else 1e-6
    for x, z, e in zip(numpy([y, state]), numpy(expected), (eps, 1e-6), strict=True):
        np.testing.assert_allclose(x, z, rtol=e, atol=4 * max(e, 1e-6) * np.abs(z).mean())


def test_split_of_a_prompt_changes_no_bit():
    q, k, v, decay, beta, state = problem(SHAPES["plain"], mx.float32)
    with launched():
        y, after = gated_delta_prompt(q, k, v, decay, beta, state)
        parts = []
        for piece in (slice(0, 2), slice(2, 5)):
            tokens = [x[:, piece] for x in (q, k, v, decay, beta)]
            part, state = gated_delta_prompt(*tokens, state)
            parts.append(part)
    np.testing.assert_array_equal(np.array(y), np.array(mx.concatenate(parts, axis=1)))
    np.testing.assert_array_equal(np.array(after), np.array(state))


def test_supports_heads_that_share_keys():
    assert supports(value_heads=4, key_heads=2, width=128)
    assert not supports(value_heads=3, key_heads=2, width=128)
    assert not supports(value_heads=4, key_heads=2, width=260)
