"""mlx-lm's Qwen MoE models with experts that stay on disk.

Each family is a subclass of mlx-lm's model. What changes: expert weights are not loaded, the MoE
blocks start the reads before they compute the shared expert, and the router may be pruned to its
top K. Embedding, attention, caches, masks and the head are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5_moe, qwen3_moe, qwen3_next

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import SettingError
from ..memory import budget as memory_module
from ..ops import backend as ops
from ..streaming.cuda import device_memory
from ..streaming.elastic_slots import ElasticSlots
from ..streaming.reader import Reader, ReadStats
from ..streaming.slot_memory import SlotMemory
from ..streaming.switch_glu import LayerHooks, StreamingSwitchGLU

if TYPE_CHECKING:
    from ..cluster.lead import Cluster


def route(block: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's router: (indices, scores), each (..., top_k), in the dtypes and order it gives."""
    gates = mx.softmax(block.gate(x), axis=-1, precise=True)
    k = block.top_k
    indices = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    if block.norm_topk_prob:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores


class SharedExpertBlock(qwen3_next.Qwen3NextSparseMoeBlock):
    """The MoE block of qwen3_next and qwen3_5_moe."""

    def __call__(self, x: mx.array) -> mx.array:
        return next(self.sweep([x]))

    def sweep(self, xs: Sequence[mx.array]) -> Iterator[mx.array]:
        """The block applied to pieces, whose experts are read once for all of them. The reads
        start at once; the experts are computed when results are asked for."""
        routed = [route(self, x) for x in xs]
        call = self.switch_mlp.start([(x, i) for x, (i, _) in zip(xs, routed, strict=True)])
        shared = [self.shared(x) for x in xs]
        # Let it run while the reads are in flight.
        mx.async_eval(shared)
        return self._sums(call, [scores for _, scores in routed], shared)

    def _sums(self, call, scores, shared) -> Iterator[mx.array]:
        for y, s in zip(call.finish(scores), shared, strict=True):
            yield y + s

    def shared(self, x: mx.array) -> mx.array:
        """What the shared expert adds."""
        return mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class RoutedBlock(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """The MoE block of qwen3_moe, which has no shared expert."""

    def __call__(self, x: mx.array) -> mx.array:
        return next(self.sweep([x]))

    def sweep(self, xs: Sequence[mx.array]) -> Iterator[mx.array]:
        """As in `SharedExpertBlock`."""
        routed = [route(self, x) for x in xs]
        call = self.switch_mlp.start([(x, i) for x, (i, _) in zip(xs, routed, strict=True)])
        return self._sums(call, [scores for _, scores in routed], [x.dtype for x in xs])

    def _sums(self, call, scores, dtypes) -> Iterator[mx.array]:
        for y, dtype in zip(call.finish(scores), dtypes, strict=True):
            yield y.astype(dtype)


@dataclass(frozen=True)
class StreamingStats:
    """What streaming did since the model was loaded; subtract two for what lies between."""

    needed: int  # experts that calls needed, each once per layer and call
    loaded: int  # of these, the ones read from disk
    reads: ReadStats

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were resident, 0..1."""
        return 1 - self.loaded / self.needed if self.needed else 0.0

    def __sub__(self, earlier: StreamingStats) -> StreamingStats:
        return StreamingStats(
            self.needed - earlier.needed, self.loaded - earlier.loaded, self.reads - earlier.reads
        )


class StreamingMoE:
    """What the streaming models have beyond mlx-lm's. A mixin in front of its model class.

    Attributes:
        checkpoint: the checkpoint that the experts are read from.
        plan: how the memory was split.
        reader: the reader that all layers share.
        watch: its check is called between experts.
        room: how many slots there are now.
        activations: see `flashmoe.ops.activations`.
        ops: the name of the module of `flashmoe.ops` that computes the experts.
        held: how many experts of a layer may be in slots here: all, or those of this host.
        cluster: the other hosts, None without any.
    """

    checkpoint: Checkpoint
    plan: memory_module.Plan
    reader: Reader
    watch: LayerHooks
    room: ElasticSlots
    activations: str
    ops: str
    held: int
    cluster: Cluster | None
    block: type[nn.Module]

    def sanitize(self, weights: dict) -> dict:
        # mx.load is lazy: an expert tensor that is dropped here is never read.
        dense = {t.name for t in self.checkpoint.dense}
        return super().sanitize({k: v for k, v in weights.items() if k in dense})

    def stream_from(
        self,
        checkpoint: Checkpoint,
        plan: memory_module.Plan,
        reader: Reader,
        activations: str,
        held: int,
    ) -> None:
        """Replace the expert blocks, before the weights are loaded."""
        self.held, self.cluster = held, None
        self.checkpoint, self.plan, self.reader = checkpoint, plan, reader
        self.activations = activations
        self.watch = LayerHooks()
        module = ops.pick()
        self.ops = module.NAME
        slots = max(plan.slots_per_layer, plan.most_slots)
        device = device_memory()
        for index, layer in checkpoint.expert_layers.items():
            block = self.layers[index].mlp
            bank = SlotMemory(
                layer, slots, on_gpu=ops.on_gpu(), device=device, activations=activations
            )
            block.switch_mlp = StreamingSwitchGLU(bank, reader, module, self.watch)
            # In place: the block keeps its router and its shared expert under mlx-lm's names.
            block.__class__ = self.block
        switches = [block.switch_mlp for block in self._blocks]
        self.room = ElasticSlots(checkpoint, plan, switches)
        self.watch.between = self.room.look

    @property
    def experts(self) -> int:
        """K in use: the experts that the router picks for a token."""
        return self._blocks[0].top_k

    @experts.setter
    def experts(self, k: int | None) -> None:
        k = self.check_experts(k)
        for block in self._blocks:
            block.top_k = k

    def check_experts(self, k: int | None) -> int:
        """K as given, or the trained one.

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
    def pruned_to(self, k: int | None):
        """Run with the router pruned to its top K (None: leave K as it is)."""
        before = self.experts
        self.experts = before if k is None else k
        try:
            yield self
        finally:
            self.experts = before

    @property
    def stats(self) -> StreamingStats:
        reads = self.reader.stats
        if self.cluster is not None:
            reads = replace(reads, bytes=reads.bytes + self.cluster.elsewhere)
        return StreamingStats(
            needed=sum(b.switch_mlp.stats.needed for b in self._blocks),
            loaded=sum(b.switch_mlp.stats.loaded for b in self._blocks),
            reads=reads,
        )

    def next_logits(self, tokens: list[int], cache: list) -> mx.array:
        """Take tokens into the prompt cache: the logits (1, vocabulary) after the last one.

        mlx-lm's own call computes those of all the tokens; here the head sees one row.
        """
        return self.logits(self.text.model(mx.array([tokens]), cache))

    @property
    def stacks(self) -> bool:
        """Whether a token of each of several sequences can go through it as one array."""
        return ops.pick(self.ops).stacks_sequences

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden: (1, tokens, hidden), normed -> the logits (1, vocabulary) after the last one."""
        return self.head(hidden[:, -1:])[:, 0]

    def logits_of(self, hidden: Sequence[mx.array]) -> list[mx.array]:
        """The same of several sequences, (1, 1, hidden) each: the weights are read once."""
        if not self.stacks or len(hidden) < 2:
            return [self.logits(h) for h in hidden]
        found = self.logits(mx.concatenate(list(hidden)))
        return [found[i : i + 1] for i in range(len(hidden))]

    def head(self, hidden: mx.array) -> mx.array:
        """hidden: (1, tokens, hidden), normed -> the logits (1, tokens, vocabulary)."""
        if self.text.args.tie_word_embeddings:
            return self.text.model.embed_tokens.as_linear(hidden)
        return self.text.lm_head(hidden)

    def close(self) -> None:
        """End the reader's threads. The model cannot be used after that."""
        self.reader.close()

    @property
    def text(self) -> nn.Module:
        """mlx-lm's language model, which qwen3_5_moe nests."""
        return getattr(self, "language_model", self)

    @property
    def _blocks(self) -> list[nn.Module]:
        return [self.layers[i].mlp for i in self.checkpoint.expert_layers]


class Qwen3_5Moe(StreamingMoE, qwen3_5_moe.Model):
    block = SharedExpertBlock


class Qwen3Next(StreamingMoE, qwen3_next.Model):
    block = SharedExpertBlock


class Qwen3Moe(StreamingMoE, qwen3_moe.Model):
    block = RoutedBlock


FAMILIES = {
    "qwen3_5_moe": (Qwen3_5Moe, qwen3_5_moe.ModelArgs),
    "qwen3_next": (Qwen3Next, qwen3_next.ModelArgs),
    "qwen3_moe": (Qwen3Moe, qwen3_moe.ModelArgs),
}
