"""`StreamingSwitchGLU`: the expert block whose experts stay on disk.

It takes the place of mlx-lm's `SwitchGLU`. One call: look at the router's choice, start the reads
of the experts that are not resident, compute the resident ones meanwhile, then compute each of
the others when it has landed. A call of many tokens (prefill) is the same, expert by expert: each
expert of the union is read once, and as many reads are in flight as there are slots to take them.
A call may have several inputs, the pieces of a prompt: they share the reads, and the bits of each
are those that it would have alone.

Why a slot may be overwritten: a call begins by evaluating what the one before it gave, if that is
still lazy. So no pending computation reads a slot when `Slots.take` gives it away, except those of
the call's own experts, in `_pinned`. Most calls find nothing to evaluate there: their router's
input depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ReadError
from .device_copy import Mailbox
from .reader import Reader
from .slot_memory import SlotMemory
from .slot_table import SlotTable


@dataclass
class SwitchStats:
    """Counts of one layer since it was made."""

    needed: int = 0  # experts that calls needed, each once per call
    loaded: int = 0  # of these, the ones that were read from disk


class LayerHooks:
    """Lets the owner of a model leave a call between two experts: a long prompt takes minutes.

    Attributes:
        check: called with nothing; what it raises ends the call.
        entered: called with the index of each layer whose experts are next.
        between: called with nothing, between two layers.
    """

    def __init__(self):
        self.check: Callable[[], None] = lambda: None
        self.entered: Callable[[int], None] = lambda layer: None
        self.between: Callable[[], None] = lambda: None


class StreamingSwitchGLU(nn.Module):
    """The routed experts of one layer.

    Args:
        bank: the memory of the slots.
        reader: reads expert parts into the bank; shared by all layers.
        ops: a module of `flashmoe.ops`.
        watch: looked at between experts; shared by all layers.
    """

    def __init__(self, bank: SlotMemory, reader: Reader, ops: ModuleType, watch: LayerHooks):
        super().__init__()
        self._bank = bank
        self._reader = reader
        self._ops = ops
        self._slots = SlotTable(bank.num_slots, bank.layer.num_experts)
        self.stats = SwitchStats()
        self._watch = watch
        self._settled = False
        # Results that may be lazy, and then read the slots when they are evaluated.
        self._given: list[mx.array] = []
        # Experts that have a slot whose bytes have not all arrived -> their reads, None before
        # they are known. It outlives a call, so that one that was interrupted leaves no slot that
        # looks ready and is not.
        object.__setattr__(self, "_loading", {})

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x: (..., hidden), indices: (..., top_k) -> (..., top_k, hidden)."""
        return next(self.start([(x, indices)]).finish())

    def mailbox(self, words: int) -> Mailbox | None:
        """Where a router can leave its choice for `start`; None where it need not."""
        return self._bank.device and self._bank.device.mailbox(words)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert."""
        return self._bank.layer.expert_nbytes

    def weighted_sum(self, y: mx.array, scores: mx.array) -> mx.array:
        """The sum over a token's choices, each times its score, as a call makes it.

        y: (tokens, top_k, hidden), scores: (tokens, top_k) -> (tokens, hidden).
        """
        return self._ops.weighted_sum(y, scores)

    @property
    def fused(self) -> bool:
        """Whether our GPU kernels can read the experts."""
        return self._bank.on_gpu and self._bank.matrices() is not None

    @property
    def settled(self) -> bool:
        """Whether every expert is in the slot of its own number, for good. A router's indices are
        slots then, and the host need not look at them."""
        if not self._settled:
            self._settled = self._slots.settled and not self._loading
        return self._settled

    def enter(self, top_k: int) -> None:
        """What a call of a settled layer does besides `work`, for one token."""
        self._watch.between()
        self._watch.entered(self._bank.layer.layer)
        self._watch.check()
        self.stats.needed += top_k

    def work(self, x: mx.array, indices: mx.array):
        """The work of a settled layer, x (..., hidden) and indices (..., top_k): no expert is
        read, and nothing evaluated."""
        work = self._ops.Work(self._bank, x, indices.shape[-1])
        work.run_chosen(indices)
        return work

    def start(
        self,
        inputs: Sequence[tuple[mx.array, mx.array]],
        look: Callable[[mx.array], np.ndarray] = np.array,
    ) -> Call:
        """Start the reads that a call needs. Evaluates the inputs.

        inputs: x (..., hidden) and indices (..., top_k) of each piece.
        look: what the host sees of evaluated indices.
        """
        self._watch.between()
        self._watch.entered(self._bank.layer.layer)
        for expert, pending in list(self._loading.items()):
            # Left by a call that did not finish. If the read failed and the expert is needed
            # again, it is read again, and that call reports.
            if pending is None:
                self._reader.wait_idle()
                self._forget(expert)
            else:
                with suppress(ReadError):
                    self.landed(expert)
        return Call(self, inputs, look)

    def load(self, expert: int, pinned: set[int]) -> bool:
        """Start to read an expert, if a slot can be had without evicting a pinned expert."""
        # Listed first: wherever an interrupt falls, an expert that was not read whole is listed.
        self._loading[expert] = None
        slot = self._slots.take(expert, pinned)
        if slot is None:
            del self._loading[expert]
            return False
        self._loading[expert] = self._reader.submit(self._bank.requests(expert, slot))
        return True

    def landed(self, expert: int) -> int:
        """Wait until the expert's bytes are in its slot; the slot.

        Raises:
            ReadError: they could not be read. The expert is then not resident any more.
        """
        if expert in self._loading:
            try:
                self._loading[expert].wait()
            except Exception:
                self._forget(expert)
                raise
            del self._loading[expert]
        return self._slots.lookup(expert)

    def resize(self, num_slots: int) -> None:
        """Use another number of slots; not during a call. Memory of slots out of use is freed."""
        self._settled = False
        for slot in self._slots.resize(num_slots, self._loading):
            self._bank.release(slot)

    def _forget(self, expert: int) -> None:
        if self._slots.lookup(expert) is not None:
            self._slots.drop(expert)
        del self._loading[expert]


class Call:
    """One call of a StreamingSwitchGLU, between its `start` and its `finish`."""

    def __init__(self, switch: StreamingSwitchGLU, inputs, look):
        self._switch = switch
        self._shapes = [(*indices.shape, x.shape[-1]) for x, indices in inputs]
        mx.eval(inputs, switch._given)
        switch._given = []
        rows = [x.reshape(-1, x.shape[-1]) for x, _ in inputs]
        self._works = [
            switch._ops.Work(switch._bank, x, indices.shape[-1], **_alone(switch._ops, indices))
            for x, (_, indices) in zip(rows, inputs, strict=True)
        ]
        # Expert -> its pairs in each input that has any: (number of the input, pairs).
        self._pairs: dict[int, list[tuple[int, np.ndarray]]] = {}
        for i, (_, indices) in enumerate(inputs):
            for expert, pairs in _by_expert(look(indices)):
                self._pairs.setdefault(expert, []).append((i, pairs))
        counts = {e: sum(p.size for _, p in pairs) for e, pairs in self._pairs.items()}
        switch._slots.touch(counts, tokens=sum(len(x) for x in rows))

        # In the order of the file, whichever piece needs them first.
        experts = sorted(self._pairs)
        self._ready = [e for e in experts if switch._slots.lookup(e) is not None]
        self._missing = deque(e for e in experts if switch._slots.lookup(e) is None)
        self._landing: deque[int] = deque()
        self._pinned = set(self._ready)
        switch.stats.needed += len(self._pairs)
        switch.stats.loaded += len(self._missing)
        self._load_ahead()

    def finish(
        self,
        scores: Sequence[mx.array] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[mx.array]:
        """Compute all experts of the call, then give the result of each input in turn.

        That is (..., hidden), the sum of its experts weighted by scores (..., top_k); without
        scores (..., top_k, hidden).

        extras: what else the `combined` of the ops takes, for each input.

        Raises:
            ReadError: an expert could not be read.
        """
        while self._ready or self._landing:
            self._switch._watch.check()
            self._add_landed()
            self._run({e: self._switch.landed(e) for e in self._ready})
            # Computed experts may be evicted from here on.
            self._pinned.difference_update(self._ready)
            self._ready = []
            if self._missing:
                for work in self._works:
                    work.settle()
                self._load_ahead()
        self._works.reverse()  # each result is dropped when the next one is asked for
        if scores is None:
            return (self._works.pop().result().reshape(shape) for shape in self._shapes)
        extras = extras or [{}] * len(scores)
        return (self._combined(s, extra) for s, extra in zip(scores, extras, strict=True))

    def _add_landed(self) -> None:
        """Take those that have landed to the ready ones, waiting where nothing else can be done."""
        if not self._switch._ops.computes_as_loaded:
            self._ready += self._landing
            self._landing.clear()
            return
        if not self._ready:
            self._ready = [self._landing.popleft()]
            while self._landing and self._switch._loading[self._landing[0]].done():
                self._ready.append(self._landing.popleft())

    def _combined(self, scores: mx.array, extra: dict[str, Any]) -> mx.array:
        work = self._works.pop()
        y = work.combined(scores.reshape(-1, scores.shape[-1]), **extra)
        if work.lazy:
            self._switch._given.append(y)
        return y.reshape(*scores.shape[:-1], -1)

    def _run(self, slots: dict[int, int]) -> None:
        """Compute the pairs of resident experts: expert -> slot."""
        mine: list[dict[int, np.ndarray]] = [{} for _ in self._works]
        for expert, slot in slots.items():
            for i, pairs in self._pairs[expert]:
                mine[i][slot] = pairs
        works = [
            (work, experts) for work, experts in zip(self._works, mine, strict=True) if experts
        ]
        run_all = getattr(self._switch._ops, "run_all", None)
        if works and run_all is not None:
            run_all(*zip(*works, strict=True))
            return
        for work, experts in works:
            work.run(experts)

    def _load_ahead(self) -> None:
        """Start as many of the missing experts' reads as there are slots to take them."""
        while self._missing and self._switch.load(self._missing[0], self._pinned):
            expert = self._missing.popleft()
            self._pinned.add(expert)
            self._landing.append(expert)


def are_separate_sequences(indices: mx.array) -> bool:
    """Whether indices (sequences, tokens, top_k) are of several sequences of one token."""
    return indices.ndim > 2 and indices.shape[-2] == 1 and indices.shape[0] > 1


def _alone(ops: ModuleType, indices: mx.array) -> dict[str, bool]:
    return {"alone": True} if are_separate_sequences(indices) and ops.stacks_sequences else {}


def _by_expert(indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The pairs of each expert that a router chose, by expert. See `flashmoe.ops` for pairs."""
    chosen = indices.reshape(-1)
    order = np.argsort(chosen, kind="stable")
    experts, first = np.unique(chosen[order], return_index=True)
    return zip(experts.tolist(), np.split(order, first[1:]), strict=True)
