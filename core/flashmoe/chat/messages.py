"""A conversation as callers hold it, made into what chat templates take.

A message is a dict with "role" and "content" (a string, or a list of {"type": "text", "text":
...} blocks), as in OpenAI's API:

    system      several are merged into the first place, where templates want the only one
    user
    assistant   may have "reasoning_content" and "tool_calls": [{"id": ..., "function": {"name":
                ..., "arguments": dict or JSON text}}]; the function's fields may be in the call
    tool        the result of a call: "tool_call_id", and "error": True when the tool failed

Knows no tokenizer and no template.
"""

from __future__ import annotations

from ..errors import SettingError
from . import json_schema as schemas

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "tool": "tool"}


def for_template(messages: list[dict]) -> list[dict]:
    """Messages as a chat template takes them: one system message at most, first; arguments of
    calls as dicts; results in the order of their calls.

    Raises:
        SettingError: there is nothing to answer, or a message is not of a known form.
    """
    system: list[str] = []
    found: list[dict] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise SettingError(
                f"message {index} is {_show(message)}: it needs a role of {', '.join(ROLES)}"
            )
        content = _text(message.get("content"), index)
        if role == "system":
            system.append(content)
        elif role == "assistant":
            found.append(_assistant(message, content, index))
        elif role == "tool":
            failed = message.get("error") and not content.startswith("Error")
            content = f"Error: {content}" if failed else content
            _check_id(message.get("tool_call_id"), index)
            kept = {k: message[k] for k in ("tool_call_id", "name") if k in message}
            found.append({"role": role, "content": content, **kept})
        else:
            found.append({"role": role, "content": content})
    _check_end(found)
    system = [text for text in system if text]
    first = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return first + _results_in_order(found)


def _text(content, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SettingError(f"message {index} has content {_show(content)}: it must be text")
    texts = []
    for block in content:
        text = block if isinstance(block, str) else None
        if isinstance(block, dict) and block.get("type", "text") == "text":
            text = block.get("text")
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise SettingError(
                f"message {index} holds a block of type {_show(kind)}: these models take text only"
            )
        texts.append(text)
    return "".join(texts)


def _assistant(message: dict, content: str, index: int) -> dict:
    turn = {"role": "assistant", "content": content}
    if reasoning := message.get("reasoning_content"):
        turn["reasoning_content"] = _text(reasoning, index)
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise SettingError(f"message {index} has tool_calls {_show(calls)}: give a list")
        turn["tool_calls"] = [_call(call, index) for call in calls]
    return turn


def _call(call: dict, index: int) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SettingError(f"message {index} has a tool call without a name: {_show(call)}")
    _check_id(call.get("id"), index)
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = schemas.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise SettingError(
                f"message {index} calls {function['name']} with arguments that are not JSON: "
                f"{_show(arguments)} ({e})"
            ) from e
    if not isinstance(arguments, dict):
        raise SettingError(
            f"message {index} calls {function['name']} with arguments {_show(arguments)}: they "
            "must be an object"
        )
    # A name in both places, for templates that look in either.
    inner = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": inner, **inner}


def _check_id(value, index: int) -> None:
    if value is not None and not isinstance(value, str):
        raise SettingError(f"message {index} has {_show(value)} for the id of a call: give text")


def _results_in_order(messages: list[dict]) -> list[dict]:
    """Templates leave out the ids, so a result is known by its place: the place of its call."""
    ordered: list[dict] = []
    place: dict = {}
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
        raise SettingError("the prompt is empty: give the model something to answer")
    if last["role"] == "assistant":
        raise SettingError(
            "the last message is the assistant's own: end with a message of the user, or with the "
            "result of a tool"
        )


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
