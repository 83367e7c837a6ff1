"""Sample the next token from logits. Knows no text.

mlx-lm's `generate_step` computes one token more than it is asked for, in the background. With
experts on a disk that token costs what every other one costs, and the router is waited for in each
layer anyway. So the generation loop is flashmoe's; samplers and penalties are mlx-lm's, except that
a sampler that needs few tokens does not sort all of them (`Candidates`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..errors import CheckpointError

#: Tokens that mlx-lm's repetition penalty looks back.
PENALTY_TOKENS = 20
#: Tokens among which top_p looks first when top_k leaves more.
FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Penalties:
    """What is changed in the logits before a token is sampled; None is off.

    Attributes:
        repetition: mlx-lm's factor for the last `PENALTY_TOKENS` of prompt and answer.
        presence, frequency: what is subtracted for a token that is in the answer, and for each time
            that it is there.
        bias: what is added, by token.
    """

    repetition: float | None = None
    presence: float | None = None
    frequency: float | None = None
    bias: dict[int, float] | None = None


@dataclass(frozen=True)
class Sampled:
    """A token, and what was asked for about its probability.

    Attributes:
        logprob: its log probability after penalties and grammar, before temperature and the
            options that leave out tokens; None if it was not asked for.
        top: the likeliest tokens in its place, with their log probabilities, in order.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Candidates:
    """Samples as mlx-lm's make_sampler does, from few candidates where that is the same.

    mlx-lm applies top_p, then min_p, then top_k, each to the whole vocabulary, which sorts it. All
    three keep the likeliest tokens, so the order changes nothing as long as top_p counts the
    probability of all tokens: here the likeliest tokens are picked first.

    Args:
        settings: arguments of make_sampler.
    """

    def __init__(self, settings: dict[str, Any]):
        self._all = make_sampler(**settings)
        self._temperature = settings.get("temp", 0.0)
        self._top_p = settings.get("top_p", 1.0)
        self._top_k = settings.get("top_k", 0)
        self._min_p = settings.get("min_p", 0.0)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return a token for the log probabilities of all tokens, (1, vocabulary)."""
        size = logprobs.shape[-1]
        nucleus = 0 < self._top_p < 1
        count = self._top_k or (FIRST_CANDIDATES if nucleus else size)
        if not self._temperature or count >= size:
            return self._all(logprobs)
        tokens = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., :count]
        kept = mx.take_along_axis(logprobs, tokens, axis=-1)
        order = mx.argsort(-kept, axis=-1)
        tokens = mx.take_along_axis(tokens, order, axis=-1)
        kept = mx.take_along_axis(kept, order, axis=-1)
        if nucleus:
            probabilities = mx.exp(kept)
            above = mx.cumsum(probabilities, axis=-1, inclusive=False)
            if not self._top_k:
                mass: Any = mx.sum(probabilities).item()
                if mass < self._top_p:
                    return self._all(logprobs)
            inside = mx.sum(above < self._top_p, axis=-1, keepdims=True)
            least = mx.take_along_axis(kept, mx.maximum(inside, 1) - 1, axis=-1)
            kept = mx.where(kept < least, -mx.inf, kept)
        if self._min_p:
            kept = mx.where(kept < kept[..., :1] + math.log(self._min_p), -mx.inf, kept)
        chosen = mx.random.categorical(kept * (1 / self._temperature))
        return mx.take_along_axis(tokens, chosen[..., None], axis=-1)[..., 0]


class Sampler:
    """Samples the tokens of one answer.

    Args:
        settings: arguments of mlx-lm's make_sampler.
        penalties: changes of the logits.
        seed: of the answer's draws, which no other answer changes.
        prompt: tokens of the prompt.
        logprobs: how many of the likeliest tokens to report with each; None: no probabilities.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        penalties: Penalties,
        seed: int,
        prompt: Sequence[int],
        logprobs: int | None = None,
    ):
        self._sampler = Candidates(settings)
        self._recent = make_logits_processors(
            repetition_penalty=penalties.repetition, repetition_context_size=PENALTY_TOKENS
        )
        # As in OpenAI's API, these look at the whole answer, and not at the prompt.
        whole = 1 << 31
        self._whole = make_logits_processors(
            logit_bias=penalties.bias or None,
            presence_penalty=penalties.presence,
            presence_context_size=whole,
            frequency_penalty=penalties.frequency,
            frequency_context_size=whole,
        )
        self._seeds = random.Random(seed)
        self._history = list(prompt[-PENALTY_TOKENS:])
        self._answer: list[int] = []
        self._logprobs = logprobs

    def record(self, tokens: list[int]) -> None:
        """Add tokens that the answer goes on with to the history."""
        self._history = [*self._history, *tokens][-PENALTY_TOKENS:]
        if self._whole:
            self._answer += tokens

    def sample(self, logits: mx.array, mask: Callable[[mx.array], mx.array]) -> Sampled:
        """Return a token that `mask` allows. logits: (1, vocabulary).

        Raises:
            CheckpointError: a logit is NaN or infinite, so that there is no likeliest token.
        """
        for processor in self._recent:
            logits = processor(mx.array(self._history), logits)
        for processor in self._whole:
            logits = processor(mx.array(self._answer, mx.int32), logits)
        logits = mask(logits)
        # MLX's random state is one for all answers of a thread.
        mx.random.seed(self._seeds.getrandbits(64))
        total = mx.logsumexp(logits, keepdims=True)
        logprobs = logits - total
        chosen = self._sampler(logprobs)
        mx.eval(chosen, total)
        token: Any = chosen.item()
        sum_of_logits: Any = total.item()
        if not math.isfinite(sum_of_logits):
            raise CheckpointError(
                "the model computed logits that are NaN or infinite, so no token can be chosen: "
                "its files may be damaged; download them again, and see flashmoe doctor MODEL"
            )
        return self._with_probabilities(token, logprobs)

    def _with_probabilities(self, token: int, logprobs: mx.array) -> Sampled:
        if self._logprobs is None:
            return Sampled(token)
        logprob: Any = logprobs[0, token].item()
        if self._logprobs == 0:
            return Sampled(token, logprob)
        count = min(self._logprobs, logprobs.shape[-1])
        tokens = mx.argpartition(-logprobs[0], kth=count - 1)[:count]
        values: Any = logprobs[0][tokens].tolist()
        ids: Any = tokens.tolist()
        # A grammar may allow fewer tokens than were asked for.
        top = sorted(
            ((v, i) for i, v in zip(ids, values, strict=True) if v > -math.inf), key=_first
        )
        return Sampled(token, logprob, tuple((i, v) for v, i in top))


def _first(pair: tuple[float, int]) -> tuple[float, int]:
    """Return the key by which the likeliest token comes first."""
    return -pair[0], pair[1]
