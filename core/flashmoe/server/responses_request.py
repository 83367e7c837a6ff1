"""Translates requests of OpenAI's Responses API into the fields of a chat completion."""

from __future__ import annotations

import base64
import binascii
import json
import logging
from typing import Any

from .field_checks import (
    Check,
    check_fields,
    check_flag,
    check_integer,
    check_list,
    check_object,
    check_text,
    ignored,
    of_type,
    one_of,
)
from .openai_errors import invalid_field, short_repr
from .request_fields import FIELDS as CHAT_FIELDS
from .responses_tools import ResponsesTools

log = logging.getLogger("flashmoe")

#: Fields that mean what they mean in chat completions.
_SAME: tuple[str, ...] = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "experts", "think"),
    *("thinking_budget", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("parallel_tool_calls", "chat_template_kwargs", "logit_bias", "stream", "stream_options"),
)

FIELDS: dict[str, Check] = {
    **{name: CHAT_FIELDS[name] for name in _SAME},
    "input": of_type((str, list), "text or a list of items"),
    "instructions": of_type((str, list), "text"),
    "max_output_tokens": check_integer,
    "tools": check_list,
    "tool_choice": CHAT_FIELDS["tool_choice"],
    "text": check_object,
    "reasoning": check_object,
    "include": check_list,
    "store": check_flag,
    "previous_response_id": check_text,
    "top_logprobs": one_of(0, way_out="leave it out"),
    "background": one_of(False, way_out="leave it out, and use stream for long answers"),
    "conversation": one_of(way_out="send the conversation as input"),
    "prompt": one_of(way_out="send the text of the prompt as input"),
    # These are settings of OpenAI's own service, or hints: they do not affect the answer.
    **dict.fromkeys(
        ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
        + ("prompt_cache_retention", "truncation", "max_tool_calls", "client_metadata")
        + ("context_management", "moderation"),
        ignored,
    ),
}
#: Names of fields of chat completions in the errors of this API.
RENAMED = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens"}
RENAMED |= {"max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning"}

#: Items of the input that are calls and results, and the field with the result's or call's text.
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")


def chat_fields(fields: dict, history: list[dict], tools: ResponsesTools) -> dict:
    """Return the fields of a chat completion that asks for the same.

    Args:
        fields: the body, which `check_fields` has accepted.
        history: messages of the conversation before the input.

    Raises:
        ApiError: 400 for what cannot be translated.
    """
    chat = {name: fields[name] for name in _SAME if name in fields}
    chat.pop("stream_options", None)  # include_obfuscation: there is none
    chat["max_tokens"] = fields.get("max_output_tokens")
    messages = input_messages(fields["input"], tools)
    instructions = fields.get("instructions")
    first = [{"role": "system", "content": _text(instructions)}] if instructions else []
    chat["messages"] = [*first, *history, *messages]
    if tools.definitions:
        chat["tools"] = tools.definitions
    chat["tool_choice"] = tools.choice
    chat["response_format"] = _response_format((fields.get("text") or {}).get("format"))
    chat["reasoning_effort"] = (fields.get("reasoning") or {}).get("effort")
    return chat


def parsed(fields: dict) -> dict:
    """Check the fields of a body, and return it.

    Raises:
        ApiError: 400, with the name of the field.
    """
    check_fields(fields, FIELDS, ("model", "input"))
    return fields


def input_messages(items: str | list, tools: ResponsesTools) -> list[dict]:
    """Return the messages of an input.

    What the assistant thought, said and called in one turn are several items, and one message.

    Raises:
        ApiError: an item cannot be part of a conversation here.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict] = []
    turn: dict[str, Any] | None = None

    def assistant() -> dict[str, Any]:
        nonlocal turn
        if turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        return turn

    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise _invalid(index, f"is {short_repr(item)}: it must be an object")
        kind = item.get("type", "message")
        role = item.get("role")
        if not isinstance(kind, str):
            raise _invalid(index, f"has the type {short_repr(kind)}: it must be text")
        if kind == "message" and role == "assistant":
            said = assistant()
            said["content"] = said.get("content", "") + _text(item.get("content"))
        elif kind == "message":
            turn = None
            messages.append({"role": role, "content": _content(item.get("content"), index)})
        elif kind == "reasoning":
            thought = assistant()
            text = thought.get("reasoning_content", "") + _thought(item)
            if text:
                thought["reasoning_content"] = text
        elif kind in _CALLS:
            call = tools.past_call(item, item.get(_CALLS[kind]))
            assistant().setdefault("tool_calls", []).append(call)
        elif kind in _RESULTS:
            turn = None
            content = _content(item.get("output"), index)
            result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            messages.append(result)
        elif kind == "item_reference":
            raise _invalid(index, "is a reference: items are not stored here, send the item itself")
        else:
            # Such as the calls of tools that only OpenAI's service has.
            log.warning("an input item of type %s is left out", short_repr(kind))
    return messages


def _invalid(index: int, why: str) -> Exception:
    return invalid_field("input", f"input[{index}] {why}")


def _text(content: Any) -> str:
    """Return the text of content blocks, as far as they are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    blocks = [block for block in content if isinstance(block, dict)]
    return "".join(str(block.get("text") or block.get("refusal") or "") for block in blocks)


def _content(content: Any, index: int) -> Any:
    """Return content in the form of chat completions. What is no text keeps its type there."""
    if not isinstance(content, list):
        return content
    blocks: list[Any] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("input_text", "output_text", "text", "summary_text"):
            blocks.append({"type": "text", "text": block.get("text")})
        elif kind in ("input_image", "input_file", "input_audio"):
            raise _invalid(index, f"has a block of type {kind!r}: these models take text only")
        else:
            blocks.append(block)
    return blocks


def _thought(item: dict) -> str:
    """Return the reasoning of an item: its text, or else what this server put into it."""
    for name in ("content", "summary"):
        if text := _text(item.get(name)):
            return text
    return decrypted(item.get("encrypted_content"))


def encrypted(text: str) -> str:
    """Return a text in the form of `encrypted_content`, in which stateless clients send it back.

    It is not encrypted: it comes from the client's own conversation.
    """
    return base64.b64encode(json.dumps({"flashmoe": text}).encode()).decode()


def decrypted(content: Any) -> str:
    """Return the text of an `encrypted_content`; "" if another service wrote it."""
    try:
        text = json.loads(base64.b64decode(content, validate=True))["flashmoe"]
    except (binascii.Error, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return text if isinstance(text, str) else ""


def _response_format(wanted: Any) -> Any:
    """Return `text.format` as a `response_format`: there the schema is one level deeper."""
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": {k: wanted[k] for k in wanted if k != "type"}}
