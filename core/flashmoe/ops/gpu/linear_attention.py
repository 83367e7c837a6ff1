"""GatedDeltaNet on a GPU: one token in one launch between its two projections.

Instances of mlx-lm's classes become these in place. Everything else than one token without padding
goes through mlx-lm's own forward.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm_gated_delta
from mlx_lm.models import qwen3_5, qwen3_next

from flashmoe_metal import gated_delta_step as step
from flashmoe_metal import kernel

from .joined import Joined, Part, permute


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
    def join_projections(self) -> None:
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

    def join_projections(self) -> None:
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
