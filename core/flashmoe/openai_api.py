"""Bodies of OpenAI's chat completions as requests of the engine. Knows no server and no model.

What cannot be done is refused with the name of the field, and so is a field that is not known:
an answer that silently leaves out what was asked for is a wrong one. Fields that change nothing
about the answer are taken and ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from . import schemas
from .errors import FlashMoEError
from .messages import for_template
from .requests import RANGES, Request, check_request
from .tools import check_choice, read_tools

#: Objects and lists inside each other, at most.
MAX_DEPTH = 100


class ApiError(Exception):
    """What a client is told, as OpenAI's API tells it.

    Attributes:
        status: of HTTP.
        param: the field that is wrong. code: for programs, one of OpenAI's where it has one.
        headers: more of the answer's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict:
        """The JSON of the answer, and of the last event of a stream."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind.get(self.status, default)}
        return {"error": error | {"param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """The model that is served.

    Attributes:
        names: that clients may give it, the first one in answers.
        context: tokens of prompt and answer together.
        thinks: whether it can reason before its answer.
        created: when it was loaded, seconds since 1970.
    """

    names: tuple[str, ...]
    context: int
    thinks: bool
    created: int

    def check(self, name: str) -> None:
        """
        Raises:
            ApiError: it is not called so.
        """
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {_show(name)} is not served here: ask for {self.names[0]!r}",
                param="model",
                code="model_not_found",
            )

    def card(self) -> dict:
        """As the list of models has it."""
        return {
            "id": self.names[0],
            "object": "model",
            "created": self.created,
            "owned_by": "flashmoe",
            "aliases": list(self.names[1:]),
            "context_length": self.context,
        }


@dataclass(frozen=True)
class Call:
    """A chat completion that is asked for. include_usage: a stream ends with its usage."""

    request: Request
    stream: bool
    include_usage: bool


def read_call(body: bytes, served: Served) -> Call:
    """The request of a body. All that can be refused without the model is refused here.

    Raises:
        ApiError: 400, or 404 for another model.
    """
    found = _parse(body)
    for name, value in found.items():
        if name not in FIELDS:
            near = get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise _bad(name, f"{_show(name)} is not a field that is known here: {hint}")
        if value is not None:
            FIELDS[name](name, value)
    for name in ("model", "messages"):
        if found.get(name) is None:
            raise _bad(name, f"{name} is missing", code="missing_required_parameter")
    served.check(found["model"])
    tools = [_tool(tool) for tool in found.get("tools") or ()]
    request = Request(
        messages=[_message(m, i) for i, m in enumerate(found["messages"])],
        max_tokens=_max_tokens(found),
        stop=_stop(found.get("stop")),
        tools=tools,
        tool_choice=_choice(found.get("tool_choice")),
        parallel_tool_calls=found.get("parallel_tool_calls") is not False,
        response_format=_format(found.get("response_format")),
        think=_think(found, served),
        **{name: found.get(name) for name in _SAME},
    )
    _check(request)
    options = found.get("stream_options") or {}
    return Call(request, bool(found.get("stream")), bool(options.get("include_usage")))


def _parse(body: bytes) -> dict:
    try:
        found = schemas.loads(body.decode())
        deep = _deeper(found, MAX_DEPTH)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON: {_show(str(e))}", code="invalid_json") from e
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if deep:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
    return found


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _check(request: Request) -> None:
    """What the engine would refuse later, when the answers before this one are done."""
    from . import grammars  # late: 0.1 s

    param = None
    try:
        check_request(request)
        param = "messages"
        for_template(request.messages)
        param = "tools"
        tools = read_tools(request.tools)
        param = "tool_choice"
        check_choice(request.tool_choice, tools)
        param = "response_format"
        if request.response_format is not None:
            grammars.document(request.response_format)
    except FlashMoEError as e:
        raise refused(e, param) from e


def refused(error: FlashMoEError, param: str | None = None) -> ApiError:
    """The 400 for what the engine refuses. Its texts begin with the option that is wrong."""
    name = str(error).partition("=")[0]
    return _bad(name if name in FIELDS else param, str(error))


def _bad(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


# What each field may be: checks that raise.

_Check = Callable[[str, Any], None]


def _of(kinds: type | tuple[type, ...], words: str) -> _Check:
    def check(name: str, value: Any) -> None:
        kinds_ = kinds if isinstance(kinds, tuple) else (kinds,)
        # A bool is an int to Python.
        if not isinstance(value, kinds_) or (isinstance(value, bool) and bool not in kinds_):
            raise _bad(name, f"{name} is {_show(value)}: it must be {words}", code="invalid_type")

    return check


def _only(*values: Any, way_out: str) -> _Check:
    def check(name: str, value: Any) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise _bad(
                name, f"{name}={_show(value)} is not supported: {way_out}", code="unsupported_value"
            )

    return check


def _ignored(name: str, value: Any) -> None:
    pass


def _number(name: str, value: Any) -> None:
    _of((int, float), "a number")(name, value)
    if abs(value) > sys.float_info.max:
        raise _bad(name, f"{name} is {_show(value)}: that is out of range")


_flag = _of(bool, "true or false")
_integer = _of(int, "an integer")
_text = _of(str, "text")
_object = _of(dict, "an object")
_list = _of(list, "a list")

#: Of the request, under the same name in both.
_SAME = {name: _number for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
_SAME |= {name: _integer for name in ("seed", "top_k", "thinking_budget", "experts")}

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

FIELDS: dict[str, _Check] = {
    **_SAME,
    "model": _text,
    "messages": _list,
    "stream": _flag,
    "stream_options": _object,
    "max_tokens": _integer,
    "max_completion_tokens": _integer,
    "stop": _of((str, list), "text or a list of texts"),
    "tools": _list,
    "tool_choice": _of((str, dict), "auto, none, required, or an object that names a function"),
    "parallel_tool_calls": _flag,
    "response_format": _object,
    "reasoning_effort": _only(*_EFFORTS, way_out=f"give one of {', '.join(_EFFORTS)}"),
    "think": _flag,
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


# Fields as the request has them.


def _max_tokens(found: dict) -> int | None:
    new, old = found.get("max_completion_tokens"), found.get("max_tokens")
    if None not in (new, old) and new != old:
        raise _bad(
            "max_tokens",
            f"max_tokens={old} and max_completion_tokens={new} are the same option: give one",
        )
    most = old if new is None else new
    if most is not None and most < RANGES["max_tokens"][0]:
        name = "max_tokens" if new is None else "max_completion_tokens"
        raise _bad(name, f"{name}={most} is out of range: it must be 1 or more")
    return most


def _stop(stop: str | list | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    for text in stops:
        _text("stop", text)
    return tuple(stops)


def _think(found: dict, served: Served) -> bool | None:
    """Whether to reason first: by our own name, by that of the templates, or by an effort."""
    if found.get("think") is not None:
        return found["think"]
    template = found.get("chat_template_kwargs") or {}
    if unknown := sorted(set(template) - {"enable_thinking"}):
        raise _bad(
            "chat_template_kwargs", f"{_show(unknown[0])} is not known: give enable_thinking"
        )
    if template.get("enable_thinking") is not None:
        _flag("chat_template_kwargs", template["enable_thinking"])
        return template["enable_thinking"]
    effort = found.get("reasoning_effort")
    if effort is None:
        return None
    return False if effort in ("none", "minimal") else True if served.thinks else None


def _tool(tool: Any) -> dict:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise _bad(
            "tools",
            f'{_show(tool)} is no function: give {{"type": "function", "function": {{...}}}}',
        )
    # Not for the model: the grammar is strict in any case.
    return {k: v for k, v in function.items() if k != "strict"}


def _choice(choice: str | dict | None) -> str:
    words = ("auto", "none", "required")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice in words:
            return choice
    elif choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if isinstance(name, str) and name not in words:
            return name
    raise _bad(
        "tool_choice",
        f"tool_choice={_show(choice)} is not known: give auto, none, required or "
        '{"type": "function", "function": {"name": ...}}',
    )


def _format(wanted: dict | None) -> dict | None:
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") != "json_schema":
        return wanted  # json_object, and the engine's own: regex and lark
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise _bad(
            "response_format",
            'response_format has no schema: give {"type": "json_schema", "json_schema": {"name": '
            '..., "schema": {...}}}',
        )
    return {"type": "json_schema", "schema": inner["schema"]}


def _message(message: Any, index: int) -> Any:
    """Without what is not said: clients send back the whole of an answer."""
    if not isinstance(message, dict):
        return message
    for name, way_out in (("function_call", "give tool_calls"), ("audio", "give its text")):
        if message.get(name) is not None:
            raise _bad("messages", f"message {index} has {name}, which is not supported: {way_out}")
    kept = {k: v for k, v in message.items() if v is not None and k != "error"}
    if message.get("role") == "assistant":
        # Newer clients' name of the same.
        thought = kept.pop("reasoning", None)
        if isinstance(thought, str):
            kept.setdefault("reasoning_content", thought)
    return kept


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
