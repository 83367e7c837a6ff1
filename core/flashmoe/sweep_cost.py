"""What a token costs: the bytes that it needs, and how fast the engine is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from .checkpoint import Checkpoint
from .engine import Engine
from .requests import Request

#: Of generation at each point: rounds, which alternate between the values of K, and tokens of each.
ROUNDS = 3
SPEED_TOKENS = 64
_SPEED_PROMPT = "Tell me a long story about the sea."


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
    """Of each K, medians over rounds of the same answer. read_bytes: of experts, a token of prompt and
    answer; none where all of them are in slots."""
    message = [{"role": "user", "content": _SPEED_PROMPT}]
    asked = {"max_tokens": SPEED_TOKENS, "temperature": 0.0, "think": False, "cache": False}
    *_, _ = engine.stream(Request(message, **asked))  # loads, and fills slots
    ends: dict[int, list] = {k: [] for k in experts}
    for _ in range(ROUNDS):
        for k in experts:
            *_, end = engine.stream(Request(message, experts=k, **asked))
            ends[k].append(end)
            advance(1)
    return {
        k: {
            "tokens_per_second": round(median(e.tokens_per_second for e in found), 2),
            "hit_rate": round(median(e.hit_rate for e in found), 4),
            "read_bytes": round(median(e.bytes_per_token for e in found)),
            "tokens": median(e.generated_tokens for e in found),
        }
        for k, found in ends.items()
    }
