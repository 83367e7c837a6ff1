"""What a token costs: the bytes that it needs, and how fast the engine generates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from ..checkpoint.checkpoint import Checkpoint
from ..engine import Engine
from ..events import End
from ..requests import Request

#: Measurements at each K, which alternate between the values of K, and tokens of each.
ROUNDS = 3
SPEED_TOKENS = 64


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one token needs.

    Attributes:
        dense: bytes of dense weights, which stay in memory.
        experts: bytes of the experts of all layers.
    """

    dense: int
    experts: int


def token_bytes(checkpoint: Checkpoint, k: int) -> TokenBytes:
    """Return the bytes that a token needs with K experts, computed from the shapes.

    An embedding that is not also the output head does not count: a token needs one row of it.
    """
    tied = not any("lm_head." in t.name for t in checkpoint.dense)
    dense = sum(t.nbytes for t in checkpoint.dense if tied or ".embed_tokens." not in t.name)
    experts = sum(k * x.expert_nbytes for x in checkpoint.expert_layers.values())
    return TokenBytes(dense, experts)


def measure_speeds(
    engine: Engine, experts: list[int], advance: Callable[[int], None]
) -> dict[int, dict[str, float]]:
    """Measure generation for each K.

    Args:
        experts: the values of K.
        advance: called with 1 after each measurement.

    Returns:
        K -> medians over the rounds: tokens_per_second, hit_rate, and read_bytes, which are expert
        bytes read from the disk for each token of prompts and answers.
    """
    _generate(engine, experts[0], 0)  # loads the model and fills the slots
    rounds: dict[int, list[dict[str, float]]] = {k: [] for k in experts}
    for number in range(ROUNDS):
        for k in experts:
            rounds[k].append(_speed(_generate(engine, k, number)))
            advance(1)
    return {
        k: {name: median(figures[name] for figures in measured) for name in measured[0]}
        for k, measured in rounds.items()
    }


def _generate(engine: Engine, k: int, number: int) -> list[End]:
    """Generate SPEED_TOKENS tokens and return the ends of the answers.

    Several answers are needed if they are short. They are sampled with the same seeds in each
    sweep.
    """
    message = [{"role": "user", "content": "Tell me a long story about the sea."}]
    ends: list[End] = []
    left = SPEED_TOKENS
    while left > 0 and len(ends) < SPEED_TOKENS:
        request = Request(
            message,
            max_tokens=left,
            temperature=1.0,
            seed=100 * number + len(ends),
            experts=k,
            think=False,
            cache=False,
        )
        *_, end = engine.stream(request)
        assert isinstance(end, End), "the last event of every answer"
        ends.append(end)
        left -= end.generated_tokens
    return ends


def _speed(ends: list[End]) -> dict[str, float]:
    seconds = sum(e.seconds for e in ends)
    # The first token of an answer is part of the prefill time.
    tokens = sum(max(0, e.generated_tokens - 1) for e in ends)
    processed = sum(e.prompt_tokens + e.generated_tokens for e in ends)
    return {
        "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "hit_rate": round(median(e.hit_rate for e in ends), 4),
        "read_bytes": round(sum(e.bytes_read for e in ends) / processed),
    }
