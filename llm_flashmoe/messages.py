"""llm's messages and tools as the engine takes them."""

from __future__ import annotations

from llm.parts import Message, ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart

import llm

from .errors import UserError

# Of the metadata that a part of a message carries.
_OURS, _ERROR = "flashmoe", "error"


def engine_messages(messages: list[Message]) -> list[dict]:
    """The whole conversation, as `flashmoe.chat.messages` describes it.

    Raises:
        UserError: a message holds what these models do not take.
    """
    found: list[dict] = []
    for message in messages:
        if message.role == "tool":
            found += [_result(part) for part in message.parts]
            continue
        turn = {"role": message.role, "content": ""}
        for part in message.parts:
            if isinstance(part, TextPart):
                turn["content"] += part.text
            elif isinstance(part, ReasoningPart):
                turn["reasoning_content"] = turn.get("reasoning_content", "") + part.text
            elif isinstance(part, ToolCallPart):
                call = {"id": part.tool_call_id, "name": part.name, "arguments": part.arguments}
                turn.setdefault("tool_calls", []).append(call)
            else:
                raise _not_taken(part)
        if any(_ERROR in ((p.provider_metadata or {}).get(_OURS) or {}) for p in message.parts):
            # The question, or what its tools returned, would make each later turn fail too.
            while found and found[-1]["role"] != "system" and found.pop()["role"] != "user":
                pass
        else:
            found.append(turn)
    return found


def failure(error: str) -> StreamEvent:
    """What stands for an answer that failed in `llm chat`: nothing to show, and a mark by which
    `engine_messages` leaves out the question later."""
    return StreamEvent(type="reasoning", chunk="", provider_metadata={_OURS: {_ERROR: error}})


def engine_tools(tools) -> list[dict]:
    """The tools of a prompt as function definitions.

    Raises:
        UserError: one of them is run by a server.
    """
    found = []
    for tool in tools or ():
        if not isinstance(tool, llm.Tool):
            raise UserError(f"{tool} runs on a server, and this model runs here: leave it out")
        function = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description:
            function["description"] = tool.description
        found.append(function)
    return found


def schema_of(prompt, conversation) -> dict | None:
    """The schema that the answer must satisfy. llm drops it after the first round of tools, so it
    is looked for in the rounds before."""
    if prompt.schema:
        return prompt.schema
    earlier = list(conversation.responses) if conversation is not None else []
    while prompt.tool_results and earlier:
        prompt = earlier.pop().prompt
        if prompt.schema:
            return prompt.schema
    return None


def _result(part) -> dict:
    if not isinstance(part, ToolResultPart):
        raise _not_taken(part)
    if part.attachments:
        raise UserError(f"the tool {part.name} returned an attachment: these models take text only")
    turn = {"role": "tool", "tool_call_id": part.tool_call_id, "content": part.output}
    return turn | {"error": True} if part.exception else turn


def _not_taken(part) -> UserError:
    kind = type(part).__name__.removesuffix("Part").lower()
    return UserError(
        f"the conversation holds an {kind}: these models take text and tool calls only"
    )
