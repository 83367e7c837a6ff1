"""Define requests to an engine, which are checked before any work is done.

Requests are plain data: this module is cheap to import and does not import MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from reprlib import Repr
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

#: The options that are numbers: whether the number is whole, the lowest value, and the highest or
#: None. Beyond these, logits would not be finite in float32. All front ends check them here.
RANGES: dict[str, tuple[bool, float, float | None]] = {
    "max_tokens": (True, 1, None),
    "temperature": (False, 0, 100),
    "top_p": (False, 0, 1),
    "top_k": (True, 0, None),
    "min_p": (False, 0, 1),
    "repetition_penalty": (False, 0.01, 100),
    "seed": (True, 0, 2**64 - 1),
    "thinking_budget": (True, 0, None),
}
#: Below it a temperature is 0, and a top_p leaves the likeliest token: what they tend to.
SMALLEST = 1e-5
#: The most stop strings of a request, and characters of one: each token is compared with all.
MAX_STOPS, MAX_STOP_LENGTH = 32, 1000

_NONE = type(None)
#: The other options, the types that they may have, and those types in words.
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("messages", (list, tuple), "a list of messages"),
    ("stop", (list, tuple), "a tuple of strings"),
    ("experts", (int, _NONE), "an integer"),
    ("tools", (list, tuple), "a list of tools"),
    ("tool_choice", (str,), "auto, none, required, or the name of a tool"),
    ("parallel_tool_calls", (bool,), "True or False"),
    ("think", (bool, _NONE), "True, False or None"),
    ("cache", (bool,), "True or False"),
    ("constrain", (bool,), "True or False"),
)
#: Cuts long and deep values.
_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 110


@dataclass(frozen=True)
class Request:
    """A request for one answer.

    Attributes:
        messages: the conversation; see `flashmoe.chat.messages`.
        max_tokens: the most tokens to generate. None: what is left of the context, but at most
            4096.
        temperature, top_p, top_k, min_p: sampling options. None: the value in the checkpoint's
            generation_config.json. A temperature of 0 takes the likeliest token each time.
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


def in_range(name: str, value: Any) -> bool:
    """Return whether the option may have this value, None apart. NaN is never allowed."""
    whole, low, high = RANGES[name]
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    return bool(number >= low and (high is None or number <= high))


def check_request(request: Request) -> None:
    """Raise an error if an option of the request is out of range or malformed.

    Raises:
        SettingError: names the option, its value, and what is allowed.
    """
    for name, (whole, low, high) in RANGES.items():
        value = getattr(request, name)
        if value is not None and not in_range(name, value):
            kind = "an integer" if whole else "a number"
            allowed = f"of {low} or more" if high is None else f"between {low} and {high}"
            raise SettingError(
                f"{name}={_show(value)} is out of range: it must be {kind} {allowed}"
            )
    for name, types, what in _KINDS:
        value = getattr(request, name)
        # A bool is an int to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SettingError(f"{name}={_show(value)} cannot be used: it must be {what}")
    _check_stops(request.stop)
    _check_format(request.response_format)


def _check_stops(stops: Sequence[Any]) -> None:
    if len(stops) > MAX_STOPS:
        raise SettingError(
            f"stop={_show(stops)} are {len(stops)} strings: at most {MAX_STOPS} are allowed"
        )
    for text in stops:
        if not isinstance(text, str):
            raise SettingError(f"stop={_show(stops)} has {_show(text)}, which is not a string")
        if not text:
            raise SettingError(
                f"stop={_show(stops)} has an empty string, which would end every answer at once: "
                "leave it out"
            )
        if len(text) > MAX_STOP_LENGTH:
            raise SettingError(
                f"stop={_show(text)} has {len(text)} characters: at most {MAX_STOP_LENGTH} are "
                "allowed"
            )


def _show(value: Any) -> str:
    text = _repr.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_format(wanted: Any) -> None:
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if not isinstance(kind, str) or kind not in RESPONSE_FORMATS:
        raise SettingError(
            f"response_format={_show(wanted)} is not supported: give a dict whose type is one of "
            f"{', '.join(RESPONSE_FORMATS)}"
        )
    key = RESPONSE_FORMATS[kind]
    if key is None:
        return
    types: tuple[type, ...] = (dict, bool) if key == "schema" else (str,)
    if not isinstance(wanted.get(key), types):
        what = "a JSON schema" if key == "schema" else "a string"
        raise SettingError(
            f"response_format={_show(wanted)} has no valid {key!r}: for the type {kind}, it must "
            f"be {what}"
        )
