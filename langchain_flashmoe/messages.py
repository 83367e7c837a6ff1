"""Convert LangChain's messages into the form that the engine takes.

Content that a text model cannot take is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from .errors import InvalidRequest

# Content blocks for tool calls, which the message also has in a field of its own.
_CALLS = {"tool_call", "tool_use", "tool_call_chunk", "invalid_tool_call", "function_call"}
# Content blocks for reasoning, with the key of their text.
_REASONING = {"reasoning": "reasoning", "thinking": "thinking"}
_TEXTS = {"text", "text-plain"}


def engine_messages(messages: Sequence[BaseMessage]) -> list[dict]:
    """Return the conversation in the form that `flashmoe.chat.messages` describes.

    Raises:
        InvalidRequest: a message has an unknown type, or content other than text and tool calls.
    """
    return [_message(message, index) for index, message in enumerate(messages)]


def _message(message: BaseMessage, index: int) -> dict:
    text, reasoning = _content(message, index)
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
        return _assistant(message, text, reasoning)
    raise InvalidRequest(
        f"message {index} is a {type(message).__name__}: use a system, human, AI or tool message"
    )


def _assistant(message: AIMessage, text: str, reasoning: str) -> dict:
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning_content := reasoning or message.additional_kwargs.get("reasoning_content"):
        turn["reasoning_content"] = reasoning_content
    calls = [
        {"id": call["id"], "name": call["name"], "arguments": call["args"]}
        for call in message.tool_calls
    ]
    # A call that could not be made is shown to the model as the text that it wrote.
    calls += [
        {
            "id": call["id"],
            "name": call["name"] or None,
            "arguments": call["args"] or "",
            "error": call["error"] or "it cannot be read",
        }
        for call in message.invalid_tool_calls
    ]
    return turn | {"tool_calls": calls} if calls else turn


def _content(message: BaseMessage, index: int) -> tuple[str, str]:
    """Return the text and the reasoning of a message's content."""
    if isinstance(message.content, str):
        return message.content, ""
    texts, reasoning = [], []
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if isinstance(block, str):
            texts.append(block)
        elif kind in _TEXTS and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif isinstance(message, AIMessage) and kind in _REASONING:
            reasoning.append(block.get(_REASONING[kind]) or "")
        elif not (isinstance(message, AIMessage) and kind in _CALLS):
            raise InvalidRequest(
                f"message {index}, a {type(message).__name__}, has a block of type {kind!r}: this "
                "model takes text only"
            )
    return "".join(texts), "".join(reasoning)
