"""Compute the routed experts of a layer whose experts stay on disk.

`StreamingSwitchGLU` takes the place of mlx-lm's `SwitchGLU`. A call looks at the router's choice,
starts the reads of the experts that are not resident, computes the resident ones meanwhile, then
computes each of the others when its bytes have arrived. A call of many tokens (prefill) is the
same, expert by expert: each expert of the union is read once, and as many reads are in flight as
there are slots for them. A call may have several inputs, the chunks of a prompt: they share the
reads, and the bits of each are those that it would have alone.

Why a slot may be overwritten: a call begins by evaluating what the one before it returned, if that
is still lazy. So no pending computation reads a slot when `SlotTable.allocate` gives it to another
expert, except those of the call's own experts, in `_pinned`. Most calls find nothing to evaluate
there: their router's input depends on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ReadError
from .block import ExpertSwitch, SwitchStats
from .compute import Backend, ExpertWork
from .device_copy import Mailbox
from .expert_form import ExpertForm
from .reader import PendingRead, Reader
from .slot_memory import SlotMemory
from .slot_table import SlotTable


class LayerHooks:
    """Functions that the layers of a model call while they run; a long prompt takes minutes.

    Attributes:
        check_cancelled: called between two experts; what it raises ends the call.
        layer_entered: called with the index of each layer whose experts are next.
        between_layers: called between two layers.
    """

    def __init__(self) -> None:
        self.check_cancelled: Callable[[], None] = lambda: None
        self.layer_entered: Callable[[int], None] = lambda layer: None
        self.between_layers: Callable[[], None] = lambda: None


class StreamingSwitchGLU(ExpertSwitch, nn.Module):
    """The routed experts of one layer.

    Args:
        memory: the memory of the slots.
        reader: reads the parts of experts into the slots; shared by all layers.
        backend: computes the experts.
        hooks: called while the layer runs; shared by all layers.
    """

    def __init__(self, memory: SlotMemory, reader: Reader, backend: Backend, hooks: LayerHooks):
        super().__init__()
        self._memory = memory
        self._reader = reader
        self._backend = backend
        self._table = SlotTable(memory.num_slots, memory.layer.num_experts)
        self._stats = SwitchStats()
        self._hooks = hooks
        self._fully_resident = False
        # Results that may be lazy, and then read the slots when they are evaluated.
        self._lazy_results: list[mx.array] = []
        # Experts that have a slot whose bytes have not all arrived -> their reads, None before
        # they are known. It outlives a call, so that one that was interrupted leaves no slot that
        # looks ready and is not.
        object.__setattr__(self, "_loading", {})

    _loading: dict[int, PendingRead | None]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Return the result of each chosen expert.

        x: (..., hidden), indices: (..., top_k) -> (..., top_k, hidden).
        """
        return next(self.start([(x, indices)]).finish())

    def mailbox(self, words: int) -> Mailbox | None:
        """Return host memory in which a router can leave its choice for `start`.

        None where the host may as well look at arrays.
        """
        device = self._memory.device
        return None if device is None else device.mailbox(words)

    @property
    def stats(self) -> SwitchStats:
        """Counts since the layer was made."""
        return self._stats

    @property
    def form(self) -> ExpertForm:
        """What an expert computes."""
        return self._memory.form

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert."""
        return self._memory.layer.expert_nbytes

    @property
    def evictions(self) -> int:
        """Experts that had to leave for another one since the layer was made."""
        return self._table.evictions

    def weighted_sum(self, y: mx.array, scores: mx.array) -> mx.array:
        """Return the sum over each token's choices, each times its score, as a call makes it.

        y: (tokens, top_k, hidden), scores: (tokens, top_k) -> (tokens, hidden).
        """
        return self._backend.weighted_sum(y, scores)

    @property
    def has_kernels(self) -> bool:
        """Whether flashmoe's own GPU kernels compute the experts."""
        return self._backend.has_kernels(self._memory)

    @property
    def many_dtype(self) -> mx.Dtype | None:
        """See `Backend.many_dtype`."""
        return self._backend.many_dtype(self._memory)

    @property
    def fully_resident(self) -> bool:
        """Whether every expert is in the slot of its own number, for good.

        A router's indices are slots then, and the host need not look at them.
        """
        if not self._fully_resident:
            self._fully_resident = self._table.is_identity and not self._loading
        return self._fully_resident

    def expert_in(self, slot: int) -> int | None:
        """Return the expert that is in `slot`, or None."""
        return self._table.expert_in(slot)

    def enter_resident(self, needed: int) -> None:
        """Do what a call of a fully resident layer does besides `start_resident`.

        needed: how many experts the call needs at most.
        """
        self._hooks.between_layers()
        self._hooks.layer_entered(self._memory.layer.layer)
        self._hooks.check_cancelled()
        self._stats.needed += needed

    def start_resident(self, x: mx.array, indices: mx.array) -> ExpertWork:
        """Start the work of a fully resident layer: no expert is read, and nothing evaluated.

        x: (..., hidden), indices: (..., top_k).
        """
        return self._backend.start_resident(self._memory, x, indices)

    def start(
        self,
        inputs: Sequence[tuple[mx.array, mx.array]],
        look: Callable[[mx.array], np.ndarray] = np.array,
    ) -> ExpertCall:
        """Start the reads that a call needs. Evaluates the inputs.

        Args:
            inputs: x (..., hidden) and indices (..., top_k) of each input.
            look: copies evaluated indices to numpy.
        """
        self._hooks.between_layers()
        self._hooks.layer_entered(self._memory.layer.layer)
        for expert, pending in list(self._loading.items()):
            # Left by a call that did not finish. If the read failed and the expert is needed
            # again, it is read again, and that call reports.
            if pending is None:
                self._reader.wait_idle()
                self._forget(expert)
            else:
                with suppress(ReadError):
                    self.wait_for(expert)
        return ExpertCall(self, inputs, look)

    def load(self, expert: int, pinned: set[int]) -> bool:
        """Start to read an expert, if a slot can be had without evicting a pinned expert."""
        # Listed first: wherever an interrupt falls, an expert that was not read whole is listed.
        self._loading[expert] = None
        slot = self._table.allocate(expert, pinned)
        if slot is None:
            del self._loading[expert]
            return False
        self._loading[expert] = self._reader.submit(self._memory.requests(expert, slot))
        return True

    def wait_for(self, expert: int) -> int:
        """Wait until the expert's bytes are in its slot; return the slot.

        Raises:
            ReadError: they could not be read. The expert is then not resident any more.
        """
        if expert in self._loading:
            pending = self._loading[expert]
            try:
                assert pending is not None, f"expert {expert} is listed before its read is known"
                pending.wait()
            except Exception:
                self._forget(expert)
                raise
            del self._loading[expert]
        slot = self._table.lookup(expert)
        assert slot is not None, f"expert {expert} has no slot"
        return slot

    def resize(self, num_slots: int) -> None:
        """Use another number of slots; not during a call. Memory of slots out of use is freed."""
        self._fully_resident = False
        for slot in self._table.resize(num_slots, self._loading):
            self._memory.release(slot)

    def _forget(self, expert: int) -> None:
        if self._table.lookup(expert) is not None:
            self._table.drop(expert)
        del self._loading[expert]


class ExpertCall:
    """One call of a StreamingSwitchGLU, between its `start` and its `finish`."""

    def __init__(self, switch: StreamingSwitchGLU, inputs, look):
        self._switch = switch
        self._shapes = [(*indices.shape, x.shape[-1]) for x, indices in inputs]
        mx.eval(inputs, switch._lazy_results)
        switch._lazy_results = []
        tokens = [x.reshape(-1, x.shape[-1]) for x, _ in inputs]
        backend = switch._backend
        self._works = [
            backend.start(
                switch._memory,
                x,
                indices.shape[-1],
                separate=backend.stacks_sequences and are_separate_sequences(indices),
            )
            for x, (_, indices) in zip(tokens, inputs, strict=True)
        ]
        # Expert -> its pairs in each input that has any: (number of the input, pairs).
        self._pairs: dict[int, list[tuple[int, np.ndarray]]] = {}
        for i, (_, indices) in enumerate(inputs):
            for expert, pairs in _by_expert(look(indices)):
                self._pairs.setdefault(expert, []).append((i, pairs))
        counts = {e: sum(p.size for _, p in pairs) for e, pairs in self._pairs.items()}
        switch._table.record_use(counts, tokens=sum(len(x) for x in tokens))

        # In the order of the file, whichever input needs them first.
        experts = sorted(self._pairs)
        self._ready = [e for e in experts if switch._table.lookup(e) is not None]
        self._missing = deque(e for e in experts if switch._table.lookup(e) is None)
        self._arriving: deque[int] = deque()
        self._pinned = set(self._ready)
        switch._stats.needed += len(self._pairs)
        switch._stats.loaded += len(self._missing)
        self._load_ahead()

    def finish(
        self,
        scores: Sequence[mx.array] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[mx.array]:
        """Compute all experts of the call, then yield the result of each input in turn.

        Args:
            scores: (..., top_k) of each input.
            extras: what `combined_with` of the backend's work takes, for each input.

        Yields:
            (..., hidden), the sum of the input's experts weighted by its scores; without scores
            (..., top_k, hidden).

        Raises:
            ReadError: an expert could not be read.
        """
        while self._ready or self._arriving:
            self._switch._hooks.check_cancelled()
            self._add_arrived()
            self._run({e: self._switch.wait_for(e) for e in self._ready})
            # Computed experts may be evicted from here on.
            self._pinned.difference_update(self._ready)
            self._ready = []
            if self._missing:
                for work in self._works:
                    work.stop_reading()
                self._load_ahead()
        self._works.reverse()  # each result is dropped when the next one is asked for
        if scores is None:
            return (self._works.pop().result().reshape(shape) for shape in self._shapes)
        extras = extras or [{}] * len(scores)
        return (self._combined(s, extra) for s, extra in zip(scores, extras, strict=True))

    def _add_arrived(self) -> None:
        """Move experts that have arrived to the ready ones; wait where nothing else can be done."""
        if not self._switch._backend.computes_as_loaded:
            self._ready += self._arriving
            self._arriving.clear()
            return
        if not self._ready:
            self._ready = [self._arriving.popleft()]
            while self._arriving and self._has_arrived(self._arriving[0]):
                self._ready.append(self._arriving.popleft())

    def _has_arrived(self, expert: int) -> bool:
        pending = self._switch._loading[expert]
        return pending is not None and pending.done()

    def _combined(self, scores: mx.array, extra: dict[str, Any]) -> mx.array:
        work = self._works.pop()
        flat = scores.reshape(-1, scores.shape[-1])
        y = work.combined_with(flat, **extra)
        if work.lazy:
            self._switch._lazy_results.append(y)
        return y.reshape(*scores.shape[:-1], -1)

    def _run(self, slots: dict[int, int]) -> None:
        """Compute the pairs of resident experts: expert -> slot."""
        mine: list[dict[int, np.ndarray]] = [{} for _ in self._works]
        for expert, slot in slots.items():
            for i, pairs in self._pairs[expert]:
                mine[i][slot] = pairs
        busy = [i for i, experts in enumerate(mine) if experts]
        if busy:
            self._switch._backend.run_all([self._works[i] for i in busy], [mine[i] for i in busy])

    def _load_ahead(self) -> None:
        """Start the reads of as many missing experts as there are slots for."""
        while self._missing and self._switch.load(self._missing[0], self._pinned):
            expert = self._missing.popleft()
            self._pinned.add(expert)
            self._arriving.append(expert)


def are_separate_sequences(indices: mx.array) -> bool:
    """Return whether indices (sequences, tokens, top_k) are of several sequences of one token."""
    return indices.ndim > 2 and indices.shape[-2] == 1 and indices.shape[0] > 1


def _by_expert(indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (expert, its pairs) for each chosen expert; see `flashmoe.streaming.compute`."""
    chosen = indices.reshape(-1)
    order = np.argsort(chosen, kind="stable")
    experts, first = np.unique(chosen[order], return_index=True)
    return zip(experts.tolist(), np.split(order, first[1:]), strict=True)
