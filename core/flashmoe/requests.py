"""Define requests to an engine, which are checked before any work is done.

Requests are plain data: this module is cheap to import and does not import MLX.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from reprlib import Repr
from typing import Any

from .errors import SettingError

#: The types of `Request.response_format`, and the key that each of them needs. A json_object may
#: have a schema, too.
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
    "presence_penalty": (False, -2, 2),
    "frequency_penalty": (False, -2, 2),
    "logprobs": (True, 0, 20),
    "seed": (True, 0, 2**64 - 1),
    "thinking_budget": (True, 0, None),
}
#: Below it a temperature is 0, and a top_p leaves the likeliest token: what they tend to.
SMALLEST = 1e-5
#: The most tokens that may have a bias, and the largest bias.
MAX_BIASES, MAX_BIAS = 1024, 100
#: Variables of a chat template that follow from the other fields of a request.
TEMPLATE_VARIABLES = frozenset(
    ("messages", "tools", "conversations", "chat_template", "add_generation_prompt")
    + ("continue_final_message", "return_assistant_tokens_mask")
)
#: The most stop strings of a request, and characters of one: each token is compared with all.
MAX_STOPS, MAX_STOP_LENGTH = 32, 1000

#: The values of `Request.tool_choice` that are not the name of a tool.
TOOL_CHOICES = ("auto", "none", "required")

_NONE = type(None)
#: The other options, the types that they may have, and those types in words.
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("messages", (list, tuple), "a list of messages"),
    ("stop", (list, tuple), "a tuple of strings"),
    ("experts", (int, _NONE), "an integer"),
    ("tools", (list, tuple), "a list of tools"),
    ("tool_choice", (str,), "auto, none, required, or the name of a tool"),
    ("logit_bias", (dict, _NONE), "a dict of token ids and numbers"),
    ("chat_template_kwargs", (dict, _NONE), "a dict of variables"),
    ("continue_last", (bool,), "True or False"),
    ("parallel_tool_calls", (bool,), "True or False"),
    ("think", (bool, _NONE), "True, False or None"),
    ("prompt", (str, list, tuple, _NONE), "a text, or a list of tokens"),
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
        presence_penalty, frequency_penalty: what is subtracted from the logit of a token that the
            answer has already, and for each time that it has it. None: no penalty.
        logit_bias: numbers that are added to the logits of tokens, by token id.
        logprobs: report the log probability of each token of the text, and this many of the
            likeliest tokens at its place. None: report none.
        seed: makes sampling repeatable. None: another answer each time.
        stop: stop strings. The answer ends before the first of them.
        experts: the number of experts per token (K) for this request. None: the K that the model
            was loaded with.
        tools: function tools, as {"type": "function", "function": {"name": ..., "description":
            ..., "parameters": JSON schema}} or the inner dict alone.
        tool_choice: "auto", "none", "required" (at least one call), or the name of a tool (exactly
            one call of this tool); OpenAI's dict with the name is that name.
        parallel_tool_calls: False allows at most one call in an answer.
        response_format: None for text, or {"type": "json_object"} with or without a "schema",
            {"type": "json_schema", "schema": ...}, {"type": "regex", "pattern": ...}, {"type":
            "lark", "grammar": ...}.
            With tools, the answer is either tool calls or text in this format.
        think: whether to reason before the answer. None: the model's default.
        thinking_budget: the number of reasoning tokens after which the reasoning is closed. None:
            no limit.
        prompt: a prompt that is continued as it is, in place of messages: a text, in which special
            tokens count, or tokens. No prompt cache is used.
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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict | None = None
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    experts: int | None = None
    tools: list[dict] = field(default_factory=list)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: dict | None = None
    think: bool | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict | None = None
    continue_last: bool = True
    prompt: str | Sequence[int] | None = None
    cache: bool = True
    constrain: bool = True

    def __post_init__(self) -> None:
        """Write what has two forms in one of them. `check_request` refuses what is left."""
        choice: Any = self.tool_choice
        if isinstance(choice, dict) and choice.get("type", "function") == "function":
            function = choice.get("function", choice)
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in TOOL_CHOICES:
                object.__setattr__(self, "tool_choice", name)
        variables: Any = self.chat_template_kwargs
        if isinstance(variables, dict) and isinstance(variables.get("enable_thinking"), bool):
            rest = {k: v for k, v in variables.items() if k != "enable_thinking"}
            if self.think is None:
                object.__setattr__(self, "think", variables["enable_thinking"])
            object.__setattr__(self, "chat_template_kwargs", rest)


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
    _check_biases(request.logit_bias or {})
    _check_variables(request.chat_template_kwargs or {})
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


def _check_biases(biases: dict) -> None:
    if len(biases) > MAX_BIASES:
        raise SettingError(
            f"logit_bias={_show(biases)} has {len(biases)} tokens: at most {MAX_BIASES} are allowed"
        )
    for token, bias in biases.items():
        if bias_token(token) is None:
            raise SettingError(
                f"logit_bias={_show(biases)} has the key {_show(token)}: give the id of a token"
            )
        number = isinstance(bias, Real) and not isinstance(bias, bool)
        if not (number and -MAX_BIAS <= bias <= MAX_BIAS):
            raise SettingError(
                f"logit_bias={_show(biases)} has the value {_show(bias)}: it must be a number "
                f"between {-MAX_BIAS} and {MAX_BIAS}"
            )


def bias_token(token: Any) -> int | None:
    """Return the token id that a key of `Request.logit_bias` stands for, or None if it is none.

    JSON has no keys but strings.
    """
    if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 10:
        return int(token)
    whole = isinstance(token, Integral) and not isinstance(token, bool)
    return int(token) if whole and token >= 0 else None


def _check_variables(variables: dict) -> None:
    for name in variables:
        if not isinstance(name, str) or name in TEMPLATE_VARIABLES:
            raise SettingError(
                f"chat_template_kwargs={_show(variables)} has {_show(name)}: that follows from "
                "other fields of the request, so leave it out"
            )
    if variables.get("enable_thinking") is not None:
        raise SettingError(
            f"chat_template_kwargs={_show(variables)} has an enable_thinking that is neither true "
            "nor false"
        )
    try:
        json.dumps(variables, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SettingError(
            f"chat_template_kwargs={_show(variables)} cannot be written as JSON: {_show(str(e))}"
        ) from e


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
    if kind == "json_object" and wanted.get("schema") is not None:
        key = "schema"
    known = {"type", "name", "description", "strict", key or "type"}
    known |= {"schema"} if kind == "json_object" else set()
    if unknown := sorted(str(name) for name in wanted.keys() - known):
        raise SettingError(
            f"response_format={_show(wanted)} has {_show(unknown[0])}, which the type {kind} does "
            "not have: leave it out"
        )
    if key is None:
        return
    types: tuple[type, ...] = (dict, bool) if key == "schema" else (str,)
    if not isinstance(wanted.get(key), types):
        what = "a JSON schema" if key == "schema" else "a string"
        raise SettingError(
            f"response_format={_show(wanted)} has no valid {key!r}: for the type {kind}, it must "
            f"be {what}"
        )
