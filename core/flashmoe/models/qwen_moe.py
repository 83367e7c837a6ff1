"""Subclass mlx-lm's Qwen MoE models so that their experts stay on disk.

What changes: expert weights are not loaded, the MoE blocks start the reads before they compute the
shared expert, and the router may be pruned to its top K. Embedding, attention, caches, masks and
the head are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5_moe, qwen3_moe, qwen3_next

from ..ops.recast import recast
from ..streaming.block import ExpertBlock, ExpertSwitch, StartedCall
from ..streaming.switch_glu import StreamingSwitchGLU
from .streaming_moe import StreamingMoE, streaming_layers

# The blocks below are mlx-lm's but for `switch_mlp`, which type checkers see as a conflict.


def route(block: Any, x: mx.array) -> tuple[mx.array, mx.array]:
    """Return mlx-lm's choice of experts, in the dtypes and order that it gives.

    Args:
        block: a MoE block of mlx-lm.
        x: (..., hidden).

    Returns:
        Indices and scores, (..., top_k) each.
    """
    gates = mx.softmax(block.gate(x), axis=-1, precise=True)
    k = block.top_k
    indices = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    if block.norm_topk_prob:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores


class SharedExpertBlock(ExpertBlock, qwen3_next.Qwen3NextSparseMoeBlock):  # type: ignore[misc]
    """The MoE block of qwen3_next and qwen3_5_moe, which has a shared expert."""

    def run(
        self, xs: Sequence[mx.array], residuals: Sequence[mx.array | None]
    ) -> Iterator[mx.array]:
        call, scores = _start(self, xs)
        shared = [self.shared(x) for x in xs]
        # Let it run while the reads are in flight.
        mx.async_eval(shared)
        return _sums(call, scores, shared, residuals)

    def shared(self, x: mx.array) -> mx.array:
        """Return what the shared expert adds, (..., hidden)."""
        return mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class RoutedBlock(ExpertBlock, qwen3_moe.Qwen3MoeSparseMoeBlock):  # type: ignore[misc]
    """The MoE block of qwen3_moe, which has no shared expert."""

    def run(
        self, xs: Sequence[mx.array], residuals: Sequence[mx.array | None]
    ) -> Iterator[mx.array]:
        call, scores = _start(self, xs)
        return _cast_sums(call, scores, xs, residuals)


def _start(block: ExpertBlock, xs: Sequence[mx.array]) -> tuple[StartedCall, list[mx.array]]:
    """Route the inputs of a block and start the reads of their experts; return the scores too."""
    routed = [route(block, x) for x in xs]
    call = block.switch_mlp.start([(x, i) for x, (i, _) in zip(xs, routed, strict=True)])
    return call, [scores for _, scores in routed]


def _sums(call: StartedCall, scores, shared, residuals) -> Iterator[mx.array]:
    for y, s, residual in zip(call.finish(scores), shared, residuals, strict=True):
        yield y + s if residual is None else residual + (y + s)


def _cast_sums(call: StartedCall, scores, xs, residuals) -> Iterator[mx.array]:
    for y, x, residual in zip(call.finish(scores), xs, residuals, strict=True):
        y = y.astype(x.dtype)
        yield y if residual is None else residual + y


class StreamingQwen(StreamingMoE):
    """What the three Qwen families have beyond mlx-lm's models.

    Attributes:
        block: their MoE block, flashmoe's own.
    """

    layerwise = True
    block: type[ExpertBlock]

    def put_switches(self, slots: int) -> dict[int, StreamingSwitchGLU]:
        switches = streaming_layers(
            self.checkpoint, slots, self.reader, self.backend, self.hooks, self.activations
        )
        # The block keeps its router and its shared expert under mlx-lm's names.
        blocks = {id(self.layers[index].mlp) for index in switches}
        recast(self, lambda path, module: self.block if id(module) in blocks else None)
        for index, switch in switches.items():
            self.set_switch(index, switch)
        return switches

    @property
    def switches(self) -> dict[int, ExpertSwitch]:
        return {index: block.switch_mlp for index, block in self.blocks.items()}

    def set_switch(self, index: int, switch: ExpertSwitch) -> None:
        self.layers[index].mlp.switch_mlp = switch

    @property
    def k_in_use(self) -> int:
        return next(iter(self.blocks.values())).top_k

    def set_k(self, k: int) -> None:
        for block in self.blocks.values():
            block.top_k = k

    def next_logits(self, tokens: list[int], cache: list) -> mx.array:
        """Take tokens into the prompt cache; return the logits (1, vocabulary) after the last one.

        mlx-lm's own call computes the logits of all the tokens; here the head sees one row.
        """
        return self.logits(self.text.model(mx.array([tokens]), cache))

    def logits_of(self, hidden: Sequence[mx.array]) -> list[mx.array]:
        """Return the logits of several sequences; the weights of the head are read once.

        hidden: (1, 1, hidden) each -> (1, vocabulary) each.
        """
        if not self.backend.stacks_sequences or len(hidden) < 2:
            return super().logits_of(hidden)
        logits = self.logits(mx.concatenate(list(hidden)))
        return [logits[i : i + 1] for i in range(len(hidden))]

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits (1, tokens, vocabulary) of hidden (1, tokens, hidden), normed."""
        if self.text.args.tie_word_embeddings:
            return self.text.model.embed_tokens.as_linear(hidden)
        return self.text.lm_head(hidden)

    @property
    def text(self) -> nn.Module:
        """mlx-lm's language model, which qwen3_5_moe nests."""
        model: Any = getattr(self, "language_model", self)
        return model

    @property
    def blocks(self) -> dict[int, ExpertBlock]:
        """The MoE blocks by the index of their layer."""
        return {index: self.layers[index].mlp for index in self.checkpoint.expert_layers}


class Qwen3_5Moe(StreamingQwen, qwen3_5_moe.Model):
    """Qwen3.5-MoE: gated attention and GatedDeltaNet layers, a shared expert."""

    block = SharedExpertBlock


class Qwen3Next(StreamingQwen, qwen3_next.Model):
    """Qwen3-Next: as Qwen3.5-MoE, with other projections."""

    block = SharedExpertBlock


class Qwen3Moe(StreamingQwen, qwen3_moe.Model):
    """Qwen3-MoE: attention layers, no shared expert."""

    block = RoutedBlock
