"""Bodies of OpenAI's chat completions as requests of the engine. Knows no server and no model.

What cannot be done is refused with the name of the field, and so is a field that is not known:
an answer that silently leaves out what was asked for is a wrong one. Fields that change nothing
about the answer are taken and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..chat import json_schema as schemas
from ..chat.messages import for_template
from ..chat.tools import check_choice, read_tools
from ..errors import FlashMoEError
from ..requests import RANGES, Request, check_request
from .openai_errors import ApiError, bad, shown
from .openai_fields import FIELDS, SAME, check_flag, check_text

#: Objects and lists inside each other, at most.
MAX_DEPTH = 100


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
                f"the model {shown(name)} is not served here: ask for {self.names[0]!r}",
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
            raise bad(name, f"{shown(name)} is not a field that is known here: {hint}")
        if value is not None:
            FIELDS[name](name, value)
    for name in ("model", "messages"):
        if found.get(name) is None:
            raise bad(name, f"{name} is missing", code="missing_required_parameter")
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
        **{name: found.get(name) for name in SAME},
    )
    _check(request)
    options = found.get("stream_options") or {}
    return Call(request, bool(found.get("stream")), bool(options.get("include_usage")))


def _parse(body: bytes) -> dict:
    try:
        found = schemas.loads(body.decode())
        deep = _deeper(found, MAX_DEPTH)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON: {shown(str(e))}", code="invalid_json") from e
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
    from ..grammar import response as grammars  # late: 0.1 s

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
    return bad(name if name in FIELDS else param, str(error))


def _max_tokens(found: dict) -> int | None:
    new, old = found.get("max_completion_tokens"), found.get("max_tokens")
    if None not in (new, old) and new != old:
        raise bad(
            "max_tokens",
            f"max_tokens={old} and max_completion_tokens={new} are the same option: give one",
        )
    most = old if new is None else new
    if most is not None and most < RANGES["max_tokens"][0]:
        name = "max_tokens" if new is None else "max_completion_tokens"
        raise bad(name, f"{name}={most} is out of range: it must be 1 or more")
    return most


def _stop(stop: str | list | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    for text in stops:
        check_text("stop", text)
    return tuple(stops)


def _think(found: dict, served: Served) -> bool | None:
    """Whether to reason first: by our own name, by that of the templates, or by an effort."""
    if found.get("think") is not None:
        return found["think"]
    template = found.get("chat_template_kwargs") or {}
    if unknown := sorted(set(template) - {"enable_thinking"}):
        raise bad("chat_template_kwargs", f"{shown(unknown[0])} is not known: give enable_thinking")
    if template.get("enable_thinking") is not None:
        check_flag("chat_template_kwargs", template["enable_thinking"])
        return template["enable_thinking"]
    effort = found.get("reasoning_effort")
    if effort is None:
        return None
    return False if effort in ("none", "minimal") else True if served.thinks else None


def _tool(tool: Any) -> dict:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise bad(
            "tools",
            f'{shown(tool)} is no function: give {{"type": "function", "function": {{...}}}}',
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
    raise bad(
        "tool_choice",
        f"tool_choice={shown(choice)} is not known: give auto, none, required or "
        '{"type": "function", "function": {"name": ...}}',
    )


def _format(wanted: dict | None) -> dict | None:
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") != "json_schema":
        return wanted  # json_object, and the engine's own: regex and lark
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise bad(
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
            raise bad("messages", f"message {index} has {name}, which is not supported: {way_out}")
    kept = {k: v for k, v in message.items() if v is not None and k != "error"}
    if message.get("role") == "assistant":
        # Newer clients' name of the same.
        thought = kept.pop("reasoning", None)
        if isinstance(thought, str):
            kept.setdefault("reasoning_content", thought)
    return kept
