"""What the kernels compute, in plain MLX.

The twins of GatedDeltaNet's step and of the experts' kernels compute in float32 and round what they
return; mlx-lm's modules round in between too. The others round where MLX does.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from flashmoe_metal.down import Shared
from flashmoe_metal.matrix import Matrix


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def gated_delta_step(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv_state: mx.array,
    conv_weight: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    eps: mx.array,
    state: mx.array,
    *,
    key_heads: int,
    at: Sequence[int] = (0, 0, 0, 0),
) -> list[mx.array]:
    """The arguments and results of `flashmoe_metal.gated_delta_step.gated_delta_step`."""
    _, heads, rows, width = state.shape
    channels = conv_state.shape[-1]
    dtype = qkv.dtype
    lengths = (channels, heads * rows, heads, heads)
    parts = zip((qkv, z, b, a), at, lengths, strict=True)
    qkv, z, b, a = (x[0, 0, start : start + n].astype(mx.float32) for x, start, n in parts)

    seen = mx.concatenate([conv_state[0].astype(mx.float32), qkv[None]])  # (taps, channels)
    mixed = _silu((seen * conv_weight.squeeze(-1).T.astype(mx.float32)).sum(axis=0))
    ends = [key_heads * width, 2 * key_heads * width]
    q, k, v = mx.split(mixed, ends)
    q, k, v = q.reshape(-1, width), k.reshape(-1, width), v.reshape(heads, rows)
    q, k = (x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + eps[1]) for x in (q, k))
    q, k = (mx.repeat(x, heads // key_heads, axis=0)[:, None] for x in (q * width**-0.5, k))

    step = mx.logaddexp(a + dt_bias.astype(mx.float32), mx.zeros(heads))
    decay = mx.exp(-mx.exp(a_log.astype(mx.float32)) * step)
    after = state[0] * decay[:, None, None]
    delta = (v - (after * k).sum(axis=-1)) * mx.sigmoid(b)[:, None]  # (heads, rows)
    after = after + k * delta[..., None]
    y = (after * q).sum(axis=-1)

    scale = mx.rsqrt(mx.square(y).mean(axis=-1, keepdims=True) + eps[0])
    y = y * scale * norm_weight.astype(mx.float32) * _silu(z.reshape(heads, rows))
    return [y.reshape(1, 1, -1).astype(dtype), seen[None, 1:].astype(dtype), after[None]]


def add_norm(x: mx.array, r: mx.array, weight: mx.array, eps: mx.array) -> list[mx.array]:
    """The arguments and results of `flashmoe_metal.add_norm.add_norm`."""
    h = x + r
    return [h, mx.fast.rms_norm(h, weight, eps.item())]


def qk_norm_rope(
    queries: mx.array,
    keys: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    eps: mx.array,
    rope: mx.array,
    offset: mx.array,
    *,
    heads: int,
    key_heads: int,
    rotated: int,
    gated: bool,
    at: tuple[int, int] = (0, 0),
) -> list[mx.array]:
    """The arguments and results of `flashmoe_metal.qk_norm_rope.qk_norm_rope`."""
    width = q_weight.shape[0]
    kinds = 2 if gated else 1
    queries = queries[0, 0, at[0] :][: heads * kinds * width].reshape(1, heads, kinds, width)
    keys = keys[0, 0, at[1] :][: key_heads * width].reshape(1, key_heads, 1, width)
    base, scale = 2 ** rope[0].item(), rope[1].item()

    def turned(x, weight, eps):
        x = mx.fast.rms_norm(x, weight, eps.item())
        return mx.fast.rope(
            x, rotated, traditional=False, base=base, scale=scale, offset=offset.item()
        )

    gates = mx.sigmoid(queries[:, :, 1]).reshape(1, 1, -1) if gated else mx.zeros(1, queries.dtype)
    return [turned(queries[:, :, :1], q_weight, eps[0]), turned(keys, k_weight, eps[1]), gates]


def router(
    logits: mx.array, top_k: int, *, experts: int, normalise: bool
) -> tuple[mx.array, mx.array]:
    """The arguments and results of `flashmoe_metal.router.router`."""
    chances = mx.softmax(logits[..., :experts], axis=-1, precise=True)
    indices = mx.argsort(chances, axis=-1)[..., -top_k:]
    scores = mx.take_along_axis(chances, indices, axis=-1).astype(mx.float32)
    if normalise:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores


def _products(matrix: Matrix, x: mx.array, slots: mx.array | None = None) -> mx.array:
    """Of each row of x (..., in) with a matrix, or with that of its slot (...)."""
    parts = matrix.arrays if slots is None else [part[slots] for part in matrix.arrays]
    if matrix.bits < 16:
        weight, scales, biases = parts
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        parts = [
            mx.dequantize(weight, scales, biases, group_size=matrix.group_size, bits=matrix.bits)
        ]
    products = parts[0].astype(mx.float32) @ x.astype(mx.float32)[..., None]
    return products.squeeze(-1)


def matvec(x: mx.array, matrix: Matrix) -> mx.array:
    """The arguments and results of `flashmoe_metal.matvec.matvec`."""
    return _products(matrix, x).astype(x.dtype)


def gate_up(
    x: mx.array,
    slots: mx.array,
    gate: Matrix,
    up: Matrix,
    shared: tuple[Matrix, Matrix] | None = None,
) -> list[mx.array]:
    """The arguments and results of `flashmoe_metal.gate_up.gate_up`."""
    pairs = slots.reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    repeated = mx.repeat(x, slots.shape[-1], axis=0)
    h = _silu(_products(gate, repeated, pairs)) * _products(up, repeated, pairs)
    if shared is None:
        return [h]
    return [h, _silu(_products(shared[0], x)) * _products(shared[1], x)]


def down(
    h: mx.array,
    slots: mx.array,
    scores: mx.array,
    matrix: Matrix,
    dtype: mx.Dtype,
    *,
    shared: Shared | None = None,
    residual: mx.array | None = None,
    team: int | None = None,
) -> mx.array:
    """The arguments and results of `flashmoe_metal.down.down`. team: it has no such order."""
    own = {}
    if shared is not None:
        products = _products(shared.down, shared.h)
        own = {"shared": products, "gate": shared.gate, "column": shared.column}
    places = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    terms = _products(matrix, h, slots.reshape(-1))
    return combine(terms, places, scores, dtype, **own, residual=residual)


def combine(
    terms: mx.array,
    places: mx.array,
    scores: mx.array,
    dtype: mx.Dtype,
    *,
    shared: mx.array | None = None,
    gate: mx.array | None = None,
    column: int = 0,
    residual: mx.array | None = None,
) -> mx.array:
    """The arguments and results of `flashmoe_metal.down.combine`."""
    y = (terms[places] * scores[..., None]).sum(axis=-2)
    if shared is not None:
        y = y + mx.sigmoid(gate[..., column, None].astype(mx.float32)) * shared.reshape(y.shape)
    if residual is not None:
        y = y + residual.astype(mx.float32)
    return y.astype(dtype)
