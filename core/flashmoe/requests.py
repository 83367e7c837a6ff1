"""Define requests to an engine, which are checked before any work is done.

Requests are plain data: this module is cheap to import and does not import MLX.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import SettingError

#: The types of `Request.response_format`, and the key that each of them needs.
RESPONSE_FORMATS = {
    "text": None,
    "json_object": None,
    "json_schema": "schema",
    "regex": "pattern",
    "lark": "grammar",
}

#: The ranges of the sampling options: (lowest, highest or None for no limit).
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
    """A request for one answer.

    Attributes:
        messages: the conversation; see `flashmoe.chat.messages`.
        max_tokens: the most tokens to generate. None: what is left of the context, but at most
            4096.
        temperature, top_p, top_k, min_p: sampling options. None: the value in the checkpoint's
            generation_config.json.
        repetition_penalty: a value above 1 makes recent tokens less likely. None: no penalty.
        seed: makes sampling repeatable. None: another answer each time.
        stop: stop strings. The answer ends before the first of them.
        experts: the number of experts per token (K) for this request. None: the K that the model
            was loaded with.
        tools: function tools, as {"type": "function", "function": {"name": ..., "description":
            ..., "parameters": JSON schema}} or the inner dict alone.
        tool_choice: "auto", "none", "required" (at least one call), or the name of a tool (exactly
            one call of this tool).
        parallel_tool_calls: False allows at most one call in an answer.
        response_format: None for text, or {"type": "json_object"}, {"type": "json_schema",
            "schema": ...}, {"type": "regex", "pattern": ...}, {"type": "lark", "grammar": ...}.
            With tools, the answer is either tool calls or text in this format.
        think: whether to reason before the answer. None: the model's default.
        thinking_budget: the number of reasoning tokens after which the reasoning is closed. None:
            no limit.
        cache: False neither looks up the prompt in the prompt cache nor adds it there.
        constrain: False describes tools to the model but enforces neither tools nor response_format
            with a grammar.
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
    """Return whether a sampling option may have this value. NaN is never allowed."""
    low, high = RANGES[name]
    return value >= low and (high is None or value <= high)


def check_request(request: Request) -> None:
    """Raise an error if an option of the request is out of range or malformed.

    Raises:
        SettingError: names the option, its value, and what is allowed.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(request, name)
        if value is not None and not in_range(name, value):
            allowed = f"{low} or more" if high is None else f"between {low} and {high}"
            raise SettingError(f"{name}={value} is out of range: it must be {allowed}")
    if isinstance(request.stop, str):
        raise SettingError(f"stop={request.stop!r} is a string: give a tuple of strings")
    if any(not text for text in request.stop):
        raise SettingError(
            "a stop string is empty, which would end every answer at once: leave it out"
        )
    _check_format(request.response_format)


def _check_format(wanted: Any) -> None:
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in RESPONSE_FORMATS:
        raise SettingError(
            f"response_format={wanted!r} is not supported: give a dict whose type is one of "
            f"{', '.join(RESPONSE_FORMATS)}"
        )
    key = RESPONSE_FORMATS[kind]
    if key is None:
        return
    types: tuple[type, ...] = (dict, bool) if key == "schema" else (str,)
    if not isinstance(wanted.get(key), types):
        what = "a JSON schema" if key == "schema" else "a string"
        raise SettingError(
            f"response_format={wanted!r} has no valid {key!r}: for the type {kind}, {key!r} must "
            f"be {what}"
        )
