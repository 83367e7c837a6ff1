"""Attention on a GPU: norms, rotation and gates of one token in one launch.

Instances of mlx-lm's classes become these in place. Everything else than one token without padding
goes through mlx-lm's own forward. The cache is mlx-lm's, and MLX attends.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention

from flashmoe_metal import kernel, qk_norm_rope

from .joined import Joined


class _Attention(Joined):
    """Its parts are queries (each with its gate, if any), keys and values."""

    gated = False

    def join_projections(self) -> None:
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
