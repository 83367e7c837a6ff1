"""Track which expert is in which slot of one MoE layer, and choose which one leaves.

The policy is frequency with ageing: each use of an expert counts 1, and the count halves every
`half_life` tokens. Counts of experts that left are kept, so that an expert that comes back does not
start from zero. This module moves no bytes: the caller that allocates a slot fills it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf, ldexp

# Counts are renormalised when the weight of a new use passes 2**512: far from the overflow of a
# double at 2**1024, with room for any sum of uses.
_MAX_EXPONENT = 512


class SlotTable:
    """The slots of one layer: at most `num_slots` of its `num_experts` experts are resident.

    Attributes:
        num_slots: slots in use; `resize` changes it.
        capacity: slots that exist.
        evictions: experts that had to leave for another one since the start.
    """

    def __init__(self, num_slots: int, num_experts: int, half_life: float = 128.0):
        if not 1 <= num_slots <= num_experts:
            raise ValueError(f"num_slots is {num_slots}, must be 1..{num_experts} (num_experts)")
        if not 0 < half_life < inf:
            raise ValueError(f"half_life is {half_life} tokens, must be positive and finite")
        self.num_slots = self.capacity = num_slots
        self.num_experts = num_experts
        self.half_life = half_life
        self.evictions = 0
        self._slot_of: dict[int, int] = {}
        self._expert_in: list[int | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._closed: list[int] = []
        # A use weighs 2**_exponent instead of all older ones being halved at each step; _exponent
        # grows by tokens / half_life. _key holds the count of the expert in each slot once more:
        # min() of a flat list of floats is what makes allocate() cheap.
        self._exponent = 0.0
        self._count = [0.0] * num_experts
        self._key = [0.0] * num_slots
        self._calls = 0
        self._last_use = [0] * num_experts

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def residents(self) -> dict[int, int]:
        """A copy of the table: expert -> slot."""
        return dict(self._slot_of)

    @property
    def free(self) -> int:
        """The number of slots that hold no expert."""
        return len(self._free)

    @property
    def is_identity(self) -> bool:
        """Whether every expert is in the slot of its own number; then no expert ever leaves."""
        return len(self._slot_of) == self.num_experts and all(
            e == s for e, s in self._slot_of.items()
        )

    def lookup(self, expert: int) -> int | None:
        """Return the slot of `expert`, or None when it is not resident."""
        slot = self._slot_of.get(expert)
        if slot is None:
            self._check(expert)
        return slot

    def expert_in(self, slot: int) -> int | None:
        """Return the expert in `slot`, or None when it is free."""
        return self._expert_in[slot]

    def score(self, expert: int) -> float:
        """Return the aged frequency: the sum over its uses of 0.5 ** (tokens since / half_life)."""
        self._check(expert)
        return self._count[expert] * 2.0**-self._exponent

    def record_use(self, counts: Mapping[int, int], tokens: int) -> None:
        """Age all counts by `tokens`, then add `counts`: expert -> tokens of this call it got."""
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}, must not be negative")
        for expert, count in counts.items():
            self._check(expert)
            if count < 0:
                raise ValueError(f"expert {expert} has count {count}, must not be negative")
        self._exponent += tokens / self.half_life
        if self._exponent > _MAX_EXPONENT:
            self._renormalise()
        weight = 2.0**self._exponent
        self._calls += 1
        for expert, count in counts.items():
            self._count[expert] += count * weight
            self._last_use[expert] = self._calls
            slot = self._slot_of.get(expert)
            if slot is not None:
                self._key[slot] = self._count[expert]

    def allocate(self, expert: int, pinned: Collection[int]) -> int | None:
        """Allocate a slot for `expert`, which must not be resident, and return it.

        None when all residents are `pinned`.

        A free slot is used first, the one of the expert's own number where each expert has one.
        Otherwise the resident expert with the lowest score leaves: of equal scores the least
        recently used, then the lowest id. Experts in `pinned` stay.
        """
        self._check(expert)
        if expert in self._slot_of:
            raise ValueError(f"expert {expert} is already in slot {self._slot_of[expert]}")
        if self._free:
            slot = self._free_slot(expert)
        else:
            victim = self._victim(pinned)
            if victim is None:
                return None
            slot = self._slot_of.pop(victim)
            self.evictions += 1
        self._slot_of[expert] = slot
        self._expert_in[slot] = expert
        self._key[slot] = self._count[expert]
        return slot

    def drop(self, expert: int) -> None:
        """Forget that `expert` is resident, as when its read failed: its slot is free again."""
        self._check(expert)
        slot = self._slot_of.pop(expert, None)
        if slot is None:
            raise ValueError(f"expert {expert} is not resident, so it cannot be dropped")
        self._expert_in[slot] = None
        self._free.append(slot)

    def resize(self, num_slots: int, pinned: Collection[int]) -> list[int]:
        """Use another number of slots; return the slots that are not in use any more.

        When there are fewer, the resident experts with the lowest scores leave, as in `allocate`.
        Experts in `pinned` stay, and keep more slots in use than wanted if need be.
        """
        if not 1 <= num_slots <= self.capacity:
            raise ValueError(f"num_slots is {num_slots}, must be 1..{self.capacity} (capacity)")
        while self.num_slots < num_slots:
            slot = self._closed.pop()
            self._key[slot] = 0.0
            self._free.append(slot)
            self.num_slots += 1
        closed = len(self._closed)
        while self.num_slots > num_slots:
            if not self._free:
                victim = self._victim(pinned)
                if victim is None:
                    break
                self.drop(victim)
            slot = self._free.pop()
            self._key[slot] = inf  # never the lowest
            self._closed.append(slot)
            self.num_slots -= 1
        return self._closed[closed:]

    def _free_slot(self, expert: int) -> int:
        if self.num_slots == self.num_experts and self._expert_in[expert] is None:
            self._free.remove(expert)
            return expert
        return self._free.pop()

    def _victim(self, pinned: Collection[int]) -> int | None:
        """Only called when every slot in use holds an expert."""
        keys = self._key.copy()
        for expert in pinned:
            slot = self._slot_of.get(expert)
            if slot is not None:
                keys[slot] = inf
        lowest = min(keys)
        if lowest == inf:
            return None
        slot = keys.index(lowest)
        if keys.count(lowest) == 1:
            return self._expert_in[slot]
        occupied = zip(self._expert_in, keys, strict=True)
        tied = (e for e, key in occupied if key == lowest and e is not None)
        return min(tied, key=lambda e: (self._last_use[e], e))

    def _renormalise(self) -> None:
        # A whole power of two keeps every count exact, down to where it underflows to zero.
        shift = int(self._exponent)
        self._exponent -= shift
        self._count = [ldexp(count, -shift) for count in self._count]
        for expert, slot in self._slot_of.items():
            self._key[slot] = self._count[expert]

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert {expert} is out of range: the layer has {self.num_experts}")
