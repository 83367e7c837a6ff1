"""The fields of a chat completion's body that are known, and what each may be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .openai_errors import bad, shown

#: Raises for a value that the field of this name may not have.
_Check = Callable[[str, Any], None]


def _of(kinds: type | tuple[type, ...], words: str) -> _Check:
    def check(name: str, value: Any) -> None:
        kinds_ = kinds if isinstance(kinds, tuple) else (kinds,)
        # A bool is an int to Python.
        if not isinstance(value, kinds_) or (isinstance(value, bool) and bool not in kinds_):
            raise bad(name, f"{name} is {shown(value)}: it must be {words}", code="invalid_type")

    return check


def _only(*values: Any, way_out: str) -> _Check:
    def check(name: str, value: Any) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise bad(
                name, f"{name}={shown(value)} is not supported: {way_out}", code="unsupported_value"
            )

    return check


def _ignored(name: str, value: Any) -> None:
    pass


def _number(name: str, value: Any) -> None:
    _of((int, float), "a number")(name, value)
    if abs(value) > sys.float_info.max:
        raise bad(name, f"{name} is {shown(value)}: that is out of range")


check_flag = _of(bool, "true or false")
_integer = _of(int, "an integer")
check_text = _of(str, "text")
_object = _of(dict, "an object")
_list = _of(list, "a list")

#: Of the request, under the same name in both.
SAME = {name: _number for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
SAME |= {name: _integer for name in ("seed", "top_k", "thinking_budget", "experts")}

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

FIELDS: dict[str, _Check] = {
    **SAME,
    "model": check_text,
    "messages": _list,
    "stream": check_flag,
    "stream_options": _object,
    "max_tokens": _integer,
    "max_completion_tokens": _integer,
    "stop": _of((str, list), "text or a list of texts"),
    "tools": _list,
    "tool_choice": _of((str, dict), "auto, none, required, or an object that names a function"),
    "parallel_tool_calls": check_flag,
    "response_format": _object,
    "reasoning_effort": _only(*_EFFORTS, way_out=f"give one of {', '.join(_EFFORTS)}"),
    "think": check_flag,
    "chat_template_kwargs": _object,
    "n": _only(1, way_out="an answer is one; send the request again for another"),
    "logprobs": _only(False, way_out="leave it out"),
    "top_logprobs": _only(0, way_out="leave it out"),
    "logit_bias": _only({}, way_out="leave it out"),
    "presence_penalty": _only(0, way_out="leave it out, or try repetition_penalty"),
    "frequency_penalty": _only(0, way_out="leave it out, or try repetition_penalty"),
    "modalities": _only(["text"], way_out="these models write text only"),
    "audio": _only(way_out="these models write text only"),
    "web_search_options": _only(way_out="nothing is searched here; give a tool that does"),
    "functions": _only([], way_out="give tools instead"),
    "function_call": _only("auto", "none", way_out="give tools and tool_choice instead"),
    # They are of OpenAI's own service, or hints, and change nothing about the answer.
    **dict.fromkeys(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
        + ("prompt_cache_retention", "prediction", "verbosity", "moderation"),
        _ignored,
    ),
}
