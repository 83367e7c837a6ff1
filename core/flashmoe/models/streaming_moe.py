"""Define what a model of mlx-lm has beyond mlx-lm when its experts stay on disk.

`StreamingMoE` is a mixin in front of mlx-lm's model class: it drops the weights of experts, counts
what is read, sets K, and gives logits of last tokens. How experts get into a model is said by its
subclasses: `qwen_moe` for the families whose blocks are flashmoe's own, `generic_moe` for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import SettingError
from ..memory.budget import MemoryPlan
from ..ops import backend as backends
from ..streaming.block import ExpertSwitch
from ..streaming.compute import Backend
from ..streaming.cuda import device_memory
from ..streaming.elastic_slots import ElasticSlots
from ..streaming.expert_form import SWIGLU, ExpertForm
from ..streaming.reader import Reader, ReadStats
from ..streaming.slot_memory import SlotMemory
from ..streaming.switch_glu import LayerHooks, StreamingSwitchGLU


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
    forms: Mapping[int, ExpertForm] | None = None,
) -> dict[int, StreamingSwitchGLU]:
    """Return a switch with `slots` slots for each MoE layer of a checkpoint, by its index.

    Args:
        forms: what the experts compute, by the index of the layer. None: SwiGLU everywhere.
    """
    gpu, device = backends.on_gpu(), device_memory()
    switches = {}
    for index, layer in checkpoint.expert_layers.items():
        memory = SlotMemory(
            layer,
            slots,
            on_gpu=gpu,
            device=device,
            activations=activations,
            form=SWIGLU if forms is None else forms[index],
        )
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
    #: Whether `layerwise` takes chunks of several sequences through one layer after the other.
    layerwise = False

    def sanitize(self, weights: dict) -> dict:
        """Drop the expert weights, then do what mlx-lm does.

        mx.load is lazy: an expert tensor that is dropped here is never read.
        """
        dense = {t.name for t in self.checkpoint.dense}
        kept = {k: v for k, v in weights.items() if k in dense}
        own = getattr(super(), "sanitize", None)  # of the model class behind this one
        return kept if own is None else own(kept)

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
        switches = self.put_switches(max(plan.slots_per_layer, plan.most_slots))
        self.elastic_slots = ElasticSlots(
            checkpoint, plan, list(switches.values()), on_gpu=backends.on_gpu()
        )
        self.hooks.between_layers = self.elastic_slots.shrink_if_short

    def put_switches(self, slots: int) -> dict[int, StreamingSwitchGLU]:
        """Put switches with `slots` slots in the places of the routed experts; return them."""
        raise NotImplementedError

    @property
    def switches(self) -> dict[int, ExpertSwitch]:
        """What computes the routed experts, by the keys of `Checkpoint.expert_layers`."""
        raise NotImplementedError

    def set_switch(self, index: int, switch: ExpertSwitch) -> None:
        """Compute the routed experts of a layer in another way."""
        raise NotImplementedError

    @property
    def k_in_use(self) -> int:
        """K as the routers have it."""
        raise NotImplementedError

    def set_k(self, k: int) -> None:
        """Let the routers pick K experts."""
        raise NotImplementedError

    def finish_layers(self) -> None:
        """Do what has to wait until the backend has replaced the dense layers."""

    @property
    def experts(self) -> int:
        """K in use: the experts that the router picks for a token."""
        return self.k_in_use

    @experts.setter
    def experts(self, k: int | None) -> None:
        self.set_k(self.check_experts(k))

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
        stats = [switch.stats for switch in self.switches.values()]
        return StreamingStats(
            needed=sum(s.needed for s in stats),
            loaded=sum(s.loaded for s in stats),
            reads=replace(reads, bytes=reads.bytes + self.remote_bytes()),
        )

    def next_logits(self, tokens: list[int], cache: list) -> mx.array:
        """Take tokens into the prompt cache; return the logits (1, vocabulary) after the last one.

        mlx-lm's own call computes the logits of all the tokens; here the head sees one row.
        """
        raise NotImplementedError

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits (1, vocabulary) after the last token.

        hidden: (1, tokens, hidden), as `layerwise` returns it.
        """
        return self.head(hidden[:, -1:])[:, 0]

    def logits_of(self, hidden: Sequence[mx.array]) -> list[mx.array]:
        """Return the logits of several sequences.

        hidden: (1, 1, hidden) each -> (1, vocabulary) each.
        """
        return [self.logits(h) for h in hidden]

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits (1, tokens, vocabulary) of hidden (1, tokens, hidden)."""
        raise NotImplementedError

    def close(self) -> None:
        """End the reader's threads. The model cannot be used after that."""
        self.reader.close()
