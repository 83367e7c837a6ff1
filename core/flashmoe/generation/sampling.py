"""Sample the next token from logits. Knows no text.

mlx-lm's `generate_step` computes one token more than it is asked for, in the background. With
experts on a disk that token costs what every other one costs, and the router is waited for in each
layer anyway. So the generation loop is flashmoe's; samplers and penalties are mlx-lm's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import CheckpointError

#: Tokens that mlx-lm's repetition penalty looks back.
PENALTY_TOKENS = 20


class Sampler:
    """Samples the tokens of one answer.

    Args:
        settings: arguments of mlx-lm's make_sampler.
        repetition_penalty: None is off.
        seed: of the answer's draws, which no other answer changes.
        history: tokens of the prompt and of the answer so far.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        repetition_penalty: float | None,
        seed: int,
        history: Sequence[int],
    ):
        self._sampler = make_sampler(**settings)
        self._processors = make_logits_processors(
            repetition_penalty=repetition_penalty, repetition_context_size=PENALTY_TOKENS
        )
        self._seeds = random.Random(seed)
        self._history = list(history[-PENALTY_TOKENS:])

    def record(self, tokens: list[int]) -> None:
        """Add tokens that the answer goes on with to the history."""
        self._history = [*self._history, *tokens][-PENALTY_TOKENS:]

    def sample(self, logits: mx.array, mask: Callable[[mx.array], mx.array]) -> int:
        """Return a token that `mask` allows. logits: (1, vocabulary).

        Raises:
            CheckpointError: a logit is NaN or infinite, so that there is no likeliest token.
        """
        for processor in self._processors:
            logits = processor(mx.array(self._history), logits)
        logits = mask(logits)
        # MLX's random state is one for all answers of a thread.
        mx.random.seed(self._seeds.getrandbits(64))
        total = mx.logsumexp(logits, keepdims=True)
        chosen = self._sampler(logits - total)
        mx.eval(chosen, total)
        token: Any = chosen.item()
        sum_of_logits: Any = total.item()
        if not math.isfinite(sum_of_logits):
            raise CheckpointError(
                "the model computed logits that are NaN or infinite, so no token can be chosen: "
                "its files may be damaged; download them again, and see flashmoe doctor MODEL"
            )
        return token
