"""Implement the slot policies that replay.py compares, for one layer and without bytes.

The method `access(experts)` of a policy returns how many of the K experts of a token it missed; all
of them are resident afterwards.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Sequence
from math import inf

from flashmoe.streaming.slot_table import SlotTable


class Aged:
    """flashmoe's own policy: counts of uses, which halve every `half_life` tokens.

    With a very long half-life it is plain LFU.
    """

    def __init__(self, num_slots: int, num_experts: int, half_life: float = 128.0):
        self.slots = SlotTable(num_slots, num_experts, half_life)

    def access(self, experts: Sequence[int]) -> int:
        missing = [e for e in experts if self.slots.lookup(e) is None]
        self.slots.record_use(dict.fromkeys(experts, 1), 1)
        for expert in missing:
            self.slots.allocate(expert, experts)
        return len(missing)


class LRU:
    """Evicts the least recently used expert."""

    def __init__(self, num_slots: int, num_experts: int):
        self.num_slots = num_slots
        self.resident: OrderedDict[int, None] = OrderedDict()

    def access(self, experts: Sequence[int]) -> int:
        missing = [e for e in experts if e not in self.resident]
        for expert in experts:
            self.resident.pop(expert, None)
            self.resident[expert] = None
        while len(self.resident) > self.num_slots:
            self.resident.popitem(last=False)
        return len(missing)


class S3FIFO:
    """Has a small queue for new experts and a main queue for those that are used again.

    It also remembers which experts left the small queue (Yang et al., SOSP 2023).
    """

    def __init__(self, num_slots: int, num_experts: int, small: float = 0.1):
        self.num_slots = num_slots
        self.small_limit = max(1, int(num_slots * small))
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghost: OrderedDict[int, None] = OrderedDict()
        self.uses: dict[int, int] = {}

    def access(self, experts: Sequence[int]) -> int:
        missing = [e for e in experts if e not in self.uses]
        for expert in experts:
            if expert in self.uses:
                self.uses[expert] = min(3, self.uses[expert] + 1)
        for expert in missing:
            while len(self.uses) >= self.num_slots:
                self._evict(experts)
            if self.ghost.pop(expert, inf) is None:
                self.main.append(expert)
            else:
                self.small.append(expert)
            self.uses[expert] = 0
        return len(missing)

    def _evict(self, pinned: Collection[int]) -> None:
        """Evict an expert that this token does not need. There is one: slots are at least K."""
        while True:
            main_can_evict = any(expert not in pinned for expert in self.main)
            from_small = self.small and (len(self.small) > self.small_limit or not main_can_evict)
            queue = self.small if from_small else self.main
            expert = queue.popleft()
            if expert in pinned or self.uses[expert] > 0:
                if expert not in pinned and not from_small:
                    self.uses[expert] -= 1
                self.main.append(expert)
                continue
            del self.uses[expert]
            if from_small:
                self.ghost[expert] = None
                if len(self.ghost) > self.num_slots:
                    self.ghost.popitem(last=False)
            return


class Pinned:
    """Keeps the hottest experts in `share` of the slots for good; `Aged` uses the other slots."""

    def __init__(self, num_slots: int, num_experts: int, hot: Sequence[int], share: float = 0.5):
        at_least = min(num_slots, 12)
        pinned = max(0, min(int(num_slots * share), num_slots - at_least))
        self.hot = set(hot[:pinned])
        self.others = Aged(num_slots - len(self.hot), num_experts)

    def access(self, experts: Sequence[int]) -> int:
        return self.others.access([e for e in experts if e not in self.hot])


class Clairvoyant:
    """Evicts the expert whose next use is furthest away: no policy can miss less.

    Args:
        future: the experts of all tokens that will come.
    """

    def __init__(self, num_slots: int, future: Sequence[Sequence[int]]):
        self.num_slots = num_slots
        self.next: dict[int, deque[int]] = {}
        for step, experts in enumerate(future):
            for expert in experts:
                self.next.setdefault(expert, deque()).append(step)
        self.resident: set[int] = set()

    def access(self, experts: Sequence[int]) -> int:
        missing = [e for e in experts if e not in self.resident]
        for expert in experts:
            self.next[expert].popleft()
        self.resident.update(missing)
        for _ in range(len(self.resident) - self.num_slots):
            self.resident.remove(max(self.resident - set(experts), key=self._next_use))
        return len(missing)

    def _next_use(self, expert: int) -> float:
        return self.next[expert][0] if self.next[expert] else inf


def hottest(steps: Sequence[Sequence[int]]) -> list[int]:
    """Return the experts of some steps, most used first."""
    counts = Counter(expert for experts in steps for expert in experts)
    return [expert for expert, _ in counts.most_common()]
