"""Reads pieces of a prompt into the prompt cache, layer by layer. Knows no text.

A sweep takes several pieces through one layer before the next layer begins, so each expert is read
once for all of them: a prompt of 4,096 tokens needs most experts of every layer, and would read
them all eight times if each piece of 512 tokens went through the whole model alone. A piece goes
through attention and through its experts as if it were alone: attention rounds by the size of a
piece, and experts by how many of its tokens they have. So the split of a prompt into pieces
settles every bit of what comes out, and the split of pieces into sweeps none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from .events import Progress
from .footprint import PIECE_TOKENS
from .models import StreamingMoE

#: Seconds between two reports from inside a sweep.
REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Swept:
    """What a sweep left.

    Attributes:
        tokens: how many it took.
        hidden: (1, tokens of its last piece, hidden), normed.
        states: copies of the prompt cache after the pieces for which they were asked.
    """

    tokens: int
    hidden: mx.array
    states: dict[int, list[Any]]


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """Pieces of at most PIECE_TOKENS tokens, none across one of the cuts, which ascend."""
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        for first in range(start, stop, PIECE_TOKENS):
            pieces.append(list(tokens[first : min(stop, first + PIECE_TOKENS)]))
    return pieces


def prefill(
    model: StreamingMoE,
    pieces: Sequence[list[int]],
    cache: list[Any],
    *,
    limit: int = PIECE_TOKENS,
    keep: Collection[int] = (),
) -> Iterator[Swept]:
    """Take pieces into the prompt cache, sweep by sweep.

    Args:
        limit: tokens of a sweep; a piece alone may have more.
        keep: numbers of the pieces after which the state is copied.
    """
    first = 0
    while first < len(pieces):
        end = first + 1
        while end < len(pieces) and sum(map(len, pieces[first : end + 1])) <= limit:
            end += 1
        yield _sweep(model, {i: pieces[i] for i in range(first, end)}, cache, keep)
        first = end


def _sweep(
    model: StreamingMoE, pieces: dict[int, list[int]], cache: list[Any], keep: Collection[int]
) -> Swept:
    inner = model.text.model
    hidden = {i: inner.embed_tokens(mx.array([piece])) for i, piece in pieces.items()}
    states: dict[int, list[Any]] = {i: [] for i in pieces if i in keep}
    for layer, c in zip(inner.layers, cache, strict=True):
        for i, x in hidden.items():
            hidden[i] = x + _attention(layer, x, c)
            # One piece at a time: its scores are what takes the memory.
            mx.eval(hidden[i], c.state)
            if i in states:
                states[i].append(copy.deepcopy(c))
        _add_experts(layer, hidden)
    last = inner.norm(hidden.popitem()[1])
    mx.eval(last)
    return Swept(sum(map(len, pieces.values())), last, states)


def together(model: StreamingMoE, texts: Sequence[list[int]]) -> list[mx.array]:
    """The hidden states (1, tokens, hidden), normed, of texts that know nothing of each other: one
    sweep, so that each expert is read once for all of them. Each has at most PIECE_TOKENS tokens,
    and the same bits as if it were alone."""
    inner = model.text.model
    hidden = {i: inner.embed_tokens(mx.array([text])) for i, text in enumerate(texts)}
    for layer in inner.layers:
        for i, x in hidden.items():
            hidden[i] = x + _attention(layer, x, None)  # nothing comes after these texts
            mx.eval(hidden[i])
        _add_experts(layer, hidden)
    found = [inner.norm(h) for h in hidden.values()]
    mx.eval(found)
    return found


def _add_experts(layer: nn.Module, hidden: dict[int, mx.array]) -> None:
    """Add what a layer's experts give, in place."""
    normed = [layer.post_attention_layernorm(h) for h in hidden.values()]
    block = layer.mlp
    outputs = block.sweep(normed) if hasattr(block, "sweep") else map(block, normed)
    for i, y in zip(hidden, outputs, strict=True):
        hidden[i] = hidden[i] + y
        mx.eval(hidden[i])
    mx.clear_cache()


def _attention(layer: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """What attention adds to x. The masks are those that mlx-lm's models make."""
    if getattr(layer, "is_linear", False):
        return layer.linear_attn(layer.input_layernorm(x), create_ssm_mask(x, cache), cache)
    return layer.self_attn(layer.input_layernorm(x), create_attention_mask(x, cache), cache)


class Reporter:
    """Tells how far a prompt has been read, after each sweep and a few times a second inside one.

    Args:
        emit: takes the events.
        total: tokens to read. layers: of the model.
    """

    def __init__(self, emit: Callable[[Progress], None], total: int, layers: int):
        self._emit = emit
        self._total = total
        self._layers = layers
        self._done = 0
        self._last = perf_counter()

    def entered(self, layer: int) -> None:
        """The sweep under way has reached a layer."""
        if perf_counter() - self._last >= REPORT_SECONDS:
            self._report(layer)

    def took(self, tokens: int) -> None:
        """A sweep is done."""
        # Tokens that a grammar forced are read with the prompt, and are not of it.
        self._done = min(self._total, self._done + tokens)
        self._report(self._layers)

    def _report(self, layer: int) -> None:
        self._last = perf_counter()
        self._emit(Progress(self._done, self._total, layer, self._layers))
