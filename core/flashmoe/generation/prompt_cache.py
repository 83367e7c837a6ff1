"""States of prompts that were read, held in memory: a longer prompt goes on from one.

A state is mlx-lm's prompt cache (keys and values, recurrent states) at one place of a token
sequence. Recurrent states cannot be cut back, so a state serves prompts that begin with exactly
its tokens, and is known by their hash. Many conversations may lie side by side.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np


def key(identity: str, tokens: list[int]) -> str:
    """The name of a state: of the model and settings that made it, and of its tokens."""
    digest = hashlib.sha256(identity.encode())
    digest.update(np.array(tokens, np.int64).tobytes())
    return f"{digest.hexdigest()[:40]}-{len(tokens)}"


def nbytes(cache: list[Any]) -> int:
    """Bytes of a state's arrays."""
    return sum(c.nbytes for c in cache)


@dataclass(frozen=True)
class _Entry:
    cache: list[Any]
    nbytes: int


class PromptCache:
    """The states in memory, the least recently used leaving first.

    Args:
        budget: bytes of all states together.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self._entries.values())

    def get(self, name: str) -> list[Any] | None:
        """A state to go on from. It is a copy: generation changes what it is given."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        self._entries.move_to_end(name)
        # Cheap: MLX copies an array when one of its owners first writes to it.
        return copy.deepcopy(entry.cache)

    def put(self, name: str, cache: list[Any]) -> None:
        """Keep an evaluated state, of which nobody else writes to this copy. One that is larger
        than the budget is not kept."""
        self._entries.pop(name, None)
        entry = _Entry(cache, nbytes(cache))
        if entry.nbytes > self.budget:
            return
        self._entries[name] = entry
        while self.nbytes > self.budget:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()
