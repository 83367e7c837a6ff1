"""Translates requests of Anthropic's Messages API into the fields of a chat completion."""

from __future__ import annotations

import json
import logging
from typing import Any

from .field_checks import (
    Check,
    check_fields,
    check_integer,
    check_list,
    check_object,
    ignored,
    of_type,
    one_of,
)
from .openai_errors import invalid_field, short_repr
from .request_fields import FIELDS as CHAT_FIELDS

log = logging.getLogger("flashmoe")

#: Fields that mean what they mean in chat completions; the last ones are flashmoe's own.
_SAME: tuple[str, ...] = (
    *("model", "max_tokens", "stream", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "experts", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "chat_template_kwargs",
)

FIELDS: dict[str, Check] = {
    **{name: CHAT_FIELDS[name] for name in _SAME},
    "messages": check_list,
    "system": of_type((str, list), "text or a list of text blocks"),
    "stop_sequences": check_list,
    "tools": check_list,
    "tool_choice": check_object,
    "thinking": check_object,
    "output_config": check_object,
    "output_format": check_object,
    "mcp_servers": one_of([], way_out="connect your client to them, which then sends their tools"),
    "container": one_of(way_out="leave it out: there are no containers here"),
    "thinking_budget": check_integer,
    # These are settings of Anthropic's own service, or hints: they do not affect the answer.
    **dict.fromkeys(
        ("metadata", "service_tier", "cache_control", "context_management", "betas", "speed")
        + ("inference_geo", "anthropic_version", "anthropic_beta"),
        ignored,
    ),
}
#: Names of fields of chat completions in the errors of this API.
RENAMED = {"stop": "stop_sequences", "response_format": "output_config", "think": "thinking"}
RENAMED |= {"reasoning_effort": "output_config", "parallel_tool_calls": "tool_choice"}

#: The first words of a text that Claude Code puts into each system prompt, different each time.
_BILLING = "x-anthropic-billing-header:"
_TEXT = ("text", "input_text")


def parsed(fields: dict, *, count: bool = False) -> dict:
    """Check the fields of a body, and return it.

    Args:
        count: its tokens are to be counted, so max_tokens may be missing.

    Raises:
        ApiError: 400, with the name of the field.
    """
    check_fields(fields, FIELDS, ("model", "messages", *(() if count else ("max_tokens",))))
    return fields


def chat_fields(fields: dict) -> dict:
    """Return the fields of a chat completion that asks for the same.

    Args:
        fields: the body, which `parsed` has accepted.

    Raises:
        ApiError: 400 for what cannot be translated.
    """
    chat = {name: fields[name] for name in _SAME if name in fields}
    system = _joined(fields.get("system"), "system")
    first = [{"role": "system", "content": system}] if system else []
    chat["messages"] = [*first, *_messages(fields["messages"])]
    chat["stop"] = fields.get("stop_sequences")
    tools = [_tool(tool) for tool in fields.get("tools") or ()]
    chat["tools"] = [tool for tool in tools if tool is not None]
    choice = fields.get("tool_choice") or {}
    chat["tool_choice"] = _tool_choice(choice)
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    thinking = fields.get("thinking") or {}
    if (kind := thinking.get("type")) is not None:
        if kind not in ("enabled", "disabled", "adaptive"):
            raise invalid_field(
                "thinking",
                f"thinking has the type {short_repr(kind)}: use enabled, disabled or adaptive",
            )
        # Adaptive leaves the choice to the model, as the template does.
        chat["think"] = None if kind == "adaptive" else kind == "enabled"
    budget = thinking.get("budget_tokens")
    chat["thinking_budget"] = fields.get("thinking_budget") if budget is None else budget
    output = fields.get("output_config") or {}
    if thinking.get("type") != "disabled":
        chat["reasoning_effort"] = output.get("effort")
    wanted = fields.get("output_format") or output.get("format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        wanted = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    chat["response_format"] = wanted
    return chat


def _invalid(where: str, why: str) -> Exception:
    return invalid_field(where.partition("[")[0], f"{where} {why}")


def _messages(messages: list) -> list[Any]:
    translated: list[Any] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _invalid(where, f"is {short_repr(message)}: it must be an object")
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str):
            translated.append({"role": role, "content": content})
        elif not isinstance(content, list):
            raise _invalid(where, f"has the content {short_repr(content)}: give text or blocks")
        elif role == "assistant":
            translated.append(_assistant(content, where))
        else:
            results = [b for b in content if _type(b) == "tool_result"]
            translated += [_result(block, where) for block in results]
            rest = [b for b in content if _type(b) != "tool_result"]
            if rest or not results:
                translated.append({"role": role, "content": _joined(rest, where)})
    return translated


def _type(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _assistant(blocks: list, where: str) -> dict:
    turn: dict[str, Any] = {"role": "assistant"}
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = _type(block)
        if kind in _TEXT:
            texts.append(_block_text(block, where))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            arguments = block.get("input")
            function = {"name": block.get("name"), "arguments": json.dumps(arguments or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            # Such as redacted_thinking, and the calls of tools that only Anthropic's service has.
            log.warning("%s: a block of type %s is left out", where, short_repr(kind))
    turn["content"] = "".join(texts)
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _result(block: dict, where: str) -> dict:
    content = _joined(block.get("content"), where)
    result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
    if block.get("is_error") and not content.startswith("Error"):
        result["content"] = f"Error: {content}"
    return result


def _joined(content: Any, where: str) -> str:
    """Return the text of a string or of blocks, each of which begins a line."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _invalid(where, f"is {short_repr(content)}: give text or a list of blocks")
    texts = [_block_text(block, where) for block in content]
    return "\n".join(t for t in texts if t and not t.startswith(_BILLING))


def _block_text(block: Any, where: str) -> str:
    kind = _type(block)
    if kind == "document" and isinstance(block.get("source"), dict):
        source = block["source"]
        text = source.get("data") if source.get("type") == "text" else None
    elif kind == "search_result":
        text = _joined(block.get("content"), where)
    elif kind == "tool_reference":
        text = str(block.get("tool_name"))
    else:
        text = block.get("text") if kind in _TEXT else None
    if not isinstance(text, str):
        raise _invalid(
            where, f"has a block of type {short_repr(kind)}: these models take text only"
        )
    return text


def _tool(tool: Any) -> dict | None:
    kind = tool.get("type") or "custom" if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise invalid_field("tools", f"{short_repr(tool)} is not a tool")
    if kind != "custom" or "input_schema" not in tool:
        if kind == "custom":
            raise invalid_field("tools", f"the tool {short_repr(tool)} has no input_schema")
        # A tool that runs at Anthropic, or whose form only its models know.
        log.warning("a tool of type %s is left out", short_repr(kind))
        return None
    function = {"name": tool.get("name"), "description": tool.get("description") or ""}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(choice: dict) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    words = {None: "auto", "auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str | None) or kind not in words:
        raise invalid_field(
            "tool_choice",
            f"tool_choice={short_repr(choice)} is not supported: its type must be auto, any, none "
            "or tool",
        )
    return words[kind]
