"""Tokens in, tokens out: one step of decoding. Knows no text.

mlx-lm's `generate_step` computes one token more than it is asked for, in the background. With
experts on a disk that token costs what every other one costs, and the router is waited for in each
layer anyway. So the loop is ours; samplers and penalties are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from .models import StreamingMoE

#: Tokens that mlx-lm's repetition penalty looks back.
PENALTY_TOKENS = 20
#: Tokens for which memory is set aside at a time while an answer grows.
CONTEXT_AHEAD = 1024
_CLEAR_EVERY = 256


class Decoder:
    """Picks the next token from logits, step by step.

    Args:
        model, cache: what `step` runs.
        sampling: arguments of mlx-lm's make_sampler.
        repetition_penalty: None is off.
        history: tokens so far.
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
        self._context = len(history)
        self._room_for = 0
        # The prompt's was one.
        self.steps = 1

    def step(self, tokens: list[int]) -> mx.array:
        """Take tokens into the cache; the logits (1, vocabulary) after the last one."""
        self.steps += 1
        self._context += len(tokens)
        if self._context > self._room_for:
            self._room_for = self._context + CONTEXT_AHEAD
            self._model.room.for_decoding(self._room_for)
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
