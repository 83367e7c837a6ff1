"""Define the parts of a decoder layer that stream experts: the MoE block and its switch.

A model's MoE block routes tokens and adds what is not routed; its switch, in the place of mlx-lm's
`SwitchGLU`, computes the routed experts. There are several of each: experts may be streamed, all
resident, or on other machines, and blocks may use one launch for what others do in four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .compute import ExpertWork
from .device_copy import Mailbox


@dataclass
class SwitchStats:
    """Counts of one layer since it was made.

    Attributes:
        needed: experts that calls needed, each counted once per call.
        loaded: the needed experts that were read from disk.
    """

    needed: int = 0
    loaded: int = 0


class StartedCall(Protocol):
    """One call of a switch, whose reads have been started."""

    def finish(
        self,
        scores: Sequence[mx.array] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[mx.array]:
        """Compute the experts, then yield each input's sum weighted by its scores (..., top_k).

        Args:
            scores: of each input; only a `StreamingSwitchGLU` may be asked for results without.
            extras: what `ExpertWork.combined_with` takes, for each input.
        """


class ExpertSwitch:
    """The routed experts of one layer.

    Attributes:
        stats: counts since it was made.
        fully_resident: whether every expert is in the slot of its own number, for good.
        has_kernels: whether flashmoe's own GPU kernels compute the experts.
        many_dtype: see `Backend.many_dtype`.
    """

    @property
    def stats(self) -> SwitchStats:
        raise NotImplementedError

    @property
    def fully_resident(self) -> bool:
        return False

    @property
    def has_kernels(self) -> bool:
        return False

    @property
    def many_dtype(self) -> mx.Dtype | None:
        return None

    def mailbox(self, words: int) -> Mailbox | None:
        """Return host memory in which a router can leave its choice for `start`.

        None where the host may as well look at arrays.
        """
        return None

    def start(
        self,
        inputs: Sequence[tuple[mx.array, mx.array]],
        look: Callable[[mx.array], np.ndarray] = np.array,
    ) -> StartedCall:
        """Start the reads that a call needs. Evaluates the inputs.

        Args:
            inputs: x (..., hidden) and indices (..., top_k) of each input.
            look: copies evaluated indices to numpy.
        """
        raise NotImplementedError

    def expert_in(self, slot: int) -> int | None:
        """Return the expert that is in `slot`, or None."""
        raise NotImplementedError

    def enter_resident(self, needed: int) -> None:
        """Do what a call of a fully resident layer does besides `start_resident`.

        needed: how many experts the call needs at most.
        """
        raise NotImplementedError

    def start_resident(self, x: mx.array, indices: mx.array) -> ExpertWork:
        """Start the work of a fully resident layer: no expert is read, and nothing evaluated.

        x: (..., hidden), indices: (..., top_k).
        """
        raise NotImplementedError


class ExpertBlock(nn.Module):
    """The MoE block of a decoder layer: a router, routed experts, perhaps a shared expert.

    Attributes:
        switch_mlp: the routed experts.
        top_k: K, the experts that the router picks for a token.
        fuses_residual: whether `run` adds a residual in the launch that computes the sum.
    """

    switch_mlp: ExpertSwitch
    top_k: int
    fuses_residual = False

    def run(
        self, xs: Sequence[mx.array], residuals: Sequence[mx.array | None]
    ) -> Iterator[mx.array]:
        """Run the block on several inputs, whose experts are read once for all of them.

        The reads start at once; the experts are computed when results are asked for.

        Args:
            xs: (..., hidden) each.
            residuals: what is added to each result, or None.

        Returns:
            The result of each input in turn, (..., hidden).
        """
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to x, (..., hidden)."""
        return next(self.run([x], [None]))
