"""What callers ask of an engine, and what they get back. Plain data: no MLX, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        messages: the conversation, as dicts with "role" and "content".
        max_tokens: None: what is left of the context, at most 4096.
        temperature, top_p, top_k, min_p: None: as the checkpoint's generation_config.json says.
        seed: makes sampling repeatable. None: another text each time.
        stop: the answer ends before the first of these strings.
        experts: K for this request. None: the K that the model was loaded with.
    """

    messages: list[dict]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    experts: int | None = None


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thought before the answer."""

    text: str


@dataclass(frozen=True)
class End:
    """The last event.

    Attributes:
        finish_reason: "stop" (the model ended, or a stop string), "length" (max_tokens).
        prompt_tokens, generated_tokens, reasoning_tokens: counts.
        prompt_seconds: from the start of the request to its first token.
        seconds: from the first token to the last.
        experts: K in use; trained_experts: the K of training.
        bits: of the expert weights, 16 or 32 when they are not quantised.
        hit_rate: share of the needed experts that were resident, 0..1.
        bytes_read: expert bytes read from disk.
        wait_seconds: time that computing stood still for the disk.
        peak_nbytes: peak memory of the process so far.
    """

    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    reasoning_tokens: int
    prompt_seconds: float
    seconds: float
    experts: int
    trained_experts: int
    bits: float
    hit_rate: float
    bytes_read: int
    wait_seconds: float
    peak_nbytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of decode: the first token belongs to the prompt."""
        return (self.generated_tokens - 1) / self.seconds if self.seconds > 0 else 0.0


Event = Text | Reasoning | End
