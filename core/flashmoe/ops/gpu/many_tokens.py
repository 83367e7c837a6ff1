"""Compute the experts of many tokens on CUDA's tensor cores, all pairs of a wave in two launches.

A pair's bits depend on its token and its expert alone: every tile sums in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from flashmoe_metal import grouped
from flashmoe_metal.down import CombineInputs, combine
from flashmoe_metal.matrix import Matrix

from ...streaming.compute import ExpertWork


class ManyTokensWork(ExpertWork):
    """The experts of one layer applied to the tokens of one input.

    Args:
        matrices: the stacks of gate, up and down.
        x: (tokens, hidden).
        top_k: choices of a token.
    """

    lazy = True

    def __init__(self, matrices: list[Matrix], x: mx.array, top_k: int):
        self._gate, self._up, self._down = matrices
        self._x, self._top_k = x, top_k
        self._slots: tuple[mx.array, int] | None = None  # of all pairs, see `run_slots`
        self._waiting: dict[int, np.ndarray] = {}  # given to `run`, and not computed yet
        self._pairs: list[np.ndarray] = []
        self._terms: list[mx.array] = []  # of the pairs, (pairs, hidden) float32

    def run(self, experts: Mapping[int, np.ndarray]) -> None:
        self._waiting |= experts

    def run_slots(self, slots: mx.array, experts: int) -> None:
        """Compute all pairs at once, when `combined` is called; no other result can be had.

        Args:
            slots: (tokens, top_k), all below `experts`.
        """
        self._slots = slots, experts

    def stop_reading(self) -> None:
        self._compute()
        mx.eval(self._terms)

    def result(self) -> mx.array:
        """Return each pair's result, (tokens, top_k, hidden), in the dtype of x."""
        terms, places = self._all_terms()
        y = terms[places.reshape(-1)].astype(self._x.dtype)
        return y.reshape(*places.shape, -1)

    def combined(self, scores: mx.array) -> mx.array:
        if self._slots is None:
            terms, places = self._all_terms()
        else:
            groups, places = grouped.group_on_gpu(*self._slots)
            terms = self._multiply(groups)
        return combine(CombineInputs(terms, places, scores.astype(mx.float32), self._x.dtype))

    def _compute(self) -> None:
        """Compute the pairs that wait; lazy."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        pairs = np.concatenate(list(waiting.values()))
        counts = np.array([p.size for p in waiting.values()])
        slots = np.fromiter(waiting, np.int32)
        self._pairs.append(pairs)
        self._terms.append(self._multiply(grouped.group(slots, counts, pairs // self._top_k)))

    def _multiply(self, groups: grouped.Groups) -> mx.array:
        h = grouped.grouped_gate_up(self._x, groups, self._gate, self._up)
        return grouped.grouped_down(h, groups, self._down)

    def _all_terms(self) -> tuple[mx.array, mx.array]:
        """Return the terms of all pairs, and where those of each token are: (tokens, top_k)."""
        self._compute()
        pairs = np.concatenate(self._pairs)
        places = np.empty(pairs.size, np.uint32)
        places[pairs] = np.arange(pairs.size, dtype=np.uint32)
        terms = self._terms[0] if len(self._terms) == 1 else mx.concatenate(self._terms)
        return terms, mx.array(places.reshape(-1, self._top_k))
