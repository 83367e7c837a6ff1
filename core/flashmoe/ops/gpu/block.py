"""Define the MoE block that flashmoe's GPU kernels compute, as the layers around it use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ...streaming.block import ExpertBlock


class KernelBlock(ExpertBlock):
    """A MoE block whose router and experts are launches of flashmoe's kernels for few tokens."""

    fuses_residual = True

    @property
    def fits_kernels(self) -> bool:
        """Whether one token can go through `choose_experts` and one of the two sums."""
        raise NotImplementedError

    def choose_experts(self, x: mx.array) -> list[mx.array]:
        """Return the router's choice for tokens x, (..., hidden).

        Returns:
            Indices and scores, (..., top_k) each, then the products that they come from.
        """
        raise NotImplementedError

    def resident_sum(
        self, x: mx.array, routed: list[mx.array], residual: mx.array | None
    ) -> mx.array:
        """Apply the block to tokens x, (..., hidden), when its layer is fully resident; lazy.

        Args:
            routed: what `choose_experts` returned for x.
        """
        raise NotImplementedError

    def routed_sums(
        self,
        xs: Sequence[mx.array],
        routed: Sequence[list[mx.array]],
        residuals: Sequence[mx.array | None],
    ) -> Iterator[mx.array]:
        """Apply the block to each of several inputs of tokens, whatever experts are resident."""
        raise NotImplementedError
