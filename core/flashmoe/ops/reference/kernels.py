"""Define in plain MLX what each kernel of `flashmoe_metal` computes: its twin.

A twin has the name, inputs and results of its kernel. The twins of GatedDeltaNet's step and of the
experts' kernels compute in float32 and round what they return; mlx-lm's modules round in between
too. The others round where MLX does.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from flashmoe_metal.down import CombineInputs, DownInputs, SharedExpertTerm
from flashmoe_metal.gate_up import GateUpInputs
from flashmoe_metal.gated_delta_step import GatedDeltaInputs
from flashmoe_metal.matrix import Matrix
from flashmoe_metal.qk_norm_rope import HeadLayout, QkInputs


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def gated_delta_step(
    inputs: GatedDeltaInputs, *, key_heads: int, starts: Sequence[int] = (0, 0, 0, 0)
) -> list[mx.array]:
    """Compute what `flashmoe_metal.gated_delta_step.gated_delta_step` does."""
    *projections, conv_state, conv_weight, a_log, dt_bias, norm_weight, eps, state = inputs
    _, heads, rows, width = state.shape
    channels = conv_state.shape[-1]
    dtype = inputs.qkv.dtype
    lengths = (channels, heads * rows, heads, heads)
    parts = zip(projections, starts, lengths, strict=True)
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
    """Compute what `flashmoe_metal.add_norm.add_norm` does."""
    h = x + r
    return [h, mx.fast.rms_norm(h, weight, _number(eps))]


def _number(x: mx.array) -> float:
    """Return the only element of a real array."""
    value = x.item()
    assert not isinstance(value, complex), "the array is of real numbers"
    return value


def qk_norm_rope(inputs: QkInputs, layout: HeadLayout) -> list[mx.array]:
    """Compute what `flashmoe_metal.qk_norm_rope.qk_norm_rope` does."""
    heads, key_heads, rotated, gated, starts = layout
    width = inputs.q_weight.shape[0]
    kinds = 2 if gated else 1
    queries = inputs.queries[0, 0, starts[0] :][: heads * kinds * width]
    queries = queries.reshape(1, heads, kinds, width)
    keys = inputs.keys[0, 0, starts[1] :][: key_heads * width].reshape(1, key_heads, 1, width)
    base, scale = 2 ** _number(inputs.rope[0]), _number(inputs.rope[1])
    offset = int(_number(inputs.offset))

    def rotate(x: mx.array, weight: mx.array, eps: mx.array) -> mx.array:
        x = mx.fast.rms_norm(x, weight, _number(eps))
        return mx.fast.rope(x, rotated, traditional=False, base=base, scale=scale, offset=offset)

    return [
        rotate(queries[:, :, :1], inputs.q_weight, inputs.eps[0]),
        rotate(keys, inputs.k_weight, inputs.eps[1]),
        mx.sigmoid(queries[:, :, 1]).reshape(1, 1, -1) if gated else mx.zeros(1, queries.dtype),
    ]


def router(logits: mx.array, top_k: int, *, experts: int, normalise: bool) -> list[mx.array]:
    """Compute what `flashmoe_metal.router.router` does."""
    probabilities = mx.softmax(logits[..., :experts], axis=-1, precise=True)
    indices = mx.argsort(probabilities, axis=-1)[..., -top_k:]
    scores = mx.take_along_axis(probabilities, indices, axis=-1).astype(mx.float32)
    if normalise:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return [indices, scores]


def _products(matrix: Matrix, x: mx.array, slots: mx.array | None = None) -> mx.array:
    """Multiply each row of x, (..., in), by a matrix, or by the matrix in its slot of a stack.

    Args:
        slots: (...); None where `matrix` is no stack.

    Returns:
        (..., out) float32.
    """
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
    """Compute what `flashmoe_metal.matvec.matvec` does."""
    return _products(matrix, x).astype(x.dtype)


def gate_up(inputs: GateUpInputs) -> list[mx.array]:
    """Compute what `flashmoe_metal.gate_up.gate_up` does."""
    x, slots, gate, up, shared = inputs
    pairs = slots.reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    repeated = mx.repeat(x, slots.shape[-1], axis=0)
    h = _silu(_products(gate, repeated, pairs)) * _products(up, repeated, pairs)
    if shared is None:
        return [h]
    return [h, _silu(_products(shared[0], x)) * _products(shared[1], x)]


def down(inputs: DownInputs) -> mx.array:
    """Compute what `flashmoe_metal.down.down` does, whatever `team` is."""
    h, slots, scores, matrix, dtype, shared, residual, _ = inputs
    term = None
    if shared is not None:
        values = _products(shared.down, shared.h)
        term = SharedExpertTerm(values, shared.gate, shared.column)
    places = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    terms = _products(matrix, h, slots.reshape(-1))
    return combine(CombineInputs(terms, places, scores, dtype, term, residual))


def combine(inputs: CombineInputs) -> mx.array:
    """Compute what `flashmoe_metal.down.combine` does."""
    terms, places, scores, dtype, shared, residual = inputs
    y = (terms[places] * scores[..., None]).sum(axis=-2)
    if shared is not None:
        gate = mx.sigmoid(shared.gate[..., shared.column, None].astype(mx.float32))
        y = y + gate * shared.values.reshape(y.shape)
    if residual is not None:
        y = y + residual.astype(mx.float32)
    return y.astype(dtype)
