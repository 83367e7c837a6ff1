"""Split memory between expert slots and the prefill of prompts, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..errors import ContextError
from ..sizes import format_size, round_up
from .budget import MemoryPlan
from .footprint import CHUNK_TOKENS, cache_nbytes, chunk_nbytes, pass_token_nbytes


class PrefillSplit(NamedTuple):
    """How memory is used while prompts are prefilled.

    Attributes:
        slots: expert slots of each layer.
        pass_tokens: prompt tokens that may go through the model in one pass.
        passing: bytes that are used beside the slots and what lasts.
    """

    slots: int
    pass_tokens: int
    passing: int


def sequences_nbytes(
    checkpoint: Checkpoint, tokens: int, contexts: Sequence[int], experts: int, *, on_gpu: bool
) -> int:
    """Return the bytes that sequences take whatever the length of a pass.

    Args:
        tokens: prompt tokens still to be prefilled, of all sequences together.
        contexts: tokens of each sequence under way, with those still to be prefilled and those that
            a prompt cache entry holds.
        experts: K.
    """
    chunk = chunk_nbytes(checkpoint, tokens, max(contexts), experts, on_gpu=on_gpu)
    return sum(cache_nbytes(checkpoint, c, on_gpu=on_gpu) for c in contexts) + chunk


def split_for_prefill(
    checkpoint: Checkpoint,
    plan: MemoryPlan,
    *,
    tokens: int,
    contexts: Sequence[int],
    experts: int,
    budget: Callable[[], int],
    on_gpu: bool,
) -> PrefillSplit:
    """Choose the slots and the length of a pass for which a prefill reads the fewest bytes.

    Args:
        tokens, contexts, experts: as for `sequences_nbytes`.
        budget: returns the bytes that the process may hold; called only where the number of slots
            may change.

    Raises:
        ContextError: the prompts do not fit beside the fewest slots.
    """
    each = pass_token_nbytes(checkpoint, experts)
    fixed = sequences_nbytes(checkpoint, tokens, contexts, experts, on_gpu=on_gpu)
    least = min(tokens, CHUNK_TOKENS)
    if not plan.elastic:
        # With a number of slots instead of a budget nothing says how much there is.
        room = plan.passing + plan.budget - plan.total
        if on_gpu and plan.budget > plan.total and fixed + least * each > room:
            needed = plan.total - plan.passing + fixed + least * each
            raise _too_long(contexts, needed, plan.budget, f"context={sum(contexts)}")
        pass_tokens = max(CHUNK_TOKENS, (plan.passing - fixed) // each)
        return PrefillSplit(plan.slots_per_layer, pass_tokens, plan.passing)
    left = budget() - plan.lasting - fixed
    best = None
    for slots in range(plan.least_slots, plan.most_slots + 1):
        pass_tokens = min(tokens, (left - slots * plan.slot_nbytes) // each)
        if pass_tokens < least:
            break
        # In experts: each pass reads those that are not resident, and slots that gave way are
        # filled again.
        passes = -(-tokens // pass_tokens)
        reads = passes * (checkpoint.num_experts - slots) + plan.most_slots - slots
        if best is None or reads <= best[0]:
            best = reads, slots, pass_tokens
    if best is None:
        needed = plan.lasting + fixed + least * each + plan.least_slots * plan.slot_nbytes
        raise _too_long(
            contexts, needed, left + plan.lasting + fixed, f'memory="{round_up(needed)}" or more'
        )
    _, slots, pass_tokens = best
    return PrefillSplit(slots, pass_tokens, fixed + pass_tokens * each)


def _too_long(contexts: Sequence[int], needed: int, available: int, way_out: str) -> ContextError:
    return ContextError(
        f"a prompt of {max(contexts)} tokens needs at least {format_size(needed)} with this model, "
        f"and there are {format_size(available)}: shorten it, or load the model with {way_out}"
    )
