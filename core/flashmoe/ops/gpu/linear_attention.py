"""Compute GatedDeltaNet on a GPU: one token in one launch between its two projections.

The modules of a loaded model are replaced by these subclasses of theirs. The tokens of a prompt go
through a kernel where mlx-lm has none, which is everywhere but on Metal. The rest, such as batches
with padding, goes through mlx-lm's own forward.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.gated_delta import compute_g, normalize_qk

from flashmoe_metal import gated_delta_prompt as prompts
from flashmoe_metal import kernel
from flashmoe_metal.gated_delta_step import GatedDeltaInputs, gated_delta_step, supports

from .joined import JoinedProjections, OutputSlice, reorder_outputs


class _GatedDeltaNet(JoinedProjections):
    """A GatedDeltaNet whose joined projections are q, k and v of all heads, then z, b and a."""

    def __call__(self, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        products = self.project(inputs)
        if mask is None and self._is_prompt(inputs, cache):
            return self._forward_prompt(products, inputs, cache)
        if mask is not None or not self.can_use_kernel(inputs, products[0].dtype, cache):
            return self.call_mlx_lm(products, inputs, mask, cache)
        qkv, z, b, a = (products[part.product] for part in self._slices)
        out, cache[0], cache[1] = gated_delta_step(
            GatedDeltaInputs(qkv, z, b, a, cache[0], *self._weights, cache[1]),
            key_heads=self.num_k_heads,
            starts=self._starts,
        )
        cache.advance(1)
        return self.out_proj(out)

    def can_use_kernel(self, inputs: mx.array, dtype: mx.Dtype, cache: Any) -> bool:
        """Return whether the kernel takes a call: one token without padding, after others.

        Args:
            inputs: (sequences, tokens, hidden).
            dtype: the dtype of the projections.
        """
        return (
            inputs.shape[0] == inputs.shape[1] == 1
            and cache is not None
            and cache[0] is not None
            and cache[1] is not None
            and cache.lengths is None
            and not self.training
            # The kernel would read and write states of another shape or dtype wrongly; mlx-lm's
            # forward says what is wrong.
            and (cache[0].shape, cache[1].shape) == self._state_shapes
            and (cache[0].dtype, cache[1].dtype) == (dtype, mx.float32)
            and kernel.available()
            and self._kernel_fits
        )

    def _is_prompt(self, inputs: mx.array, cache: Any) -> bool:
        """Return whether the kernel for prompts takes a call: several tokens of one sequence."""
        return (
            inputs.shape[0] == 1
            and inputs.shape[1] > 1
            and (cache is None or cache.lengths is None)
            and not self.training
            and getattr(self, "sharding_group", None) is None
            and kernel.available()
            and not mx.metal.is_available()
            and prompts.supports(
                value_heads=self.num_v_heads, key_heads=self.num_k_heads, width=self.head_k_dim
            )
        )

    def _forward_prompt(self, products: list[mx.array], inputs: mx.array, cache: Any) -> mx.array:
        """Do what mlx-lm's forward does, with one launch for the recurrence of all tokens.

        Args:
            products: what `project` returned for the inputs.
        """
        qkv, z, b, a = (part.select_from(products) for part in self._slices)
        tokens, kept = inputs.shape[1], self.conv_kernel_size - 1
        before, state = (None, None) if cache is None else (cache[0], cache[1])
        if before is None:
            before = mx.zeros((1, kept, self.conv_dim), qkv.dtype)
        if state is None:
            state = mx.zeros(self._state_shapes[1])
        seen = mx.concatenate([before, qkv], axis=1)
        mixed = _convolve(seen, self.conv1d.weight)
        q, k, v = mx.split(mixed, [self.key_dim, 2 * self.key_dim], axis=-1)
        heads = (1, tokens, self.num_k_heads, self.head_k_dim)
        q, k = normalize_qk(
            q.reshape(heads), k.reshape(heads), inv_scale=self.head_k_dim**-0.5, eps=1e-6
        )
        values = (1, tokens, self.num_v_heads, self.head_v_dim)
        decay = compute_g(self.A_log, a, self.dt_bias)
        y, state = prompts.gated_delta_prompt(q, k, v.reshape(values), decay, mx.sigmoid(b), state)
        if cache is not None:
            cache[0], cache[1] = mx.contiguous(seen[:, -kept:]), state
            cache.advance(tokens)
        return self.out_proj(self.norm(y, z.reshape(values)).reshape(1, tokens, -1))

    @cached_property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (1, self.conv_kernel_size - 1, self.conv_dim),
            (1, self.num_v_heads, self.head_v_dim, self.head_k_dim),
        )

    @cached_property
    def _kernel_fits(self) -> bool:
        return supports(
            taps=self.conv_kernel_size,
            value_heads=self.num_v_heads,
            key_heads=self.num_k_heads,
            rows=self.head_v_dim,
            width=self.head_k_dim,
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [part.start for part in self._slices]

    @cached_property
    def _weights(self) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        # The second is added to the sum of squares of queries and of keys, as mlx-lm does.
        eps = mx.array([self.norm.eps, 1e-6])
        # Made contiguous once, because each step would copy them otherwise.
        taps, a_log, dt_bias, norm, eps = (
            mx.contiguous(x)
            for x in (self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, eps)
        )
        mx.eval(taps, a_log, dt_bias, norm, eps)
        return taps, a_log, dt_bias, norm, eps


@mx.compile
def _convolve(seen: mx.array, weight: mx.array) -> mx.array:
    """Return silu of the convolution of each channel, summed in float32.

    MLX's own takes long for channels that have a filter each.

    Args:
        seen: (1, taps - 1 + tokens, channels).
        weight: (channels, taps, 1).

    Returns:
        (1, tokens, channels), of the dtype of `seen`.
    """
    taps = weight.shape[1]
    tokens = seen.shape[1] - taps + 1
    total = mx.zeros((), mx.float32)
    for t in range(taps):
        total = total + seen[:, t : t + tokens].astype(mx.float32) * weight[:, t, 0]
    return nn.silu(total).astype(seen.dtype)


class GatedDeltaNet(_GatedDeltaNet, qwen3_5.GatedDeltaNet):  # type: ignore[misc]
    """The GatedDeltaNet of qwen3_5."""

    def join_projections(self) -> None:
        self.join(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))

    # mlx-lm's forward calls these four; in its class they are layers.

    def in_proj_qkv(self, _: mx.array) -> mx.array:  # type: ignore[override]
        return self.projection(0)

    def in_proj_z(self, _: mx.array) -> mx.array:  # type: ignore[override]
        return self.projection(1)

    def in_proj_b(self, _: mx.array) -> mx.array:  # type: ignore[override]
        return self.projection(2)

    def in_proj_a(self, _: mx.array) -> mx.array:  # type: ignore[override]
        return self.projection(3)

    def can_use_kernel(self, inputs: mx.array, dtype: mx.Dtype, cache: Any) -> bool:
        return self.sharding_group is None and super().can_use_kernel(inputs, dtype, cache)


class NextGatedDeltaNet(_GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet):  # type: ignore[misc]
    """The GatedDeltaNet of qwen3_next, whose projections interleave q, k, v and z by key head.

    Their rows are put in the order of the other family.
    """

    def join_projections(self) -> None:
        heads, width = self.num_k_heads, self.head_k_dim
        share = self.num_v_heads // heads
        values = share * self.head_v_dim
        reorder_outputs(self["in_proj_qkvz"], _rows_by_kind(heads, (width, width, values, values)))
        reorder_outputs(self["in_proj_ba"], _rows_by_kind(heads, (share, share)))
        self.join(("in_proj_qkvz", "in_proj_ba"))
        qkvz, ba = self._slices
        self._slices = [
            OutputSlice(qkvz.product, qkvz.start, self.conv_dim),
            OutputSlice(qkvz.product, qkvz.start + self.conv_dim, self.value_dim),
            OutputSlice(ba.product, ba.start, self.num_v_heads),
            OutputSlice(ba.product, ba.start + self.num_v_heads, self.num_v_heads),
        ]

    # mlx-lm's forward calls these two and passes what they return to the third.

    def in_proj_qkvz(self, _: mx.array) -> list[mx.array]:  # type: ignore[override]
        return [self.projection(0), self.projection(1)]

    def in_proj_ba(self, _: mx.array) -> list[mx.array]:  # type: ignore[override]
        return [self.projection(2), self.projection(3)]

    def fix_query_key_value_ordering(  # type: ignore[override]
        self, qkvz: list[mx.array], ba: list[mx.array]
    ) -> tuple[mx.array, ...]:
        (mixed, z), (b, a) = qkvz, ba
        q, k, v = mx.split(mixed, [self.key_dim, 2 * self.key_dim], axis=-1)
        values = (*z.shape[:2], self.num_v_heads, self.head_v_dim)
        return q, k, v.reshape(values), z.reshape(values), b, a


def _rows_by_kind(heads: int, sizes: tuple[int, ...]) -> mx.array:
    """Return the order of rows that puts [head][kind] as [kind][head].

    Args:
        sizes: the rows that each kind has in a head.
    """
    rows = mx.arange(heads * sum(sizes)).reshape(heads, -1)
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return mx.concatenate([part.reshape(-1) for part in mx.split(rows, ends, axis=-1)])
