"""Convert the messages of a conversation into the form that chat templates take.

A message is a dict with "role" and "content" (a string, or a list of {"type": "text", "text":
...} blocks), as in OpenAI's API:

    system      all system messages are merged into one at the start, where templates want it
    user
    assistant   may have "reasoning_content" and "tool_calls": [{"id": ..., "function": {"name":
                ..., "arguments": dict or JSON text}}]; the call may also have the function's
                fields itself
    tool        the result of a call: "tool_call_id", and "error": True if the tool failed

Knows nothing of tokenizers or templates.
"""

from __future__ import annotations

from typing import Any

from ..errors import SettingError
from . import json_schema as schemas

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "tool": "tool"}


def normalize_messages(messages: list[dict]) -> list[dict]:
    """Return the messages in the form that chat templates take.

    There is at most one system message, and it comes first; the arguments of calls are dicts; the
    results of tools stand in the order of their calls.

    Raises:
        SettingError: there is nothing to answer, or a message is not of a known form.
    """
    system: list[str] = []
    normalized: list[dict] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise SettingError(
                f"message {index} is {_show(message)}: a message needs a role, one of "
                f"{', '.join(ROLES)}"
            )
        content = _text(message.get("content"), index)
        if role == "system":
            system.append(content)
        elif role == "assistant":
            normalized.append(_assistant(message, content, index))
        elif role == "tool":
            failed = message.get("error") and not content.startswith("Error")
            content = f"Error: {content}" if failed else content
            _check_id(message.get("tool_call_id"), index)
            kept = {k: message[k] for k in ("tool_call_id", "name") if k in message}
            normalized.append({"role": role, "content": content, **kept})
        else:
            normalized.append({"role": role, "content": content})
    _check_end(normalized)
    merged = "\n\n".join(text for text in system if text)
    first = [{"role": "system", "content": merged}] if merged else []
    return first + _results_in_order(normalized)


def _text(content: Any, index: int, name: str = "content") -> str:
    """Return the text of a message's field, of which all blocks must be text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SettingError(
            f"message {index} has the {name} {_show(content)}: give a string or a "
            "list of text blocks"
        )
    texts = []
    for block in content:
        text = block if isinstance(block, str) else None
        if isinstance(block, dict) and block.get("type", "text") == "text":
            text = block.get("text")
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            where = "" if name == "content" else f" in its {name}"
            raise SettingError(
                f"message {index} has a block of type {_show(kind)}{where}: these models take "
                "text only"
            )
        texts.append(text)
    return "".join(texts)


def _assistant(message: dict, content: str, index: int) -> dict:
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning := message.get("reasoning_content"):
        turn["reasoning_content"] = _text(reasoning, index, "reasoning_content")
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise SettingError(f"message {index} has the tool_calls {_show(calls)}: give a list")
        turn["tool_calls"] = [_call(call, index) for call in calls]
    return turn


def _call(call: Any, index: int) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SettingError(
            f"message {index} has a tool call without the name of a function: {_show(call)}"
        )
    _check_id(call.get("id"), index)
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = schemas.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise SettingError(
                f"message {index} calls {function['name']} with the arguments {_show(arguments)}, "
                f"which are not JSON: {e}"
            ) from e
    if not isinstance(arguments, dict):
        raise SettingError(
            f"message {index} calls {function['name']} with the arguments {_show(arguments)}: they "
            "must be an object"
        )
    # Templates read the fields of the function from either place, so they are in both.
    inner = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": inner, **inner}


def _check_id(value: Any, index: int) -> None:
    if value is not None and not isinstance(value, str):
        raise SettingError(
            f"message {index} has the id {_show(value)} for a tool call: give a string"
        )


def _results_in_order(messages: list[dict]) -> list[dict]:
    """Return the messages with the results of tools in the order of their calls.

    Templates leave out the ids of calls, so a model can match a result to its call only by place.
    """
    ordered: list[dict] = []
    place: dict[str | None, int] = {}
    for message in messages:
        if message["role"] != "tool":
            place = {c["id"]: i for i, c in enumerate(message.get("tool_calls", []))}
        elif place:
            at = len(ordered)
            mine = place.get(message.get("tool_call_id"), len(place))
            while at and ordered[at - 1]["role"] == "tool":
                if place.get(ordered[at - 1].get("tool_call_id"), len(place)) <= mine:
                    break
                at -= 1
            ordered.insert(at, message)
            continue
        ordered.append(message)
    return ordered


def _check_end(messages: list[dict]) -> None:
    last = messages[-1] if messages else None
    if last is None or (last["role"] == "user" and not last["content"].strip()):
        raise SettingError("the prompt is empty: end with a message that the model can answer")
    if last["role"] == "assistant":
        raise SettingError(
            "the last message is the assistant's own: end with a message of the user or the result "
            "of a tool"
        )


def _show(value: Any) -> str:
    """Return the repr of a value for an error text, of at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
