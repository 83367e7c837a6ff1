"""Expected routing of a model that has not run yet: hit rates of slots, and unions of experts.

The data (routing.json) was measured with real models; the file says with which.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf, log
from pathlib import Path

#: Names for `find_routing`, besides the models of routing.json.
REAL, UNIFORM = "real", "uniform"


@dataclass(frozen=True)
class Routing:
    """How tokens choose experts in one model. Shares are shares of a layer's experts, 0..1.

    Attributes:
        name: the model, or UNIFORM.
        what: description of the data, for people.
        doubts: what the data does not tell, for people.
        experts: experts of a layer.
        shares: the shares of experts in slots at which `hit_rates` has its points.
        tokens: the numbers of tokens at which `unions` has its points.
        hit_rates: K -> hit rates. Empty: every expert is as likely as any other.
        unions: K -> shares of experts that some tokens need together. Empty: the same.
    """

    name: str
    what: str
    doubts: str
    experts: int = 0
    shares: Sequence[float] = ()
    tokens: Sequence[int] = ()
    hit_rates: Mapping[int, Sequence[float]] = field(default_factory=dict)
    unions: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def hit_rate(self, share: float, k: int) -> float:
        """Return the share, 0..1, of the experts needed by a token that are in slots.

        Args:
            share: slots of a layer / experts of a layer.
            k: experts per token.
        """
        if not self.hit_rates:
            return min(1.0, share)
        curves = {k: [0.0, *rates, 1.0] for k, rates in self.hit_rates.items()}
        return _interpolate(curves, k, [0.0, *self.shares, 1.0], share)

    def union(self, tokens: int, k: int, experts: int) -> float:
        """Return how many of a layer's experts some tokens need together, K..experts.

        Args:
            tokens: number of tokens, 1 or more.
            k: experts per token.
            experts: experts of a layer of the model in question.
        """
        if tokens == 1 or k == experts:
            return float(k)
        independent: float = tokens
        if self.unions:
            # The number of tokens that would need as many experts if each chose independently:
            # in this form the data applies to models with another number of experts.
            near = min(max(k, min(self.unions)), max(self.unions))
            share = _interpolate(self.unions, k, self.tokens, tokens)
            independent = inf if share >= 1 else log(1 - share) / log(1 - near / self.experts)
        return max(float(k), experts * (1 - (1 - k / experts) ** independent))


def find_routing(name: str, experts: int) -> Routing:
    """Return the expected routing of a model with the given number of experts per layer.

    Args:
        name: REAL for the most similar model of routing.json, UNIFORM, or one of its models.
    """
    if name == UNIFORM:
        return Routing(
            name, "every expert as likely as any other", "trained models do not route like this"
        )
    sources = _sources()
    if name == REAL:
        # The most important property of an unknown model is into how many experts it is divided.
        name = min(sources, key=lambda n: abs(log(sources[n].experts / experts)))
    return sources[name]


def _interpolate(
    curves: Mapping[int, Sequence[float]], k: int, x: Sequence[float], at: float
) -> float:
    """Return the value at `at`, linear between the points and between the K of the curves."""
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
