"""What routing is expected to do before a model has run: hit rates of slots, and how many experts
some tokens need together. The data is routing.json, of real models; see there what it is from."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf, log
from pathlib import Path

#: Names of what `routing` gives, besides the models of routing.json.
REAL, UNIFORM = "real", "uniform"


@dataclass(frozen=True)
class Routing:
    """Of one model. Shares are of a layer's experts, 0..1.

    what, doubts: for people. experts: of a layer. shares, tokens: where the curves have points.
    hit_rates, unions: K -> the curve; without any, every expert is as likely as the others.
    """

    name: str
    what: str
    doubts: str
    experts: int = 0
    shares: Sequence[float] = ()
    tokens: Sequence[int] = ()
    hit_rates: dict[int, Sequence[float]] = field(default_factory=dict)
    unions: dict[int, Sequence[float]] = field(default_factory=dict)

    def hit_rate(self, share: float, k: int) -> float:
        """Of the experts that a token needs, the share that is in slots, 0..1.

        share: slots / experts of a layer.
        """
        if not self.hit_rates:
            return min(1.0, share)
        curves = {k: [0.0, *rates, 1.0] for k, rates in self.hit_rates.items()}
        return _between(curves, k, [0.0, *self.shares, 1.0], share)

    def union(self, tokens: int, k: int, experts: int) -> float:
        """How many of a layer's experts some tokens need together, K..experts."""
        if tokens == 1 or k == experts:
            return float(k)
        if self.unions:
            # As many tokens as these, if each chose alone: so it holds for another K of experts.
            near = min(max(k, min(self.unions)), max(self.unions))
            share = _between(self.unions, k, self.tokens, tokens)
            tokens = inf if share >= 1 else log(1 - share) / log(1 - near / self.experts)
        return max(float(k), experts * (1 - (1 - k / experts) ** tokens))


def routing(name: str, experts: int) -> Routing:
    """The expected routing of a model with so many experts a layer.

    name: REAL, UNIFORM, or a model of routing.json.
    """
    if name == UNIFORM:
        return Routing(name, "every expert as likely as the others", "no trained model routes so")
    sources = _sources()
    if name == REAL:
        # What matters most of a model that nobody traced is how finely it is cut into experts.
        name = min(sources, key=lambda n: abs(log(sources[n].experts / experts)))
    return sources[name]


def _between(curves: dict[int, Sequence[float]], k: int, x: Sequence[float], at: float) -> float:
    """The value at `at`, on straight lines between points and between the K of the curves."""
    known = sorted(curves)
    k = min(max(k, known[0]), known[-1])
    high = known[bisect_left(known, k)]
    low = max(n for n in known if n <= k)
    values = [_line(x, curves[n], at) for n in (low, high)]
    return values[0] if low == high else _line((low, high), values, k)


def _line(x: Sequence[float], y: Sequence[float], at: float) -> float:
    at = min(max(at, x[0]), x[-1])
    i = max(1, bisect_left(x, at))
    return y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1])


@cache
def _sources() -> dict[str, Routing]:
    data = json.loads((Path(__file__).parent / "routing.json").read_text())
    return {
        name: Routing(
            name,
            entry["what"],
            entry["doubts"],
            entry["experts"],
            entry["shares"],
            data["tokens"],
            {int(k): rates for k, rates in entry["hit_rate"].items()},
            {int(k): shares for k, shares in entry["union"].items()},
        )
        for name, entry in data["sources"].items()
    }
