"""What callers ask of an engine, and what they get back. Plain data: no MLX, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SettingError


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


#: What sampling options may be: (lowest, highest or None).
RANGES = {
    "max_tokens": (1, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "top_k": (0, None),
    "min_p": (0, 1),
    "seed": (0, 2**64 - 1),
}


def in_range(name: str, value: float) -> bool:
    """Whether an option may have that value. NaN may not."""
    low, high = RANGES[name]
    return value >= low and (high is None or value <= high)


def check_request(request: Request) -> None:
    """Refuse values out of range, naming the option.

    Raises:
        SettingError
    """
    for name, (low, high) in RANGES.items():
        value = getattr(request, name)
        if value is not None and not in_range(name, value):
            allowed = f"{low} or more" if high is None else f"{low} to {high}"
            raise SettingError(f"{name}={value} is out of range: it must be {allowed}")
    if any(not text for text in request.stop):
        raise SettingError("a stop string is empty: it would end every answer at once")
