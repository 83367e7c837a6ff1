"""LangChain's messages as the engine takes them. What a text model cannot take is refused."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from .errors import InvalidRequest

# Blocks of content that stand for something which the message also holds in a field of its own.
_CALLS = {"tool_call", "tool_use", "tool_call_chunk", "invalid_tool_call", "function_call"}
# Thoughts: the key of their text.
_THOUGHTS = {"reasoning": "reasoning", "thinking": "thinking"}
_TEXTS = {"text", "text-plain"}


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict]:
    """The conversation, as `flashmoe.chat.messages` describes it.

    Raises:
        InvalidRequest: a message is of an unknown kind, or holds more than text and calls.
    """
    return [_message(message, index) for index, message in enumerate(messages)]


def _message(message: BaseMessage, index: int) -> dict:
    text, thought = _content(message, index)
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": text}
    if isinstance(message, HumanMessage):
        return {"role": "user", "content": text}
    if isinstance(message, ChatMessage):
        return {"role": message.role, "content": text}
    if isinstance(message, ToolMessage):
        turn = {"role": "tool", "tool_call_id": message.tool_call_id, "content": text}
        return turn | {"error": True} if message.status == "error" else turn
    if isinstance(message, AIMessage):
        return _assistant(message, text, thought)
    raise InvalidRequest(
        f"message {index} is a {type(message).__name__}: give a system, human, AI or tool message"
    )


def _assistant(message: AIMessage, text: str, thought: str) -> dict:
    # A call that could not be read is shown as the text that it was.
    broken = [call["args"] for call in message.invalid_tool_calls if call["args"]]
    turn = {"role": "assistant", "content": "\n".join([*([text] if text else []), *broken])}
    if thought := thought or message.additional_kwargs.get("reasoning_content"):
        turn["reasoning_content"] = thought
    calls = [
        {"id": call["id"], "name": call["name"], "arguments": call["args"]}
        for call in message.tool_calls
    ]
    return turn | {"tool_calls": calls} if calls else turn


def _content(message: BaseMessage, index: int) -> tuple[str, str]:
    """(text, thought) of a message's content."""
    if isinstance(message.content, str):
        return message.content, ""
    texts, thoughts = [], []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str):
            texts.append(block)
        elif kind in _TEXTS and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif isinstance(message, AIMessage) and kind in _THOUGHTS:
            thoughts.append(block.get(_THOUGHTS[kind]) or "")
        elif not (isinstance(message, AIMessage) and kind in _CALLS):
            raise InvalidRequest(
                f"message {index}, a {type(message).__name__}, holds a block of type {kind!r}: "
                "this model takes text only"
            )
    return "".join(texts), "".join(thoughts)
