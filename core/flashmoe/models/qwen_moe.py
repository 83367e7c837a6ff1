"""Subclass mlx-lm's Qwen MoE models so that their experts stay on disk.

What changes: expert weights are not loaded, the MoE blocks start the reads before they compute the
shared expert, and the router may be pruned to its top K. Embedding, attention, caches, masks and
the head are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5_moe, qwen3_moe, qwen3_next

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import SettingError
from ..memory.budget import MemoryPlan
from ..ops import backend as backends
from ..ops.recast import recast
from ..streaming.block import ExpertBlock, StartedCall
from ..streaming.compute import Backend
from ..streaming.cuda import device_memory
from ..streaming.elastic_slots import ElasticSlots
from ..streaming.reader import Reader, ReadStats
from ..streaming.slot_memory import SlotMemory
from ..streaming.switch_glu import LayerHooks, StreamingSwitchGLU

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


@dataclass(frozen=True)
class StreamingStats:
    """What streaming did since the model was loaded; subtract two for what lies between.

    Attributes:
        needed: experts that calls needed, each counted once per layer and call.
        loaded: the needed experts that were read from disk.
        reads: what the reader did.
    """

    needed: int
    loaded: int
    reads: ReadStats

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were resident, 0..1."""
        return 1 - self.loaded / self.needed if self.needed else 0.0

    def __sub__(self, earlier: StreamingStats) -> StreamingStats:
        return StreamingStats(
            self.needed - earlier.needed, self.loaded - earlier.loaded, self.reads - earlier.reads
        )


def streaming_layers(
    checkpoint: Checkpoint,
    slots: int,
    reader: Reader,
    backend: Backend,
    hooks: LayerHooks,
    activations: str,
) -> dict[int, StreamingSwitchGLU]:
    """Return a switch with `slots` slots for each MoE layer of a checkpoint, by its index."""
    gpu, device = backends.on_gpu(), device_memory()
    switches = {}
    for index, layer in checkpoint.expert_layers.items():
        memory = SlotMemory(layer, slots, on_gpu=gpu, device=device, activations=activations)
        switches[index] = StreamingSwitchGLU(memory, reader, backend, hooks)
    return switches


class StreamingMoE(nn.Module):
    """What the streaming models have beyond mlx-lm's models: a mixin in front of the model class.

    Attributes:
        checkpoint: the checkpoint that the experts are read from.
        plan: how the memory was split.
        reader: the reader that all layers share.
        backend: computes the layers.
        hooks: called while the layers run.
        elastic_slots: changes the number of slots.
        activations: see `flashmoe.ops.activations`.
        held: how many experts of a layer may be in slots here: all, or those of this machine.
        remote_bytes: returns the bytes that the other machines of a cluster have read.
    """

    checkpoint: Checkpoint
    plan: MemoryPlan
    reader: Reader
    backend: Backend
    hooks: LayerHooks
    elastic_slots: ElasticSlots
    activations: str
    held: int
    remote_bytes: Callable[[], int]
    block: type[ExpertBlock]

    def sanitize(self, weights: dict) -> dict:
        """Drop the expert weights, then do what mlx-lm does.

        mx.load is lazy: an expert tensor that is dropped here is never read.
        """
        dense = {t.name for t in self.checkpoint.dense}
        kept = {k: v for k, v in weights.items() if k in dense}
        return super().sanitize(kept)  # type: ignore[misc]  # of the model class behind this one

    def stream_from(
        self,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        reader: Reader,
        backend: Backend,
        activations: str,
        held: int,
    ) -> None:
        """Replace the expert blocks, before the weights are loaded."""
        self.checkpoint, self.plan, self.reader = checkpoint, plan, reader
        self.backend, self.activations, self.held = backend, activations, held
        self.remote_bytes = lambda: 0
        self.hooks = LayerHooks()
        slots = max(plan.slots_per_layer, plan.most_slots)
        switches = streaming_layers(checkpoint, slots, reader, backend, self.hooks, activations)
        # The block keeps its router and its shared expert under mlx-lm's names.
        blocks = {id(self.layers[index].mlp) for index in switches}
        recast(self, lambda path, module: self.block if id(module) in blocks else None)
        for index, switch in switches.items():
            self.layers[index].mlp.switch_mlp = switch
        self.elastic_slots = ElasticSlots(
            checkpoint, plan, list(switches.values()), on_gpu=backends.on_gpu()
        )
        self.hooks.between_layers = self.elastic_slots.shrink_if_short

    @property
    def experts(self) -> int:
        """K in use: the experts that the router picks for a token."""
        return next(iter(self.blocks.values())).top_k

    @experts.setter
    def experts(self, k: int | None) -> None:
        k = self.check_experts(k)
        for block in self.blocks.values():
            block.top_k = k

    def check_experts(self, k: int | None) -> int:
        """Return K as given, or the trained one.

        Raises:
            SettingError: the model cannot run with it.
        """
        k = check_experts(k, self.checkpoint)
        if min(k, self.held) > self.plan.slots_per_layer:
            raise SettingError(
                f"experts={k} needs {k} slots in each layer, and the model was loaded with "
                f"{self.plan.slots_per_layer}: load it with experts={k} or with more memory"
            )
        return k

    @contextmanager
    def pruned_to(self, k: int | None) -> Iterator[None]:
        """Run with the router pruned to its top K (None: leave K as it is)."""
        before = self.experts
        self.experts = before if k is None else k
        try:
            yield
        finally:
            self.experts = before

    @property
    def stats(self) -> StreamingStats:
        """What streaming did since the model was loaded."""
        reads = self.reader.stats
        stats = [block.switch_mlp.stats for block in self.blocks.values()]
        return StreamingStats(
            needed=sum(s.needed for s in stats),
            loaded=sum(s.loaded for s in stats),
            reads=replace(reads, bytes=reads.bytes + self.remote_bytes()),
        )

    def next_logits(self, tokens: list[int], cache: list) -> mx.array:
        """Take tokens into the prompt cache; return the logits (1, vocabulary) after the last one.

        mlx-lm's own call computes the logits of all the tokens; here the head sees one row.
        """
        return self.logits(self.text.model(mx.array([tokens]), cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits (1, vocabulary) after the last token.

        hidden: (1, tokens, hidden), normed.
        """
        return self.head(hidden[:, -1:])[:, 0]

    def logits_of(self, hidden: Sequence[mx.array]) -> list[mx.array]:
        """Return the logits of several sequences; the weights of the head are read once.

        hidden: (1, 1, hidden) each -> (1, vocabulary) each.
        """
        if not self.backend.stacks_sequences or len(hidden) < 2:
            return [self.logits(h) for h in hidden]
        logits = self.logits(mx.concatenate(list(hidden)))
        return [logits[i : i + 1] for i in range(len(hidden))]

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits (1, tokens, vocabulary) of hidden (1, tokens, hidden), normed."""
        if self.text.args.tie_word_embeddings:
            return self.text.model.embed_tokens.as_linear(hidden)
        return self.text.lm_head(hidden)

    def close(self) -> None:
        """End the reader's threads. The model cannot be used after that."""
        self.reader.close()

    @property
    def text(self) -> nn.Module:
        """mlx-lm's language model, which qwen3_5_moe nests."""
        model: Any = getattr(self, "language_model", self)
        return model

    @property
    def blocks(self) -> dict[int, ExpertBlock]:
        """The MoE blocks by the index of their layer."""
        return {index: self.layers[index].mlp for index in self.checkpoint.expert_layers}


class Qwen3_5Moe(StreamingMoE, qwen3_5_moe.Model):
    """Qwen3.5-MoE: gated attention and GatedDeltaNet layers, a shared expert."""

    block = SharedExpertBlock


class Qwen3Next(StreamingMoE, qwen3_next.Model):
    """Qwen3-Next: as Qwen3.5-MoE, with other projections."""

    block = SharedExpertBlock


class Qwen3Moe(StreamingMoE, qwen3_moe.Model):
    """Qwen3-MoE: attention layers, no shared expert."""

    block = RoutedBlock


#: model_type of config.json -> the model's class and the class of its arguments.
FAMILIES = {
    "qwen3_5_moe": (Qwen3_5Moe, qwen3_5_moe.ModelArgs),
    "qwen3_next": (Qwen3Next, qwen3_next.ModelArgs),
    "qwen3_moe": (Qwen3Moe, qwen3_moe.ModelArgs),
}
