"""Convert llm's messages and tools into the form that the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm.parts import (
    Message,
    Part,
    ReasoningPart,
    StreamEvent,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)

import llm

from .errors import UserError

# The keys of our metadata on a part of a message: {_NAMESPACE: {_ERROR: text}}.
_NAMESPACE, _ERROR = "flashmoe", "error"


def engine_messages(messages: list[Message]) -> list[dict]:
    """Return the conversation in the form that `flashmoe.chat.messages` describes.

    Raises:
        UserError: a message has content that these models do not take.
    """
    converted: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            converted += [_tool_result(part) for part in message.parts]
            continue
        turn: dict[str, Any] = {"role": message.role, "content": ""}
        for part in message.parts:
            if isinstance(part, TextPart):
                turn["content"] += part.text
            elif isinstance(part, ReasoningPart):
                turn["reasoning_content"] = turn.get("reasoning_content", "") + part.text
            elif isinstance(part, ToolCallPart):
                call = {"id": part.tool_call_id, "name": part.name, "arguments": part.arguments}
                turn.setdefault("tool_calls", []).append(call)
            else:
                raise _unsupported(part)
        if any(_has_failed(part) for part in message.parts):
            # The question, or what its tools returned, would make every later turn fail too.
            while converted and converted[-1]["role"] != "system":
                if converted.pop()["role"] == "user":
                    break
        else:
            converted.append(turn)
    return converted


def failure_event(error: str) -> StreamEvent:
    """Return the event that stands for a failed answer in `llm chat`.

    It shows nothing, and marks the answer so that `engine_messages` leaves out the question and the
    answer in later turns.
    """
    return StreamEvent(type="reasoning", chunk="", provider_metadata={_NAMESPACE: {_ERROR: error}})


def engine_tools(tools: Sequence[Any] | None) -> list[dict]:
    """Return the tools of a prompt as function definitions.

    Raises:
        UserError: one of them is run by a server.
    """
    definitions = []
    for tool in tools or ():
        if not isinstance(tool, llm.Tool):
            raise UserError(
                f"the tool {tool} runs on a server, and this model runs on this machine: leave it "
                "out"
            )
        function = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description:
            function["description"] = tool.description
        definitions.append(function)
    return definitions


def find_schema(
    prompt: llm.Prompt, conversation: llm.Conversation | llm.AsyncConversation | None
) -> dict | None:
    """Return the schema that the answer must satisfy, or None.

    llm drops the schema after the first round of tool calls, so it is taken from earlier rounds.
    """
    earlier = list(conversation.responses) if conversation is not None else []
    while not prompt.schema and prompt.tool_results and earlier:
        prompt = earlier.pop().prompt
    # llm turns pydantic classes into JSON schemas before it makes a prompt.
    return prompt.schema if isinstance(prompt.schema, dict) and prompt.schema else None


def _has_failed(part: Part) -> bool:
    """Return whether a part of a message is the mark of a failed answer."""
    metadata = getattr(part, "provider_metadata", None) or {}
    return _ERROR in (metadata.get(_NAMESPACE) or {})


def _tool_result(part: Part) -> dict:
    if not isinstance(part, ToolResultPart):
        raise _unsupported(part)
    if part.attachments:
        raise UserError(
            f"the tool {part.name} returned an attachment: these models take text only, so it must "
            "return text"
        )
    turn = {"role": "tool", "tool_call_id": part.tool_call_id, "content": part.output}
    return turn | {"error": True} if part.exception else turn


def _unsupported(part: Part) -> UserError:
    kind = type(part).__name__.removesuffix("Part").lower()
    return UserError(
        f"the conversation has a part of type {kind}: these models take text and tool calls only"
    )
