"""Split a memory budget between dense weights, working memory and expert slots, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import BudgetError
from ..sizes import format_size, round_up
from .system import default_total


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory of the process is split; all but the counts are bytes.

    Attributes:
        budget: what the process may hold at its peak.
        resident: what it held before loading.
        dense: dense weights.
        working: prefill scratch, KV cache and prompt cache.
        slots_per_layer: slots of each MoE layer after loading.
        num_layers: the number of MoE layers.
        slot_nbytes: one slot in each of the MoE layers, summed.
        passing: the part of `working` that only a prompt takes, during its prefill.
        cached: the part of `working` that the prompt cache may take.
        context: tokens of context that `working` has room for.
        least_slots, most_slots: the range of slots of a layer; within it slots give way to prompts
            and come back. Both 0 where the number of slots cannot change.
    """

    budget: int
    resident: int
    dense: int
    working: int
    slots_per_layer: int
    num_layers: int
    slot_nbytes: int
    passing: int = 0
    cached: int = 0
    context: int = 0
    least_slots: int = 0
    most_slots: int = 0

    @property
    def elastic(self) -> bool:
        """Whether the number of slots may change while the model is loaded."""
        return self.least_slots < self.most_slots

    @property
    def slots_nbytes(self) -> int:
        """Bytes of all slots of all layers."""
        return self.slots_per_layer * self.slot_nbytes

    @property
    def lasting(self) -> int:
        """Bytes that are taken for as long as the model is loaded, besides slots."""
        return self.resident + self.dense + self.working - self.passing

    @property
    def total(self) -> int:
        """Bytes of everything: the planned peak."""
        return self.resident + self.dense + self.working + self.slots_nbytes

    def slots_beside(self, passing: int, budget: int) -> int:
        """Return the slots per layer beside prompts or conversations that take `passing` bytes."""
        slots = (budget - self.lasting - passing) // self.slot_nbytes
        return max(self.least_slots, min(self.most_slots, slots))

    def parts(self) -> str:
        """Return the terms of `total` as text for people."""
        return (
            f"program {format_size(self.resident)} + dense weights {format_size(self.dense)} + "
            f"working memory {format_size(self.working)} + {self.slots_per_layer} slots x "
            f"{self.num_layers} layers x {format_size(self.slot_nbytes // self.num_layers)}"
        )

    def describe(self) -> str:
        """Return the plan as one line for people."""
        return f"memory {format_size(self.total)} of {format_size(self.budget)}: {self.parts()}"


def split_budget(
    *,
    budget: int | None,
    slots: int | None,
    base: int,
    dense: int,
    working: int,
    layer_slot_nbytes: list[int],
    num_experts: int,
    minimum: int,
    passing: int = 0,
    elastic: bool = False,
    working_set: int | None = None,
    held_now: int | None = None,
) -> MemoryPlan:
    """Split `budget`, giving to slots what nothing else needs; every layer gets the same number.

    Args:
        budget: bytes for the peak of the whole process. None: what the machine can spare now.
        slots: slots per layer, cut to `num_experts`. None: as many as fit. Given without a budget,
            they are taken as asked, whatever the machine has.
        base: bytes of the program when it is ready to load the model.
        dense, working: bytes of dense weights and of working memory.
        layer_slot_nbytes: bytes of one slot of each MoE layer.
        num_experts: experts of a layer that may be in slots.
        minimum: the fewest slots per layer that the model can run with.
        passing: the part of `working` that only a prompt takes.
        elastic: whether the number of slots may change after loading, within the budget.
        held_now: bytes that the process holds already, which the machine has not to spare any
            more. None: `base`.
        working_set: bytes that Metal recommends to use at most, on a Mac's GPU.

    Raises:
        BudgetError: it does not fit; the text says how much is needed.
    """
    minimum = min(minimum, num_experts)
    slot_nbytes = sum(layer_slot_nbytes)
    fixed = base + dense + working

    def with_slots(count: int, budget: int) -> MemoryPlan:
        layers = len(layer_slot_nbytes)
        return MemoryPlan(budget, base, dense, working, count, layers, slot_nbytes, passing)

    if slots is not None:
        if slots < minimum:
            raise BudgetError(
                f"{slots} slots per layer are too few: this model needs at least {minimum}; pass "
                f"slots={minimum} or more, or fewer experts with experts=K"
            )
        slots = min(slots, num_experts)
        if budget is None:
            return with_slots(slots, fixed + slots * slot_nbytes)
        needed = with_slots(slots, budget)
        if needed.total > budget:
            raise BudgetError(
                f"memory {format_size(budget)} is too small for {slots} slots per layer, which "
                f"need {format_size(needed.total)} ({needed.parts()}); pass "
                f'memory="{round_up(needed.total)}" or more, or fewer slots'
            )
        return needed

    named = f"memory {format_size(budget or 0)} is"
    if budget is None:
        budget = default_total(base if held_now is None else held_now, working_set)
        named = f"the memory this machine can spare, {format_size(budget)}, is"
    fits = (budget - fixed) // slot_nbytes
    if fits < minimum:
        least = with_slots(minimum, budget)
        raise BudgetError(
            f"{named} too small: this model needs at least {format_size(least.total)} "
            f'({least.parts()}); pass memory="{round_up(least.total)}" or more, or fewer experts '
            "with experts=K"
        )
    plan = with_slots(min(fits, num_experts), budget)
    if not elastic:
        return plan
    most = min((budget - fixed + passing) // slot_nbytes, num_experts)
    return replace(plan, least_slots=minimum, most_slots=most)
