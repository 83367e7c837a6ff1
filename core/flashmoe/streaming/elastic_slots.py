"""Who may take the memory that loading left: the slots, or the prompt that is being read.

A long prompt needs scratch memory for seconds, and decoding needs none, so slots give way while a
prompt is read and come back after it. When other processes take memory, or a limit around this one
is lowered, slots give way too: a smaller share of experts is resident, and nothing is swapped out.
Slots hold copies of what is on the disk, so no answer changes by a bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic

from ..checkpoint.checkpoint import Checkpoint
from ..errors import ContextError
from ..memory import budget as memory
from ..memory.budget import Plan, format_size
from ..memory.footprint import CHUNK_TOKENS, cache_nbytes, chunk_nbytes, pass_token_nbytes
from ..ops import backend as ops
from .switch_glu import StreamingSwitchGLU

log = logging.getLogger("flashmoe")

#: Seconds between two looks at the memory that the system has: each takes some 1 ms.
LOOK_SECONDS = 0.25

#: The share of what this process may hold that is left for others.
RESERVE = 0.03


def lasting_nbytes(plan: Plan) -> int:
    """Bytes that are taken for as long as the model is loaded, besides slots."""
    return plan.resident + plan.dense + plan.working - plan.passing


def fitting(plan: Plan, budget: int, passing: int) -> int:
    """The slots of a layer beside a prompt, or a conversation, that takes `passing` bytes."""
    slots = (budget - lasting_nbytes(plan) - passing) // plan.slot_nbytes
    return max(plan.least_slots, min(plan.most_slots, slots))


def sequences_nbytes(
    checkpoint: Checkpoint, tokens: int, contexts: Sequence[int], experts: int, *, on_gpu: bool
) -> int:
    """Bytes that sequences take whatever the length of a sweep. As `prompt_room`."""
    piece = chunk_nbytes(checkpoint, tokens, max(contexts), experts, on_gpu=on_gpu)
    return sum(cache_nbytes(checkpoint, context) for context in contexts) + piece


def split_for_prompts(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    tokens: int,
    contexts: Sequence[int],
    experts: int,
    budget: Callable[[], int],
    on_gpu: bool,
) -> tuple[int, int, int]:
    """Slots of a layer while prompts are read, tokens of a sweep, and bytes beside the slots.

    tokens: to be read, of all. contexts: tokens of each sequence under way, with those that are to
        be read and those that a kept state holds. experts: K. budget: asked for only where slots
        may give way.

    Raises:
        ContextError: it does not fit beside the fewest slots.
    """
    each = pass_token_nbytes(checkpoint, experts)
    fixed = sequences_nbytes(checkpoint, tokens, contexts, experts, on_gpu=on_gpu)
    if not plan.elastic:
        sweep = max(CHUNK_TOKENS, (plan.passing - fixed) // each)
        return plan.slots_per_layer, sweep, plan.passing
    room, least = budget() - lasting_nbytes(plan) - fixed, min(tokens, CHUNK_TOKENS)
    best = None
    for slots in range(plan.least_slots, plan.most_slots + 1):
        sweep = min(tokens, (room - slots * plan.slot_nbytes) // each)
        if sweep < least:
            break
        # In experts: each sweep reads those that are not resident, and slots that gave way are
        # filled again.
        sweeps = -(-tokens // sweep)
        reads = sweeps * (checkpoint.num_experts - slots) + plan.most_slots - slots
        if best is None or reads <= best[0]:
            best = reads, slots, sweep
    if best is None:
        slots = plan.least_slots * plan.slot_nbytes
        needed = lasting_nbytes(plan) + fixed + least * each + slots
        there = room + lasting_nbytes(plan) + fixed
        raise ContextError(
            f"a prompt of {max(contexts)} tokens needs at least {format_size(needed)} with this "
            f"model, and there are {format_size(there)}: shorten it, or load the model with "
            f'memory="{memory.round_up(needed)}" or more'
        )
    _, slots, sweep = best
    return slots, sweep, fixed + sweep * each


class ElasticSlots:
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
        # What a prompt takes besides that which is taken for as long as the model is loaded.
        self._passing = plan.passing
        self._next_look = 0.0
        for switch in switches:
            switch.resize(self.slots)

    def for_prompts(self, tokens: int, contexts: Sequence[int], experts: int) -> int:
        """Make room for a sweep of prompts; how many of their tokens it may take. As
        `prompt_room`.

        Raises:
            ContextError: it does not fit beside the fewest slots.
        """
        slots, sweep, self._passing = split_for_prompts(
            self._checkpoint,
            self._plan,
            tokens=tokens,
            contexts=contexts,
            experts=experts,
            budget=self._budget,
            on_gpu=self._on_gpu,
        )
        self._resize(slots)
        return sweep

    def holds(self, tokens: int, contexts: Sequence[int], experts: int) -> bool:
        """Whether sequences of so many tokens can be under way together. As `prompt_room`."""
        plan = self._plan
        needed = min(tokens, CHUNK_TOKENS) * pass_token_nbytes(self._checkpoint, experts)
        needed += sequences_nbytes(self._checkpoint, tokens, contexts, experts, on_gpu=self._on_gpu)
        if not plan.elastic:
            return needed <= plan.passing
        least = plan.least_slots * plan.slot_nbytes
        return lasting_nbytes(plan) + needed + least <= self._budget()

    def for_decoding(self, contexts: Sequence[int]) -> None:
        """Give the slots what sequences of so many tokens leave."""
        if self._plan.elastic:
            self._passing = sum(cache_nbytes(self._checkpoint, c) for c in contexts)
            self._resize(fitting(self._plan, self._budget(), self._passing))

    def look(self) -> None:
        """Let slots give way if memory has become short; called between layers."""
        if not self._plan.elastic or monotonic() < self._next_look:
            return
        slots = fitting(self._plan, self._budget(), self._passing)
        self._next_look = monotonic() + LOOK_SECONDS
        if slots < self.slots:
            log.info("memory is short: %d slots a layer instead of %d", slots, self.slots)
            self._resize(slots)

    def _budget(self) -> int:
        """Bytes this process may hold now."""
        reach = memory.resident() + memory.available()
        return min(self._plan.budget, int(reach * (1 - RESERVE)))

    def _resize(self, slots: int) -> None:
        if slots != self.slots:
            for switch in self._switches:
                switch.resize(slots)
            self.slots = slots
