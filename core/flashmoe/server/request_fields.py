"""The known fields of a request for a chat completion, and the values that each accepts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .openai_errors import invalid_field, short_repr

#: Raises ApiError for a value that the field of the given name may not have.
_Check = Callable[[str, Any], None]


def _of_type(types: type | tuple[type, ...], description: str) -> _Check:
    types = types if isinstance(types, tuple) else (types,)

    def check(name: str, value: Any) -> None:
        # A bool is an int to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise invalid_field(
                name, f"{name} is {short_repr(value)}: it must be {description}", "invalid_type"
            )

    return check


def _one_of(*values: Any, way_out: str) -> _Check:
    def check(name: str, value: Any) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise invalid_field(
                name,
                f"{name}={short_repr(value)} is not supported: {way_out}",
                "unsupported_value",
            )

    return check


def _ignored(name: str, value: Any) -> None:
    pass


def _number(name: str, value: Any) -> None:
    _of_type((int, float), "a number")(name, value)
    if abs(value) > sys.float_info.max:
        raise invalid_field(name, f"{name} is {short_repr(value)}: that is out of range")


check_flag = _of_type(bool, "true or false")
_integer = _of_type(int, "an integer")
check_text = _of_type(str, "text")
_object = _of_type(dict, "an object")
_list = _of_type(list, "a list")

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

#: The fields of a chat completion that are known, and the check of each value that is not null.
FIELDS: dict[str, _Check] = {
    "temperature": _number,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _integer,
    "top_k": _integer,
    "thinking_budget": _integer,
    "experts": _integer,
    "model": check_text,
    "messages": _list,
    "stream": check_flag,
    "stream_options": _object,
    "max_tokens": _integer,
    "max_completion_tokens": _integer,
    "stop": _of_type((str, list), "text or a list of texts"),
    "tools": _list,
    "tool_choice": _of_type(
        (str, dict), "auto, none, required, or an object that names a function"
    ),
    "parallel_tool_calls": check_flag,
    "response_format": _object,
    "reasoning_effort": _one_of(*_EFFORTS, way_out=f"use one of {', '.join(_EFFORTS)}"),
    "think": check_flag,
    "chat_template_kwargs": _object,
    "n": _one_of(1, way_out="each request gets one answer; send it again for another"),
    "logprobs": _one_of(False, way_out="leave it out"),
    "top_logprobs": _one_of(0, way_out="leave it out"),
    "logit_bias": _one_of({}, way_out="leave it out"),
    "presence_penalty": _one_of(0, way_out="leave it out, or try repetition_penalty"),
    "frequency_penalty": _one_of(0, way_out="leave it out, or try repetition_penalty"),
    "modalities": _one_of(["text"], way_out="these models write text only"),
    "audio": _one_of(way_out="these models write text only"),
    "web_search_options": _one_of(way_out="there is no web search here; pass a tool that searches"),
    "functions": _one_of([], way_out="use tools instead"),
    "function_call": _one_of("auto", "none", way_out="use tools and tool_choice instead"),
    # These are settings of OpenAI's own service, or hints: they do not affect the answer.
    **dict.fromkeys(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
        + ("prompt_cache_retention", "prediction", "verbosity", "moderation"),
        _ignored,
    ),
}
