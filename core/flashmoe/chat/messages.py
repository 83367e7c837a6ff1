"""Convert the messages of a conversation into the form that chat templates take.

A message is a dict with "role" and "content" (a string, or a list of {"type": "text", "text":
...} blocks), as in OpenAI's API:

    system      those at the start are merged into one; a later one stays where it stands
    user
    assistant   may have "reasoning_content" and "tool_calls": [{"id": ..., "function": {"name":
                ..., "arguments": dict or JSON text}}]; the call may also have the function's
                fields itself
    tool        the result of a call: "tool_call_id", and "error": True if the tool failed

History is taken as it comes: whatever an answer consisted of can be sent back. A call whose
arguments are no JSON object (it was cut short), or that has an "error", becomes text, since
templates write only whole calls. A thought in the content, between <think> and </think>, is one.

Knows nothing of tokenizers or templates.
"""

from __future__ import annotations

from typing import Any

from ..errors import SettingError
from . import json_schema as schemas

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "tool": "tool"}

#: The markers around a thought with which clients put it into the content, whatever the model.
THINK = ("<think>", "</think>")
#: The types of text blocks, of OpenAI's two APIs.
_TEXTS = {"text", "input_text", "output_text"}
#: The types of an assistant's other blocks, with the key of their text.
_THOUGHTS = {"thinking": "thinking", "reasoning": "reasoning"}


def normalize_messages(
    messages: list[dict], markers: tuple[str, str] = THINK
) -> list[dict[str, Any]]:
    """Return the messages in the form that chat templates take.

    The system messages at the start are one; the arguments of calls are dicts; the results of tools
    stand in the order of their calls; there is a message of the user.

    Args:
        markers: what the model writes around its thoughts.

    Raises:
        SettingError: there is nothing to answer, or a message is not of a known form.
    """
    first: list[str] = []
    normalized: list[dict[str, Any]] = []
    not_made: set[str | None] = set()
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise SettingError(
                f"message {index} is {_show(message)}: a message needs a role, one of "
                f"{', '.join(ROLES)}"
            )
        content, thought = _text(message.get("content"), index, role)
        if role == "system":
            if not normalized:
                first.append(content)
            elif content:
                normalized.append({"role": role, "content": content})
        elif role == "assistant":
            turn, broken = _assistant(message, content, thought, index, markers)
            normalized.append(turn)
            not_made = broken
        elif role == "tool":
            _check_id(message.get("tool_call_id"), index)
            normalized.append(_result(message, content, not_made))
        else:
            normalized.append({"role": role, "content": content})
    start = "\n\n".join(text for text in first if text)
    return _with_question(start, _results_in_order(normalized))


def fold_system_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each later system message as text of the user, where it stands.

    For templates that have system messages only at the start. Moving the message there instead
    would change the start of the prompt, so that the model would have to read all of it again. The
    text joins a message of the user beside it, or is one of its own.
    """
    folded: list[dict[str, Any]] = []
    text: str | None = None  # waits for the message that follows
    for index, message in enumerate(messages):
        content = message["content"]
        if index and message["role"] == "system":
            if folded and folded[-1]["role"] == "user" and text is None:
                folded[-1] = {**folded[-1], "content": _joined(folded[-1]["content"], content)}
            else:
                text = _joined(text, content)
            continue
        if text is not None and message["role"] == "user":
            message = {**message, "content": _joined(text, content)}
        elif text is not None:
            folded.append({"role": "user", "content": text})
        text = None
        folded.append(message)
    return folded if text is None else [*folded, {"role": "user", "content": text}]


def _joined(*texts: str | None) -> str:
    return "\n\n".join(text for text in texts if text)


def _text(content: Any, index: int, role: str, name: str = "content") -> tuple[str, str]:
    """Return the text of a message's field, and the thoughts among its blocks."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise SettingError(
            f"message {index} has the {name} {_show(content)}: give a string or a "
            "list of text blocks"
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for block in content:
        kind = block.get("type", "text") if isinstance(block, dict) else None
        text, into = block if isinstance(block, str) else None, texts
        if isinstance(kind, str) and kind in _TEXTS:
            text = block.get("text")
        elif role == "assistant" and kind == "refusal":
            text = block.get("refusal")
        elif role == "assistant" and isinstance(kind, str) and kind in _THOUGHTS:
            text, into = block.get(_THOUGHTS[kind]), thoughts
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            where = "" if name == "content" else f" in its {name}"
            raise SettingError(
                f"message {index} has a block of type {_show(kind)}{where}: these models take "
                "text only"
            )
        into.append(text)
    return "".join(texts), "".join(thoughts)


def _assistant(
    message: dict, content: str, thought: str, index: int, markers: tuple[str, str]
) -> tuple[dict[str, Any], set[str | None]]:
    """Return a turn of the assistant, and the ids of its calls that were not made."""
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning := message.get("reasoning_content"):
        thought = "".join(_text(reasoning, index, "assistant", "reasoning_content"))
    inside, turn["content"] = _split_thought(content, {THINK, markers})
    if thought := thought or inside:
        turn["reasoning_content"] = thought
    broken: set[str | None] = set()
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise SettingError(f"message {index} has the tool_calls {_show(calls)}: give a list")
        made = []
        for call in calls:
            parsed, text = _call(call, index)
            if parsed is not None:
                made.append(parsed)
            else:
                broken.add(call.get("id"))
                turn["content"] = _joined(turn["content"], text)
        turn |= {"tool_calls": made} if made else {}
    return turn, broken


def _split_thought(content: str, markers: set[tuple[str, str]]) -> tuple[str, str]:
    """Return the thoughts at the start of a content, and the rest of it.

    A thought that is not closed goes on to the end. Only the start is looked at: elsewhere a marker
    is something that the assistant wrote about.
    """
    thoughts: list[str] = []
    while True:
        text = content.lstrip()
        pair = next((pair for pair in markers if text.startswith(pair[0])), None)
        if pair is None:
            return "\n\n".join(t for t in thoughts if t), content
        thought, _, rest = text[len(pair[0]) :].partition(pair[1])
        thoughts.append(thought.strip("\n"))
        content = rest.lstrip("\n")


def _call(call: Any, index: int) -> tuple[dict | None, str]:
    """Return a call as templates take it, or None and the text that stands for it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    error = call.get("error") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not (isinstance(name, str) or (error and name is None)):
        raise SettingError(
            f"message {index} has a tool call without the name of a function: {_show(call)}"
        )
    _check_id(call.get("id"), index)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = schemas.loads(arguments, lone_surrogates=True)
        except (ValueError, RecursionError):
            error = True
    if error or not isinstance(arguments, dict):
        # As text, so that the model sees what it wrote: templates fail on it, or write a call.
        written = function.get("arguments")
        written = written if isinstance(written, str) else repr(written or {})
        return None, f"[This call{f' of {name}' if name else ''} was not made: {written}]"
    # Templates read the fields of the function from either place, so they are in both.
    inner = {"name": name, "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": inner, **inner}, ""


def _result(message: dict, content: str, not_made: set[str | None]) -> dict[str, Any]:
    call = message.get("tool_call_id")
    failed = message.get("error") or (call is not None and call in not_made)
    if failed and not content.startswith("Error"):
        content = f"Error: {content}"
    if call is not None and call in not_made:
        content = _joined(content, "The call was not made: its arguments are not complete JSON.")
    kept = {k: message[k] for k in ("tool_call_id", "name") if k in message}
    return {"role": "tool", "content": content, **kept}


def _check_id(value: Any, index: int) -> None:
    if value is not None and not isinstance(value, str):
        raise SettingError(
            f"message {index} has the id {_show(value)} for a tool call: give a string"
        )


def _results_in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the results of tools in the order of their calls.

    Templates leave out the ids of calls, so a model can match a result to its call only by place.
    A system message among the results comes after them.
    """
    ordered: list[dict[str, Any]] = []
    place: dict[str | None, int] = {}
    for message in messages:
        if message["role"] == "tool" and place:
            at = len(ordered)
            mine = place.get(message.get("tool_call_id"), len(place))
            while at and (role := ordered[at - 1]["role"]) in ("tool", "system"):
                before = ordered[at - 1].get("tool_call_id")
                if role == "tool" and place.get(before, len(place)) <= mine:
                    break
                at -= 1
            ordered.insert(at, message)
            continue
        if message["role"] not in ("tool", "system"):
            place = {c["id"]: i for i, c in enumerate(message.get("tool_calls", []))}
        ordered.append(message)
    return ordered


def _with_question(start: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the whole conversation, in which the user says something.

    Args:
        start: the text of the system messages at the start.

    Raises:
        SettingError: there is nothing to answer.
    """
    if messages and messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        # `llm -s "..."` sends an empty message after the system message.
        before = messages[-2]["role"] if len(messages) > 1 else "system" if start else None
        messages = messages[:-1] if before == "system" else messages
        if before != "system":
            raise _nothing_to_answer()
    if any(m["role"] == "user" for m in messages):
        return [{"role": "system", "content": start}, *messages] if start else messages
    if not start and not messages:
        raise _nothing_to_answer()
    # Templates refuse a conversation in which the user says nothing.
    return [{"role": "user", "content": start}, *messages]


def _nothing_to_answer() -> SettingError:
    return SettingError("the prompt is empty: end with a message that the model can answer")


def _show(value: Any) -> str:
    """Return the repr of a value for an error text, of at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
