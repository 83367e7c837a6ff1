"""Turns requests of OpenAI's chat completions API into requests of the engine.

A field with an unsupported value is refused by its name, and so is an unknown field: an answer that
silently ignores what was asked for is a wrong answer. Fields that do not affect the answer are
accepted and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..chat.messages import normalize_messages
from ..chat.tools import check_tool_choice
from ..errors import FlashMoEError
from ..grammar.rules import check_response_format, checked_tools
from ..requests import Request, check_request, in_range
from .field_checks import check_flag, check_text
from .json_body import parse_object
from .openai_errors import ApiError, invalid_field, short_repr
from .request_fields import FIELDS
from .served_model import ServedModel, ServedModels


@dataclass(frozen=True)
class ChatCompletionCall:
    """A validated request for a chat completion.

    Attributes:
        model: the model that is asked.
        request: what the engine is asked for.
        stream: whether the answer is sent in chunks.
        include_usage: whether a stream ends with its token counts.
    """

    model: ServedModel
    request: Request
    stream: bool
    include_usage: bool


def read_call(body: bytes, models: ServedModels) -> ChatCompletionCall:
    """Parse and validate the body of a request.

    Raises:
        ApiError: see `checked_call`; or the body is not a JSON object within the limits.
    """
    return checked_call(parse_object(body), models)


def checked_call(fields: dict, models: ServedModels) -> ChatCompletionCall:
    """Validate the fields of a request, which other APIs translate theirs into.

    Everything that can be refused without running the model is refused here.

    Raises:
        ApiError: 400, or 404 for a model that is not served.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            # The comparison takes long for a long name.
            near = get_close_matches(name[:40], FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise invalid_field(name[:120], f"{short_repr(name)} is not a known field: {hint}")
        if value is not None:
            FIELDS[name](name, value)
    for name in ("model", "messages"):
        if fields.get(name) is None:
            raise invalid_field(name, f"{name} is missing", "missing_required_parameter")
    model = models.find(fields["model"])
    _check_count(fields["messages"], model)
    tools = [_tool(tool) for tool in fields.get("tools") or ()]
    request = Request(
        messages=[_message(m, i) for i, m in enumerate(fields["messages"])],
        max_tokens=_max_tokens(fields),
        temperature=fields.get("temperature"),
        top_p=fields.get("top_p"),
        top_k=fields.get("top_k"),
        min_p=fields.get("min_p"),
        repetition_penalty=fields.get("repetition_penalty"),
        seed=fields.get("seed"),
        stop=_stop(fields.get("stop")),
        experts=model.experts if fields.get("experts") is None else fields["experts"],
        tools=tools,
        tool_choice=_tool_choice(fields.get("tool_choice")),
        parallel_tool_calls=fields.get("parallel_tool_calls") is not False,
        response_format=_response_format(fields.get("response_format")),
        think=_think(fields, model),
        thinking_budget=fields.get("thinking_budget"),
    )
    _check_request(request)
    options = fields.get("stream_options") or {}
    return ChatCompletionCall(
        model, request, bool(fields.get("stream")), bool(options.get("include_usage"))
    )


def _check_count(messages: list, model: ServedModel) -> None:
    """Refuse more messages than the context has tokens, before each of them is looked at."""
    if len(messages) > model.context:
        raise invalid_field(
            "messages",
            f"{len(messages)} messages are longer than the context of {model.context} tokens: "
            "shorten the conversation",
            "context_length_exceeded",
        )


def _check_request(request: Request) -> None:
    """Refuse now what the engine would refuse only after the answers before this one."""
    param = None
    try:
        check_request(request)
        param = "messages"
        normalize_messages(request.messages)
        param = "tools"
        tools = checked_tools(request.tools)
        param = "tool_choice"
        check_tool_choice(request.tool_choice, tools)
        param = "response_format"
        if request.response_format is not None:
            check_response_format(request.response_format)
    except FlashMoEError as e:
        raise refused_request(e, param) from e


def refused_request(error: FlashMoEError, param: str | None = None) -> ApiError:
    """Return the 400 error for a request that the engine refuses.

    Args:
        param: field to name if the error's text does not begin with one, as in "top_p=3 is out".
    """
    name = str(error).partition("=")[0]
    return invalid_field(name if name in FIELDS else param, str(error))


def _max_tokens(fields: dict) -> int | None:
    new, old = fields.get("max_completion_tokens"), fields.get("max_tokens")
    if None not in (new, old) and new != old:
        raise invalid_field(
            "max_tokens",
            f"max_tokens={short_repr(old)} and max_completion_tokens={short_repr(new)} are the "
            "same option: pass only one",
        )
    limit = old if new is None else new
    if limit is not None and not in_range("max_tokens", limit):
        name = "max_tokens" if new is None else "max_completion_tokens"
        text = f"{name}={short_repr(limit)} is out of range: it must be an integer of 1 or more"
        raise invalid_field(name, text)
    return limit


def _stop(stop: str | list | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    for text in stops:
        check_text("stop", text)
    return tuple(stops)


def _think(fields: dict, model: ServedModel) -> bool | None:
    """Return whether to reason first, from flashmoe's field, the templates' or the effort."""
    if fields.get("think") is not None:
        return fields["think"]
    template = fields.get("chat_template_kwargs") or {}
    if unknown := sorted(set(template) - {"enable_thinking"}):
        raise invalid_field(
            "chat_template_kwargs",
            f"{short_repr(unknown[0])} is not supported: only enable_thinking is",
        )
    if template.get("enable_thinking") is not None:
        check_flag("chat_template_kwargs", template["enable_thinking"])
        return template["enable_thinking"]
    effort = fields.get("reasoning_effort")
    if effort is None:
        return None
    return False if effort in ("none", "minimal") else True if model.thinks else None


def _tool(tool: Any) -> dict:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise invalid_field(
            "tools",
            f"{short_repr(tool)} is not a function tool: write it as "
            '{"type": "function", "function": {...}}',
        )
    # "strict" is not for the model: the grammar is strict in any case.
    return {k: v for k, v in function.items() if k != "strict"}


def _tool_choice(choice: str | dict | None) -> str:
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
    raise invalid_field(
        "tool_choice",
        f"tool_choice={short_repr(choice)} is not supported: use auto, none, required or "
        '{"type": "function", "function": {"name": ...}}',
    )


def _response_format(wanted: dict | None) -> dict | None:
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") != "json_schema":
        return wanted  # json_object, or flashmoe's own types: regex and lark
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise invalid_field(
            "response_format",
            'response_format has no schema: write it as {"type": "json_schema", "json_schema": '
            '{"name": ..., "schema": {...}}}',
        )
    return {"type": "json_schema", "schema": inner["schema"]}


def _message(message: Any, index: int) -> Any:
    """Return a message without its null fields: clients send back whole answers with them."""
    if not isinstance(message, dict):
        return message
    for name, way_out in (("function_call", "use tool_calls"), ("audio", "send its text")):
        if message.get(name) is not None:
            raise invalid_field(
                "messages", f"message {index} has {name}, which is not supported: {way_out}"
            )
    kept = {k: v for k, v in message.items() if v is not None and k != "error"}
    if message.get("role") == "assistant":
        # Newer clients call reasoning_content so.
        reasoning = kept.pop("reasoning", None)
        if isinstance(reasoning, str):
            kept.setdefault("reasoning_content", reasoning)
    return kept
