"""What callers ask of an engine. Plain data, checked before any work: no MLX, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import SettingError

#: Kinds of `Request.response_format`, and the key that holds what each needs.
RESPONSE_FORMATS = {
    "text": None,
    "json_object": None,
    "json_schema": "schema",
    "regex": "pattern",
    "lark": "grammar",
}

#: What sampling options may be: (lowest, highest or None).
RANGES = {
    "max_tokens": (1, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "top_k": (0, None),
    "min_p": (0, 1),
    "repetition_penalty": (0, None),
    "seed": (0, 2**64 - 1),
    "thinking_budget": (0, None),
}


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        messages: the conversation, see `flashmoe.chat.messages`.
        max_tokens: None: what is left of the context, at most 4096.
        temperature, top_p, top_k, min_p: None: as the checkpoint's generation_config.json says.
        repetition_penalty: above 1 makes tokens of late less likely. None is off.
        seed: makes sampling repeatable. None: another text each time.
        stop: the answer ends before the first of these strings.
        experts: K for this request. None: the K that the model was loaded with.
        tools: function tools, as {"type": "function", "function": {"name": ..., "description":
            ..., "parameters": JSON schema}} or the inner dict alone.
        tool_choice: "auto", "none", "required" (one call or more), or the name of one tool (one
            call of it).
        parallel_tool_calls: False: an answer holds one call at most.
        response_format: None for text, or {"type": "json_object"}, {"type": "json_schema",
            "schema": ...}, {"type": "regex", "pattern": ...}, {"type": "lark", "grammar": ...}.
            With tools, the answer is calls or such a document.
        think: reason before the answer; None: the model's default.
        thinking_budget: tokens of thought after which it is closed. None: no limit.
        cache: False: neither look for the prompt in the prompt cache nor keep it there.
        constrain: False: tools and formats are asked for but not enforced by a grammar.
    """

    messages: list[dict]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    experts: int | None = None
    tools: list[dict] = field(default_factory=list)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: dict | None = None
    think: bool | None = None
    thinking_budget: int | None = None
    cache: bool = True
    constrain: bool = True


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
    if isinstance(request.stop, str):
        raise SettingError(f"stop={request.stop!r} is a string: give a tuple of strings")
    if any(not text for text in request.stop):
        raise SettingError("a stop string is empty: it would end every answer at once")
    _check_format(request.response_format)


def _check_format(wanted: dict | None) -> None:
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in RESPONSE_FORMATS:
        raise SettingError(
            f"response_format={wanted!r} is not known: give a dict whose type is one of "
            f"{', '.join(RESPONSE_FORMATS)}"
        )
    key = RESPONSE_FORMATS[kind]
    kinds = (dict, bool) if key == "schema" else str
    if key is not None and not isinstance(wanted.get(key), kinds):
        raise SettingError(f"response_format of type {kind} needs its {key!r}, got {wanted!r}")
