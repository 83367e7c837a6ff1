"""Compute the attention of one token on a GPU: norms, rotation and gates in one launch.

The attention modules of a loaded model are replaced by these subclasses of theirs. Everything but
one token without padding goes through mlx-lm's own forward. The cache is mlx-lm's, and MLX attends.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention

from flashmoe_metal import kernel
from flashmoe_metal.qk_norm_rope import HeadLayout, QkInputs, qk_norm_rope, supports

from .joined import JoinedProjections


class _Attention(JoinedProjections):
    """An attention whose joined projections are queries (each with its gate, if any), keys, values.

    Attributes:
        gated: whether each query has a gate, by which the output of its head is multiplied.
    """

    gated = False

    def join_projections(self) -> None:
        self.join(("q_proj", "k_proj", "v_proj"))

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        products = self.project(x)
        if not self.can_use_kernel(x, products[0].dtype, cache):
            return self.call_mlx_lm(products, x, mask, cache)
        q, k, v, gate = self._norm_and_rotate(products, position_array(cache.offset))
        return self.project_output(self.attend(q, k, v, cache, mask), gate)

    def project_heads(self, x: mx.array, position: mx.array) -> list[mx.array]:
        """Return what comes before `attend` for one token.

        Args:
            x: (1, 1, hidden).
            position: (1,) int32.

        Returns:
            Queries, keys and values, (1, heads, 1, width) each, and the gates of the heads,
            (1, 1, heads * width).
        """
        return self._norm_and_rotate(self.project(x), position)

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, mask: Any = None
    ) -> mx.array:
        """Add one token to the cache, and return its attention: (1, 1, heads * width)."""
        keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return out.reshape(1, 1, -1)

    def project_output(self, out: mx.array, gate: mx.array) -> mx.array:
        """Return the module's result from what `attend` returned, gated if it is."""
        return self.o_proj(out * gate if self.gated else out)

    def _norm_and_rotate(self, products: list[mx.array], position: mx.array) -> list[mx.array]:
        q, k, v = self._slices
        queries, keys, gate = qk_norm_rope(
            QkInputs(products[q.product], products[k.product], *self._norms_and_rope, position),
            self._layout,
        )
        values = v.select_from(products).reshape(1, self._layout.key_heads, 1, -1)
        return [queries, keys, values, gate]

    # mlx-lm's forward calls these three; in its class they are layers.

    def q_proj(self, _: mx.array) -> mx.array:
        return self.projection(0)

    def k_proj(self, _: mx.array) -> mx.array:
        return self.projection(1)

    def v_proj(self, _: mx.array) -> mx.array:
        return self.projection(2)

    def can_use_kernel(self, x: mx.array, dtype: mx.Dtype, cache: Any) -> bool:
        """Return whether the kernel takes a call.

        It takes one token without padding: in a batch that is padded, offsets are arrays.

        Args:
            x: (sequences, tokens, hidden).
            dtype: the dtype of the projections.
        """
        return (
            x.shape[0] == x.shape[1] == 1
            and cache is not None
            and isinstance(cache.offset, int)
            and not self.training
            and kernel.available()
            and self._kernel_fits
            and self.q_norm.weight.dtype == self.k_norm.weight.dtype == dtype
        )

    @cached_property
    def _kernel_fits(self) -> bool:
        rope, width = self.rope, self.q_norm.weight.shape[0]
        return (
            type(rope) is nn.RoPE
            and not rope.traditional
            and supports(width=width, rotated=rope.dims)
        )

    @cached_property
    def _norms_and_rope(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        eps = mx.array([self.q_norm.eps, self.k_norm.eps])
        rope = mx.array([math.log2(self.rope.base), self.rope.scale])
        return self.q_norm.weight, self.k_norm.weight, eps, rope

    @cached_property
    def _layout(self) -> HeadLayout:
        q, k, _ = self._slices
        return HeadLayout(*self._head_counts, self.rope.dims, self.gated, (q.start, k.start))

    @property
    def _head_counts(self) -> tuple[int, int]:
        """How many heads queries and keys have."""
        raise NotImplementedError


class NextAttention(_Attention, qwen3_next.Qwen3NextAttention):  # type: ignore[misc]
    """The gated attention of qwen3_next and qwen3_5."""

    gated = True

    @property
    def _head_counts(self) -> tuple[int, int]:
        return self.num_attention_heads, self.num_key_value_heads


class Attention(_Attention, qwen3_moe.Attention):  # type: ignore[misc]
    """The attention of qwen3_moe."""

    @property
    def _head_counts(self) -> tuple[int, int]:
        return self.n_heads, self.n_kv_heads


@lru_cache(maxsize=4)
def position_array(offset: int) -> mx.array:
    """Return a token's position as the kernel takes it: one array for all layers of a step."""
    return mx.array([offset], mx.int32)
