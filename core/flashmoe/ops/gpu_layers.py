"""The layers around the experts on a GPU: a step of one token in few launches.

MLX spends about as long on the launch of an operation as the operation takes for one token, so
what counts is their number. Instances become these classes in place (`module.__class__ = ...`).
Everything else than one token without padding goes through mlx-lm's own forward.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as mlx_lm_gated_delta
from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention

from flashmoe_metal import add_norm, kernel, matvec, qk_norm_rope
from flashmoe_metal import gated_delta_step as step
from flashmoe_metal.matrix import Matrix

from .joined import Joined, Part, matrix_of, permute
from .steps import Steps, steps_of


class QuantizedLinear(nn.QuantizedLinear):
    """One row by our kernel. On Metal MLX's own is left, which nobody has measured against it."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size != x.shape[-1] or self._matrix is None or not kernel.available():
            return super().__call__(x)
        return matvec.matvec(x, self._matrix)

    @cached_property
    def _matrix(self) -> Matrix | None:
        return matrix_of(self)


class _GatedDeltaNet(Joined):
    """Its parts are the queries, keys and values of all heads; z; b; and a."""

    def __call__(self, inputs: mx.array, mask=None, cache=None) -> mx.array:
        products = self.products(inputs)
        if mask is not None or not self.is_step(inputs, products[0].dtype, cache):
            return self.forward(products, inputs, mask, cache)
        out, cache[0], cache[1] = step.gated_delta_step(
            *(products[part.product] for part in self._parts),
            cache[0],
            *self._weights,
            cache[1],
            key_heads=self.num_k_heads,
            at=self._at,
        )
        cache.advance(1)
        return self.out_proj(out)

    def is_step(self, inputs: mx.array, dtype: mx.Dtype, cache) -> bool:
        """Whether the kernel takes this call. dtype: of the products."""
        return (
            inputs.shape[0] == inputs.shape[1] == 1
            and cache is not None
            and cache[0] is not None
            and cache[1] is not None
            and cache.lengths is None
            and not self.training
            # What the kernel would read and write wrongly. mlx-lm's forward says what is wrong.
            and (cache[0].shape, cache[1].shape) == self._shapes
            and (cache[0].dtype, cache[1].dtype) == (dtype, mx.float32)
            and kernel.available()
            and self._supported
        )

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (1, self.conv_kernel_size - 1, self.conv_dim),
            (1, self.num_v_heads, self.head_v_dim, self.head_k_dim),
        )

    @cached_property
    def _supported(self) -> bool:
        return step.supports(
            taps=self.conv_kernel_size,
            value_heads=self.num_v_heads,
            key_heads=self.num_k_heads,
            rows=self.head_v_dim,
            width=self.head_k_dim,
        )

    @cached_property
    def _at(self) -> list[int]:
        return [part.start for part in self._parts]

    @cached_property
    def _weights(self) -> list[mx.array]:
        # mlx-lm 0.31 adds this to the mean of squares of queries and keys, newer ones to their sum.
        of_sum = hasattr(mlx_lm_gated_delta, "normalize_qk")
        eps = mx.array([self.norm.eps, 1e-6 if of_sum else 1e-6 * self.head_k_dim])
        # Contiguous once and for all, or each step would copy them.
        arrays = self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, eps
        arrays = [mx.contiguous(x) for x in arrays]
        mx.eval(arrays)
        return arrays


class GatedDeltaNet(_GatedDeltaNet, qwen3_5.GatedDeltaNet):
    def prepare(self) -> None:
        self.join(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))

    def in_proj_qkv(self, _) -> mx.array:
        return self.part(0)

    def in_proj_z(self, _) -> mx.array:
        return self.part(1)

    def in_proj_b(self, _) -> mx.array:
        return self.part(2)

    def in_proj_a(self, _) -> mx.array:
        return self.part(3)

    def is_step(self, inputs, dtype, cache) -> bool:
        return self.sharding_group is None and super().is_step(inputs, dtype, cache)


class NextGatedDeltaNet(_GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet):
    """This family interleaves its projections by key head: their rows are put in order."""

    def prepare(self) -> None:
        heads, width = self.num_k_heads, self.head_k_dim
        share = self.num_v_heads // heads
        values = share * self.head_v_dim
        permute(self["in_proj_qkvz"], _by_kind(heads, (width, width, values, values)))
        permute(self["in_proj_ba"], _by_kind(heads, (share, share)))
        self.join(("in_proj_qkvz", "in_proj_ba"))
        qkvz, ba = self._parts
        self._parts = [
            Part(qkvz.product, qkvz.start, self.conv_dim),
            Part(qkvz.product, qkvz.start + self.conv_dim, self.value_dim),
            Part(ba.product, ba.start, self.num_v_heads),
            Part(ba.product, ba.start + self.num_v_heads, self.num_v_heads),
        ]

    def in_proj_qkvz(self, _) -> list[mx.array]:
        return [self.part(0), self.part(1)]

    def in_proj_ba(self, _) -> list[mx.array]:
        return [self.part(2), self.part(3)]

    def fix_query_key_value_ordering(self, qkvz, ba) -> tuple[mx.array, ...]:
        (mixed, z), (b, a) = qkvz, ba
        q, k, v = mx.split(mixed, [self.key_dim, 2 * self.key_dim], axis=-1)
        values = (*z.shape[:2], self.num_v_heads, self.head_v_dim)
        return q, k, v.reshape(values), z.reshape(values), b, a


def _by_kind(heads: int, sizes: tuple[int, ...]) -> mx.array:
    """Of rows that are all kinds of one head, then of the next: those of all heads by kind."""
    rows = mx.arange(heads * sum(sizes)).reshape(heads, -1)
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return mx.concatenate([part.reshape(-1) for part in mx.split(rows, ends, axis=-1)])


class _Attention(Joined):
    """Its parts are queries (each with its gate, if any), keys and values."""

    gated = False

    def prepare(self) -> None:
        self.join(("q_proj", "k_proj", "v_proj"))

    def __call__(self, x: mx.array, mask=None, cache=None) -> mx.array:
        products = self.products(x)
        if not self.is_step(x, products[0].dtype, cache):
            return self.forward(products, x, mask, cache)
        *qkv, gate = self._split(products, position(cache.offset))
        return self.after(self.attend(*qkv, cache, mask), gate)

    def before(self, x: mx.array, position: mx.array) -> list[mx.array]:
        """Queries, keys and values of one token, (1, heads, 1, width), and the gates of its heads.

        x: (1, 1, hidden). position: (1,) int32.
        """
        return self._split(self.products(x), position)

    def attend(self, queries, keys, values, cache, mask=None) -> mx.array:
        """What the queries see: (1, 1, heads * width)."""
        keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return out.reshape(1, 1, -1)

    def after(self, out: mx.array, gate: mx.array) -> mx.array:
        return self.o_proj(out * gate if self.gated else out)

    def _split(self, products: list[mx.array], position: mx.array) -> list[mx.array]:
        heads, key_heads = self._heads
        q, k, v = self._parts
        queries, keys, gate = qk_norm_rope.qk_norm_rope(
            products[q.product],
            products[k.product],
            *self._weights,
            position,
            heads=heads,
            key_heads=key_heads,
            rotated=self.rope.dims,
            gated=self.gated,
            at=(q.start, k.start),
        )
        return [queries, keys, v.of(products).reshape(1, key_heads, 1, -1), gate]

    def q_proj(self, _) -> mx.array:
        return self.part(0)

    def k_proj(self, _) -> mx.array:
        return self.part(1)

    def v_proj(self, _) -> mx.array:
        return self.part(2)

    def is_step(self, x: mx.array, dtype: mx.Dtype, cache) -> bool:
        """Whether the kernel takes this call. In a batch that is padded, offsets are arrays."""
        return (
            x.shape[0] == x.shape[1] == 1
            and cache is not None
            and isinstance(cache.offset, int)
            and not self.training
            and kernel.available()
            and self._supported
            and self.q_norm.weight.dtype == self.k_norm.weight.dtype == dtype
        )

    @cached_property
    def _supported(self) -> bool:
        rope, width = self.rope, self.q_norm.weight.shape[0]
        return (
            type(rope) is nn.RoPE
            and not rope.traditional
            and qk_norm_rope.supports(width=width, rotated=rope.dims)
        )

    @cached_property
    def _weights(self) -> list[mx.array]:
        eps = mx.array([self.q_norm.eps, self.k_norm.eps])
        rope = mx.array([math.log2(self.rope.base), self.rope.scale])
        return [self.q_norm.weight, self.k_norm.weight, eps, rope]


class NextAttention(_Attention, qwen3_next.Qwen3NextAttention):
    gated = True

    @property
    def _heads(self) -> tuple[int, int]:
        return self.num_attention_heads, self.num_key_value_heads


class Attention(_Attention, qwen3_moe.Attention):
    @property
    def _heads(self) -> tuple[int, int]:
        return self.n_heads, self.n_kv_heads


@lru_cache(maxsize=4)
def position(offset: int) -> mx.array:
    """As the kernel takes it: one array for all layers of a step."""
    return mx.array([offset], mx.int32)


class _DecoderLayer:
    """mlx-lm's, with its sum and norm in one launch, and the last sum left to the experts.

    The block may have `with_residual(x, h)`: h + block(x).
    """

    def prepare(self) -> None:
        pass

    def __call__(self, x: mx.array, mask=None, cache=None) -> mx.array:
        if self._steps is not None and mask is None and self._steps.take(x, cache):
            return self._steps(x, cache)
        h, normed = self.sum_and_norm(x, self.attention(self.input_layernorm(x), mask, cache))
        block = self.mlp
        if hasattr(type(block), "with_residual"):
            return block.with_residual(normed, h)
        return h + block(normed)

    @property
    def attention(self) -> nn.Module:
        return self.linear_attn if getattr(self, "is_linear", False) else self.self_attn

    def sum_and_norm(self, x: mx.array, r: mx.array) -> tuple[mx.array, mx.array]:
        """x + r, and what its norm is."""
        norm = self.post_attention_layernorm
        if kernel.available() and not self.training and add_norm.supports(x, r, norm.weight):
            return tuple(add_norm.add_norm(x, r, norm.weight, self._eps))
        return x + r, norm(x + r)

    @cached_property
    def _steps(self) -> Steps | None:
        return steps_of(self)

    @cached_property
    def _eps(self) -> mx.array:
        return mx.array([self.post_attention_layernorm.eps])


class DecoderLayer(_DecoderLayer, qwen3_5.DecoderLayer):
    pass


class NextDecoderLayer(_DecoderLayer, qwen3_next.Qwen3NextDecoderLayer):
    pass


class MoeDecoderLayer(_DecoderLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    pass


_CLASSES = {
    qwen3_5.GatedDeltaNet: GatedDeltaNet,
    qwen3_5.DecoderLayer: DecoderLayer,
    qwen3_next.Qwen3NextGatedDeltaNet: NextGatedDeltaNet,
    qwen3_next.Qwen3NextAttention: NextAttention,
    qwen3_next.Qwen3NextDecoderLayer: NextDecoderLayer,
    qwen3_moe.Attention: Attention,
    qwen3_moe.Qwen3MoeDecoderLayer: MoeDecoderLayer,
}


def prepare(model: nn.Module) -> None:
    """Let the layers of a loaded model compute in this way, evaluated or not."""
    for module in model.modules():
        ours = _CLASSES.get(type(module))
        if ours is not None:
            module.__class__ = ours
            module.prepare()
    if not mx.metal.is_available():
        for module in model.modules():
            if type(module) is nn.QuantizedLinear:
                module.__class__ = QuantizedLinear
