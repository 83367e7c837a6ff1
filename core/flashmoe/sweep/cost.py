"""What a token costs: the bytes that it needs, and how fast the engine is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from ..checkpoint.checkpoint import Checkpoint
from ..engine import Engine
from ..events import End
from ..requests import Request

#: Of generation at each K: rounds, which alternate between the values of K, and tokens of each.
ROUNDS = 3
SPEED_TOKENS = 64


@dataclass(frozen=True)
class Needed:
    """Bytes that one token needs: of dense weights, which stay in memory, and of its experts."""

    dense: int
    experts: int


def needed(checkpoint: Checkpoint, k: int) -> Needed:
    """By the shapes. Of an embedding that is not the head too, a token needs one row."""
    tied = not any("lm_head." in t.name for t in checkpoint.dense)
    dense = sum(t.nbytes for t in checkpoint.dense if tied or ".embed_tokens." not in t.name)
    experts = sum(k * x.expert_nbytes for x in checkpoint.expert_layers.values())
    return Needed(dense, experts)


def speeds(engine: Engine, experts: list[int], advance: Callable[[int], None]) -> dict[int, dict]:
    """Of each K, medians over rounds. read_bytes: of experts, from the disk, for each token of
    prompts and answers."""
    _answers(engine, experts[0], 0)  # loads the model, and fills slots
    found: dict[int, list[dict]] = {k: [] for k in experts}
    for number in range(ROUNDS):
        for k in experts:
            found[k].append(_speed(_answers(engine, k, number)))
            advance(1)
    return {k: {name: median(s[name] for s in f) for name in f[0]} for k, f in found.items()}


def _answers(engine: Engine, k: int, number: int) -> list[End]:
    """Of SPEED_TOKENS tokens in all: an answer may be short. Drawn, the same ones in each sweep."""
    message = [{"role": "user", "content": "Tell me a long story about the sea."}]
    ends: list[End] = []
    left = SPEED_TOKENS
    while left > 0 and len(ends) < SPEED_TOKENS:
        asked = {"max_tokens": left, "temperature": 1.0, "seed": 100 * number + len(ends)}
        *_, end = engine.stream(Request(message, experts=k, think=False, cache=False, **asked))
        ends.append(end)
        left -= end.generated_tokens
    return ends


def _speed(ends: list[End]) -> dict:
    seconds = sum(e.seconds for e in ends)
    tokens = sum(max(0, e.generated_tokens - 1) for e in ends)
    passed = sum(e.prompt_tokens + e.generated_tokens for e in ends)
    return {
        "tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "hit_rate": round(median(e.hit_rate for e in ends), 4),
        "read_bytes": round(sum(e.bytes_read for e in ends) / passed),
    }
