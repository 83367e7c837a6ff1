"""Who may take the memory that loading left: the slots, or the prompt that is being read.

A long prompt needs scratch memory for seconds, and decoding needs none, so slots give way while a
prompt is read and come back after it. When other processes take memory, or a limit around this one
is lowered, slots give way too: a smaller share of experts is resident, and nothing is swapped out.
Slots hold copies of what is on the disk, so no answer changes by a bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic

from . import memory, ops
from .checkpoint import Checkpoint
from .errors import ContextError
from .footprint import PIECE_TOKENS, cache_nbytes, piece_nbytes, swept_nbytes
from .memory import Plan, format_size
from .switch import StreamingSwitchGLU

log = logging.getLogger("flashmoe")

#: Seconds between two looks at the memory that the system has: each takes some 1 ms.
LOOK_SECONDS = 0.25

#: The share of what this process may hold that is left for others.
RESERVE = 0.03


class Room:
    """The slots of one model, all layers the same number.

    Args:
        plan: what loading settled. Slots stay as they are when it is not elastic.
        switches: the layers.

    Attributes:
        slots: how many each layer may use now.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, switches: Sequence[StreamingSwitchGLU]):
        self._checkpoint = checkpoint
        self._plan = plan
        self._on_gpu = ops.on_gpu()
        self._switches = switches
        self.slots = plan.slots_per_layer
        # What is taken for as long as the model is loaded, and what a prompt takes besides.
        self._lasting = plan.resident + plan.dense + plan.working - plan.passing
        self._passing = plan.passing
        self._next_look = 0.0
        for switch in switches:
            switch.resize(self.slots)

    def for_prompts(self, tokens: int, contexts: Sequence[int], experts: int) -> int:
        """Make room for a sweep of prompts; how many of their tokens it may take.

        tokens: to be read, of all. contexts: tokens of each sequence under way, with those that are
        to be read and those that a kept state holds. experts: K.

        Raises:
            ContextError: it does not fit beside the fewest slots.
        """
        plan = self._plan
        each = swept_nbytes(self._checkpoint, experts)
        fixed = self._fixed(tokens, contexts, experts)
        if not plan.elastic:
            return max(PIECE_TOKENS, (plan.passing - fixed) // each)
        budget, least = self._budget(), min(tokens, PIECE_TOKENS)
        best = None
        for slots in range(plan.least_slots, plan.most_slots + 1):
            free = budget - self._lasting - fixed - slots * plan.slot_nbytes
            sweep = min(tokens, free // each)
            if sweep < least:
                break
            # In experts: each sweep reads those that are not resident, and slots that gave way
            # are filled again.
            sweeps = -(-tokens // sweep)
            reads = sweeps * (self._checkpoint.num_experts - slots) + plan.most_slots - slots
            if best is None or reads <= best[0]:
                best = reads, slots, sweep
        if best is None:
            needed = self._lasting + fixed + least * each + plan.least_slots * plan.slot_nbytes
            raise ContextError(
                f"a prompt of {max(contexts)} tokens needs at least {format_size(needed)} with "
                f"this model, and there are {format_size(budget)}: shorten it, or load the model "
                f'with memory="{memory.round_up(needed)}" or more'
            )
        _, slots, sweep = best
        self._passing = fixed + sweep * each
        self._resize(slots)
        return sweep

    def holds(self, tokens: int, contexts: Sequence[int], experts: int) -> bool:
        """Whether sequences of so many tokens can be under way together. As `for_prompts`."""
        plan = self._plan
        least = min(tokens, PIECE_TOKENS) * swept_nbytes(self._checkpoint, experts)
        needed = self._fixed(tokens, contexts, experts) + least
        if not plan.elastic:
            return needed <= plan.passing
        return self._lasting + needed + plan.least_slots * plan.slot_nbytes <= self._budget()

    def for_decoding(self, contexts: Sequence[int]) -> None:
        """Give the slots what sequences of so many tokens leave."""
        if self._plan.elastic:
            self._passing = sum(cache_nbytes(self._checkpoint, c) for c in contexts)
            self._resize(self._fitting(self._budget()))

    def _fixed(self, tokens: int, contexts: Sequence[int], experts: int) -> int:
        """Bytes that sequences take, whatever the length of a sweep."""
        context = max(contexts)
        return sum(cache_nbytes(self._checkpoint, c) for c in contexts) + piece_nbytes(
            self._checkpoint, tokens, context, experts, on_gpu=self._on_gpu
        )

    def look(self) -> None:
        """Let slots give way if memory has become short; called between layers."""
        if not self._plan.elastic or monotonic() < self._next_look:
            return
        fitting = self._fitting(self._budget())
        self._next_look = monotonic() + LOOK_SECONDS
        if fitting < self.slots:
            log.info("memory is short: %d slots a layer instead of %d", fitting, self.slots)
            self._resize(fitting)

    def _budget(self) -> int:
        """Bytes this process may hold now."""
        reach = memory.resident() + memory.available()
        return min(self._plan.budget, int(reach * (1 - RESERVE)))

    def _fitting(self, budget: int) -> int:
        plan = self._plan
        slots = (budget - self._lasting - self._passing) // plan.slot_nbytes
        return max(plan.least_slots, min(plan.most_slots, slots))

    def _resize(self, slots: int) -> None:
        if slots != self.slots:
            for switch in self._switches:
                switch.resize(slots)
            self.slots = slots
