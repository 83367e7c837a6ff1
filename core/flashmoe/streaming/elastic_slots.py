"""Change the number of expert slots while a model is loaded, as prompts and the system need memory.

A long prompt needs scratch memory for seconds, and decoding needs none, so slots give way during a
prefill and come back after it. When other processes take memory, or a limit around this process is
lowered, slots give way too: a smaller share of experts is resident, and nothing is swapped out.
Slots hold copies of what is on the disk, so no answer changes by a bit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic

from ..checkpoint.checkpoint import Checkpoint
from ..memory import system
from ..memory.budget import MemoryPlan
from ..memory.footprint import CHUNK_TOKENS, cache_nbytes, pass_token_nbytes
from ..memory.prefill import sequences_nbytes, split_for_prefill
from .switch_glu import StreamingSwitchGLU

log = logging.getLogger("flashmoe")

#: Seconds between two measurements of the system's memory: each takes some 1 ms.
MEASURE_SECONDS = 0.25

#: The share of what this process may hold that is left for others.
RESERVE = 0.03


class ElasticSlots:
    """The slots of one model; each layer has the same number.

    Args:
        plan: how loading split the memory. The number of slots stays when the plan is not elastic.
        switches: the layers.
        on_gpu: whether MLX computes on a GPU.

    Attributes:
        per_layer: how many slots each layer uses now.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MemoryPlan,
        switches: Sequence[StreamingSwitchGLU],
        *,
        on_gpu: bool,
    ):
        self._checkpoint = checkpoint
        self._plan = plan
        self._on_gpu = on_gpu
        self._switches = switches
        self.per_layer = plan.slots_per_layer
        # What prompts or conversations take besides what lasts as long as the model is loaded.
        self._passing = plan.passing
        self._prefilled = False
        self._next_measurement = 0.0
        for switch in switches:
            switch.resize(self.per_layer)

    def fit_prefill(self, tokens: int, contexts: Sequence[int], experts: int) -> int:
        """Free memory for the prefill of prompts; return how many of their tokens a pass may take.

        Args:
            tokens, contexts, experts: as for `memory.prefill.sequences_nbytes`.

        Raises:
            ContextError: the prompts do not fit beside the fewest slots.
        """
        split = split_for_prefill(
            self._checkpoint,
            self._plan,
            tokens=tokens,
            contexts=contexts,
            experts=experts,
            budget=self._budget,
            on_gpu=self._on_gpu,
        )
        self._passing = split.passing
        self._prefilled = True
        self._resize(split.slots)
        return split.pass_tokens

    def can_hold(self, tokens: int, contexts: Sequence[int], experts: int) -> bool:
        """Return whether sequences fit together; the arguments are those of `fit_prefill`."""
        plan = self._plan
        needed = min(tokens, CHUNK_TOKENS) * pass_token_nbytes(self._checkpoint, experts)
        needed += sequences_nbytes(self._checkpoint, tokens, contexts, experts, on_gpu=self._on_gpu)
        if not plan.elastic:
            return needed <= plan.passing
        least = plan.least_slots * plan.slot_nbytes
        return plan.lasting + needed + least <= self._budget()

    def fit_decoding(self, contexts: Sequence[int]) -> None:
        """Use as slots what the caches of sequences of these numbers of tokens leave."""
        if self._prefilled:
            # Slots take the place of the prompt's activations, which the allocator still keeps.
            system.trim()
            self._prefilled = False
        if self._plan.elastic:
            self._passing = sum(cache_nbytes(self._checkpoint, c) for c in contexts)
            self._resize(self._plan.slots_beside(self._passing, self._budget()))

    def shrink_if_short(self) -> None:
        """Use fewer slots if the system has become short of memory; called between layers."""
        if not self._plan.elastic or monotonic() < self._next_measurement:
            return
        slots = self._plan.slots_beside(self._passing, self._budget())
        self._next_measurement = monotonic() + MEASURE_SECONDS
        if slots < self.per_layer:
            log.info("memory is short: %d slots a layer instead of %d", slots, self.per_layer)
            self._resize(slots)

    def _budget(self) -> int:
        """Return the bytes that this process may hold now."""
        reach = system.resident() + system.available()
        return min(self._plan.budget, int(reach * (1 - RESERVE)))

    def _resize(self, slots: int) -> None:
        if slots != self.per_layer:
            for switch in self._switches:
                switch.resize(slots)
            self.per_layer = slots
