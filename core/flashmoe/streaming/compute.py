"""Define what a `StreamingSwitchGLU` needs of the code that computes its experts.

`flashmoe.ops` implements these classes: plain MLX is the definition, the others are faster.

    work = backend.start(slots, x, top_k)   # x: (tokens, hidden), evaluated
    work.run({slot: pairs, ...})            # experts that are resident now; any split into calls
    work.stop_reading()                     # before a slot of those experts is overwritten
    y = work.result()                       # (tokens, top_k, hidden)
    y = work.combined(scores)               # or (tokens, hidden), weighted by (tokens, top_k)

A pair is one (token, choice) of the router, numbered token * top_k + choice. The bits of a pair's
result depend on its expert and on the pairs of that expert in this call (of the numba kernels: on
whether they are few). They do not depend on slots or on how the experts are split into `run`
calls: that is what makes streaming exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .slot_memory import SlotMemory


class ExpertWork(ABC):
    """The experts of one layer applied to the tokens of one input of one call.

    Attributes:
        lazy: whether what `result` and `combined` return reads slots when it is evaluated.
    """

    lazy = False

    @abstractmethod
    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        """Compute the pairs of resident experts.

        Args:
            experts: slot -> numbers of the pairs of the expert in it.
        """

    @abstractmethod
    def stop_reading(self) -> None:
        """Return when nothing that was run reads its slots any more."""

    @abstractmethod
    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden)."""

    @abstractmethod
    def combined(self, scores: mx.array) -> mx.array:
        """Return the sum over each token's choices, each times its score: (tokens, hidden).

        scores: (tokens, top_k).
        """

    def combined_with(
        self, scores: mx.array, *, shared: Any = None, residual: mx.array | None = None
    ) -> mx.array:
        """Return `combined` with more terms, which are added in the same launch.

        Args:
            shared: the shared expert, as the backend takes it. Only where it has kernels.
            residual: (tokens, hidden). Only where it has kernels.
        """
        if shared is not None or residual is not None:
            raise NotImplementedError(f"{type(self).__name__} adds nothing to its sum")
        return self.combined(scores)


class ExpertObserver(Protocol):
    """Is told what enters the experts of each layer, as when a quantisation is calibrated."""

    def hidden(self, layer: int, x: np.ndarray) -> None:
        """Take the tokens that enter a layer's experts, x (tokens, hidden) float32."""

    def intermediate(self, layer: int, slot: int, h: np.ndarray) -> None:
        """Take what enters the down projection of the expert in `slot`.

        h: (pairs, intermediate) float32.
        """


class Backend(ABC):
    """One way to compute the layers of a model.

    Attributes:
        name: as `FLASHMOE_OPS` and the figures of an answer have it.
        activations: the values of that option which it computes with, the default first.
        computes_as_loaded: whether each expert is computed as soon as its bytes have arrived.
            False: launches are what costs, so a call waits for all reads that there are slots for.
        fuses_blocks: whether MoE blocks are replaced by `models.fused_blocks` before the dense
            layers are.
        kept_nbytes: what MLX may keep of freed memory while prompts go through the layers. Where it
            is not 0, the host prepares a layer while the GPU computes the one before.
        stacks_sequences: whether one token of each of several sequences can go through a layer as
            one array, (sequences, 1, hidden), with the bits that each sequence has alone.
    """

    name: str
    activations: tuple[str, ...] = ("float32",)
    computes_as_loaded = False
    fuses_blocks = False
    kept_nbytes = 0
    stacks_sequences = False

    @abstractmethod
    def start(
        self, slots: SlotMemory, x: mx.array, top_k: int, *, separate: bool = False
    ) -> ExpertWork:
        """Start the work of one layer on the tokens x, (tokens, hidden), evaluated.

        Args:
            separate: each token belongs to a sequence of its own, so that its bits must be those
                that it has alone. Only where `stacks_sequences`.
        """

    def start_resident(self, slots: SlotMemory, x: mx.array, indices: mx.array) -> ExpertWork:
        """Start work on experts that are all in the slot of their own number; evaluates nothing.

        Only where `has_kernels`, and for many tokens of `many_dtype`.

        Args:
            x, indices: (..., hidden) and (..., top_k).
        """
        raise NotImplementedError(f"the {self.name} backend has no kernels that read all slots")

    def run_all(
        self, works: Sequence[ExpertWork], experts: Sequence[Mapping[int, np.ndarray]]
    ) -> None:
        """Do `run` of several works of one layer, each with its own experts."""
        for work, mine in zip(works, experts, strict=True):
            work.run(mine)

    def weighted_sum(self, y: mx.array, scores: mx.array) -> mx.array:
        """Return what `ExpertWork.combined` makes of `ExpertWork.result`.

        Args:
            y: (tokens, top_k, hidden).
            scores: (tokens, top_k).

        Returns:
            (tokens, hidden).
        """
        return (y * scores[..., None]).sum(axis=-2)

    def add_and_norm(
        self, layer: nn.Module, x: mx.array, attended: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return x + attended, and its norm, in the middle of a decoder layer.

        x, attended: (..., hidden), of tokens of answers.
        """
        h = x + attended
        return h, layer.post_attention_layernorm(h)

    def has_kernels(self, slots: SlotMemory) -> bool:
        """Return whether flashmoe's own GPU kernels compute the experts of this layer."""
        return False

    def many_dtype(self, slots: SlotMemory) -> mx.Dtype | None:
        """Return the dtype of tokens of which kernels take any number, None where none do."""
        return None

    @abstractmethod
    def set_dtypes(self, model: nn.Module) -> None:
        """Convert the dense weights of a model, evaluated or not, to this backend's dtypes."""

    def prepare_layers(self, model: nn.Module, head: nn.Module | None) -> None:
        """Replace the dense layers of a model by those of this backend; after `set_dtypes`.

        Args:
            head: the output projection, None when the embedding is used for it.
        """
        return None
