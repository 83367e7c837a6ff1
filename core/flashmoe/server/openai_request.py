"""Turns requests of OpenAI's chat completions API into requests of the engine.

A field with an unsupported value is refused by its name, and so is an unknown field: an answer that
silently ignores what was asked for is a wrong answer. Fields that do not affect the answer are
accepted and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..chat.messages import normalize_messages
from ..chat.tools import check_tool_choice
from ..errors import FlashMoEError
from ..grammar.rules import check_response_format, checked_tools
from ..requests import RANGES, Request, check_request, in_range
from .field_checks import check_flag, check_text
from .json_body import parse_object
from .openai_errors import ApiError, invalid_field, short_repr
from .request_fields import FIELDS
from .served_model import ServedModel, ServedModels

#: The largest `n`.
MAX_ANSWERS = 16


@dataclass(frozen=True)
class ChatCompletionCall:
    """A validated request for a chat completion.

    Attributes:
        model: the model that is asked.
        request: what the engine is asked for.
        stream: whether the answer is sent in chunks.
        include_usage: whether a stream ends with its token counts.
        n: the number of answers.
    """

    model: ServedModel
    request: Request
    stream: bool
    include_usage: bool
    n: int = 1

    @property
    def requests(self) -> tuple[Request, ...]:
        """What the engine is asked for, once for each answer; those of a seed are unlike, too."""
        seed = self.request.seed
        if seed is None:
            return (self.request,) * self.n
        return tuple(replace(self.request, seed=(seed + i) % 2**64) for i in range(self.n))


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
    fields = {name: value for name, value in fields.items() if not _means_default(name, value)}
    model = models.find(fields["model"])
    _check_count(fields["messages"], model)
    tools = [_tool(tool) for tool in fields.get("tools") or ()]
    request = Request(
        messages=[_message(m, i) for i, m in enumerate(fields["messages"])],
        max_tokens=_max_tokens(fields, model),
        temperature=fields.get("temperature"),
        top_p=fields.get("top_p"),
        top_k=fields.get("top_k"),
        min_p=fields.get("min_p"),
        repetition_penalty=fields.get("repetition_penalty"),
        presence_penalty=fields.get("presence_penalty"),
        frequency_penalty=fields.get("frequency_penalty"),
        logit_bias=fields.get("logit_bias"),
        logprobs=_logprobs(fields),
        seed=fields.get("seed"),
        stop=_stop(fields.get("stop")),
        experts=model.experts if fields.get("experts") is None else fields["experts"],
        tools=tools,
        tool_choice=_tool_choice(fields.get("tool_choice")),
        parallel_tool_calls=fields.get("parallel_tool_calls") is not False,
        response_format=_response_format(fields.get("response_format")),
        think=_think(fields, model),
        thinking_budget=fields.get("thinking_budget"),
        chat_template_kwargs=_template_variables(fields),
        continue_last=_continue_last(fields),
    )
    _check_request(request)
    options = fields.get("stream_options") or {}
    stream, include_usage = bool(fields.get("stream")), bool(options.get("include_usage"))
    return ChatCompletionCall(model, request, stream, include_usage, _count(fields))


def _means_default(name: str, value: Any) -> bool:
    """Return whether a value is how other servers write that an option has no value."""
    words = ("max_tokens", "max_completion_tokens", "seed", "top_k")
    return name in words and value == -1 and not isinstance(value, bool)


def _count(fields: dict) -> int:
    count = 1 if fields.get("n") is None else fields["n"]
    if not 1 <= count <= MAX_ANSWERS:
        raise invalid_field(
            "n", f"n={short_repr(count)} is out of range: it must be between 1 and {MAX_ANSWERS}"
        )
    return count


def _logprobs(fields: dict) -> int | None:
    """Return how many of the likeliest tokens are reported with each; None: no probabilities."""
    top = fields.get("top_logprobs") or 0
    if not in_range("logprobs", top):
        _, low, high = RANGES["logprobs"]
        raise invalid_field(
            "top_logprobs",
            f"top_logprobs={short_repr(top)} is out of range: it must be between {low} and {high}",
        )
    if top and not fields.get("logprobs"):
        raise invalid_field("top_logprobs", f"top_logprobs={top} needs logprobs: pass true there")
    return top if fields.get("logprobs") else None


def _template_variables(fields: dict) -> dict:
    variables = dict(fields.get("chat_template_kwargs") or {})
    variables.pop("enable_thinking", None)
    if fields.get("preserve_thinking") is not None:
        variables.setdefault("preserve_thinking", fields["preserve_thinking"])
    for name in ("add_generation_prompt", "continue_final_message"):
        if isinstance(variables.get(name), bool):
            del variables[name]
    return variables


def _continue_last(fields: dict) -> bool:
    """Return whether the last message is continued if it is the assistant's own."""
    variables = fields.get("chat_template_kwargs") or {}
    continues = fields.get("continue_final_message", variables.get("continue_final_message"))
    if continues is not None:
        return continues is True
    return fields.get("add_generation_prompt", variables.get("add_generation_prompt")) is not True


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
    return invalid_field(name if name.isidentifier() else param, str(error))


def _max_tokens(fields: dict, model: ServedModel) -> int:
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
    if limit is None:
        # The engine takes what is left of the context from it.
        limit = model.max_tokens or model.context
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
    if fields.get("enable_thinking") is not None:
        return fields["enable_thinking"]
    template = fields.get("chat_template_kwargs") or {}
    if template.get("enable_thinking") is not None:
        check_flag("chat_template_kwargs", template["enable_thinking"])
        return template["enable_thinking"]
    effort = fields.get("reasoning_effort")
    reasoning = fields.get("reasoning") or {}
    if effort is None and isinstance(reasoning.get("enabled"), bool):
        return reasoning["enabled"] if model.thinks else None
    if effort is None and reasoning.get("effort") is not None:
        effort = reasoning["effort"]
        FIELDS["reasoning_effort"]("reasoning", effort)
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
    inner = wanted.get("json_schema", wanted)
    if unknown := set(wanted) - {"type", "json_schema"} if inner is not wanted else None:
        raise invalid_field(
            "response_format",
            f"response_format has {short_repr(sorted(unknown)[0])} beside its json_schema: leave "
            "it out",
        )
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise invalid_field(
            "response_format",
            'response_format has no schema: write it as {"type": "json_schema", "json_schema": '
            '{"name": ..., "schema": {...}}}',
        )
    # The name and the description are not for the model; the grammar is strict in any case.
    left_out = ("type", "name", "description", "strict")
    kept = {k: v for k, v in inner.items() if k not in left_out and v is not None}
    return {"type": "json_schema", **kept}


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
