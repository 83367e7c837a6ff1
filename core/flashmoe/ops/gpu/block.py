"""Define the interface of MoE blocks that flashmoe's GPU kernels compute.

`flashmoe.models.fused_blocks` implements it; the decoder layers of this package call it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ...streaming.block import ExpertBlock


class KernelBlock(ExpertBlock):
    """A MoE block whose router and experts are launches of flashmoe's kernels for few tokens."""

    fuses_residual = True

    @property
    def fits_kernels(self) -> bool:
        """Whether the kernels can compute the block; only then may the methods below be called."""
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
        """Apply the block to tokens when its layer is fully resident; lazy.

        Args:
            x: (..., hidden).
            routed: what `choose_experts` returned for x.
            residual: (..., hidden), added to the result, or None.

        Returns:
            (..., hidden).
        """
        raise NotImplementedError

    def routed_sums(
        self,
        xs: Sequence[mx.array],
        routed: Sequence[list[mx.array]],
        residuals: Sequence[mx.array | None],
    ) -> Iterator[mx.array]:
        """Apply the block to each of several inputs, and load the experts that are not resident.

        Args:
            xs: (tokens, hidden) each.
            routed: what `choose_experts` returned for each.
            residuals: what is added to each result, or None.

        Returns:
            The result of each input in turn, (tokens, hidden).
        """
        raise NotImplementedError
