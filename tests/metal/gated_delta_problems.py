"""Random calls of the kernel of a GatedDeltaNet step, and their results in float64."""

import mlx.core as mx
import numpy as np

from flashmoe_metal.gated_delta_step import GatedDeltaInputs

#: (key heads, value heads, width, rows, taps)
SHAPES = {
    "plain": (2, 4, 32, 32, 4),
    "one_head": (1, 1, 8, 8, 2),
    "three_to_one": (1, 3, 36, 20, 3),
    "few_rows": (2, 2, 64, 5, 4),
    "wide": (1, 2, 192, 24, 4),
    "qwen": (1, 2, 128, 128, 4),
}
EPSILON = {mx.float32: 1e-6, mx.bfloat16: 2**-8, mx.float16: 2**-11}


def case(shape: tuple, dtype: mx.Dtype, seed: int = 0) -> tuple[GatedDeltaInputs, dict]:
    """Return the inputs and keyword arguments of a call, whose projections are one array."""
    key_heads, heads, width, rows, taps = shape
    channels = 2 * key_heads * width + heads * rows
    keys = iter(mx.random.split(mx.random.key(seed), 8))

    def normal(*shape, scale=1.0, to=dtype):
        return (mx.random.normal(shape, key=next(keys)) * scale).astype(to)

    projected = normal(1, 1, channels + heads * rows + 2 * heads)
    inputs = GatedDeltaInputs(
        *[projected] * 4,
        normal(1, taps - 1, channels),
        normal(channels, taps, 1, scale=taps**-0.5),
        normal(heads, to=mx.float32),
        normal(heads),
        1 + normal(rows, scale=0.1),
        mx.array([1e-3, 1e-2]),
        normal(1, heads, rows, width, scale=0.3, to=mx.float32),
    )
    b = channels + heads * rows
    return inputs, {"key_heads": key_heads, "starts": (0, channels, b, b + heads)}


def in_float64(inputs: GatedDeltaInputs, *, key_heads: int, starts: tuple) -> list[np.ndarray]:
    """Return the outputs by the definition, head by head: (out, conv state, state)."""
    arrays = [np.array(x.astype(mx.float32)).astype(np.float64) for x in inputs]
    *projected, conv_state, conv_weight, a_log, dt_bias, norm, eps, state = arrays
    qkv, z, b, a = (x[0, 0, start:] for x, start in zip(projected, starts, strict=True))
    heads, rows, width = state.shape[1:]
    channels = conv_state.shape[-1]
    seen = np.concatenate([conv_state[0], qkv[None, :channels]])
    mixed = (seen * conv_weight[..., 0].T).sum(axis=0)
    mixed = mixed / (1 + np.exp(-mixed))
    out, after = np.empty((heads, rows)), np.empty((heads, rows, width))
    for head in range(heads):
        key_head = head // (heads // key_heads)
        q = mixed[key_head * width :][:width]
        k = mixed[(key_heads + key_head) * width :][:width]
        v = mixed[2 * key_heads * width + head * rows :][:rows]
        q = q / np.sqrt((q * q).sum() + eps[1]) / np.sqrt(width)
        k = k / np.sqrt((k * k).sum() + eps[1])
        decay = np.exp(-np.exp(a_log[head]) * np.log1p(np.exp(a[head] + dt_bias[head])))
        beta = 1 / (1 + np.exp(-b[head]))
        s = state[0, head] * decay
        s = s + np.outer((v - s @ k) * beta, k)
        y = s @ q
        gate = z[head * rows :][:rows]
        y = y / np.sqrt((y * y).mean() + eps[0]) * norm * gate / (1 + np.exp(-gate))
        out[head], after[head] = y, s
    return [out.reshape(1, 1, -1), seen[None, 1:], after[None]]


def numpy(arrays) -> list[np.ndarray]:
    """Return arrays as NumPy float32."""
    return [np.array(x.astype(mx.float32)) for x in arrays]


def check(outputs: list[mx.array], inputs: GatedDeltaInputs, **rest):
    """Assert that the outputs of a call are those of the definition, up to rounding."""
    dtype = inputs.qkv.dtype
    assert [x.dtype for x in outputs] == [dtype, dtype, mx.float32]
    expected = in_float64(inputs, **rest)
    for x, y, eps in zip(numpy(outputs), expected, (EPSILON[dtype], 0, 1e-6), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=eps, atol=4 * max(eps, 1e-6) * np.abs(y).mean())
