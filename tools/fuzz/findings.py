"""Count outcomes, and report each kind of finding once."""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

PROGRESS_SECONDS = 300


class Broken(Exception):
    """Raised when valid inputs do not work either, so that nothing can be found."""


@dataclass
class Findings:
    """What came of the inputs so far. Threads may share it.

    Attributes:
        outcomes: how many inputs had each outcome.
        kinds: of each kind of finding: how many, and the first one's description.
        broken: why the run had to end.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)
    broken: Exception | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str) -> None:
        """Count an input that did what it should."""
        with self._lock:
            self.outcomes[outcome] += 1

    def add(self, outcome: str, where: str, replay: str, details: str) -> None:
        """Count a finding, and print it if it is the first of its kind.

        Args:
            outcome: what happened, in a few words.
            where: the place in the code, or whatever tells kinds apart.
            replay: the arguments that repeat it.
            details: the input and the consequence.
        """
        kind = f"{outcome} | {re.sub(r'0x[0-9a-f]+', '', where)}"
        details = "".join(c if c.isprintable() or c == "\n" else "?" for c in details)
        text = f"{kind}\n    replay: python -m fuzz {replay}\n    {details}"
        with self._lock:
            self.outcomes[outcome] += 1
            seen, first = self.kinds.get(kind, (0, text))
            self.kinds[kind] = seen + 1, first
        if not seen:
            print(f"FOUND {text}", flush=True)

    def counts(self) -> str:
        """Return how many inputs had each outcome, in a line."""
        with self._lock:
            total = sum(self.outcomes.values())
            counts = ", ".join(f"{name}: {n}" for name, n in self.outcomes.most_common())
        return f"{total} inputs: {counts}"

    def summary(self) -> str:
        """Return the kinds, most frequent first, and the counts by outcome."""
        kinds = sorted(self.kinds.values(), key=lambda item: -item[0])
        return "\n".join([*(f"{count} x {text}" for count, text in kinds), self.counts()])

    def wait(self, threads: list[threading.Thread]) -> None:
        """Wait for threads that count here, and print the counts every five minutes."""
        due = monotonic() + PROGRESS_SECONDS
        for thread in threads:
            while thread.is_alive():
                thread.join(1)
                if monotonic() > due:
                    due += PROGRESS_SECONDS
                    print(self.counts(), flush=True)
