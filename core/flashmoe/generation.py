"""Tokens in, tokens out: prefill in chunks, and one step of decoding. Knows no text.

mlx-lm's `generate_step` computes one token more than it is asked for, in the background. With
experts on a disk that token costs what every other one costs, and the router is waited for in each
layer anyway. So the loop is ours; samplers and penalties are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from .events import Progress
from .footprint import PREFILL_TOKENS
from .models import StreamingMoE

#: Seconds between two reports from inside a chunk.
REPORT_SECONDS = 0.25
#: Tokens that mlx-lm's repetition penalty looks back.
PENALTY_TOKENS = 20
_CLEAR_EVERY = 256


def prefill(model: StreamingMoE, tokens: list[int], cache: list[Any]) -> Iterator[int]:
    """Take tokens into the cache, chunk by chunk; the number that each chunk took."""
    for start in range(0, len(tokens), PREFILL_TOKENS):
        chunk = tokens[start : start + PREFILL_TOKENS]
        # The hidden states too: they are what makes the last layer compute at all.
        mx.eval(model.read(chunk, cache), [c.state for c in cache])
        mx.clear_cache()
        yield len(chunk)


class Reporter:
    """Tells how far a prompt has been read, after each chunk and a few times a second inside one.

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
        """The chunk under way has reached a layer."""
        if perf_counter() - self._last >= REPORT_SECONDS:
            self._report(layer)

    def took(self, tokens: int) -> None:
        """A chunk is done."""
        self._done += tokens
        self._report(self._layers)

    def _report(self, layer: int) -> None:
        self._last = perf_counter()
        self._emit(Progress(self._done, self._total, layer, self._layers))


class Decoder:
    """Picks the next token from logits, step by step.

    Args:
        model, cache: what `step` runs.
        sampling: arguments of mlx-lm's make_sampler.
        repetition_penalty: None is off.
        history: tokens so far, for the penalty.
    """

    def __init__(
        self,
        model: StreamingMoE,
        cache: list[Any],
        sampling: dict[str, float],
        repetition_penalty: float | None,
        history: list[int],
    ):
        self._model = model
        self._cache = cache
        self._sampler = make_sampler(**sampling)
        self._processors = make_logits_processors(
            repetition_penalty=repetition_penalty, repetition_context_size=PENALTY_TOKENS
        )
        self._history = history[-PENALTY_TOKENS:]
        self.steps = 0

    def step(self, tokens: list[int]) -> mx.array:
        """Take tokens into the cache; the logits (1, vocabulary) after the last one."""
        self.steps += 1
        self._history = [*self._history, *tokens][-PENALTY_TOKENS:]
        logits = self._model.next_logits(tokens, self._cache)
        mx.eval(logits, [c.state for c in self._cache])
        if self.steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return logits

    def pick(self, logits: mx.array, mask: Callable[[mx.array], mx.array]) -> int:
        """Sample a token that `mask` lets through."""
        for processor in self._processors:
            logits = processor(mx.array(self._history), logits)
        logits = mask(logits)
        return self._sampler(logits - mx.logsumexp(logits, keepdims=True)).item()
