"""Translate the engine's events to LangChain's chunks."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    InvalidToolCall,
    message_chunk_to_message,
)
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.utils.json import parse_partial_json

from flashmoe.errors import FlashMoEError, OutputError
from flashmoe.events import (
    End,
    Event,
    Logprobs,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

from .errors import IncompleteOutput, to_langchain_error

# What LangChain calls the reasons why an answer ends.
_NORMALIZED = {"stop": "stop", "length": "length", "tool_calls": "tool_call"}

# Endings, one of which makes any piece of JSON invalid when it is appended: inside an object or
# array, inside a string there, or after a backslash in a string.
_INVALID_ENDINGS = ("]", "}", '"]', '"}', '""]', '""}')


class Translator:
    """Translates the events of one answer, in order.

    Args:
        model_name: the name of the model, for the metadata of the answer.
    """

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._arguments: dict[int, str] = {}
        self._invalid: dict[str | None, InvalidToolCall] = {}
        self._chunks: list[AIMessageChunk] = []

    def __call__(self, event: Event) -> ChatGenerationChunk | None:
        """Return the chunk for an event, or None if the event has no chunk."""
        chunk = self._chunk(event)
        if chunk is None:
            return None
        self._chunks.append(chunk)
        return ChatGenerationChunk(message=chunk)

    def finish_failed(self, error: FlashMoEError, *, keep: bool) -> ChatGenerationChunk:
        """Return the last chunk of an answer that failed, or raise the error.

        Args:
            error: the error of the engine.
            keep: return a structured answer that does not fit its schema as it is.

        Raises:
            IncompleteOutput: a structured answer does not fit its schema, and `keep` is False.
            LangChainException: the LangChain error for any other error.
        """
        if not isinstance(error, OutputError):
            raise to_langchain_error(error) from error
        assert error.end is not None, "the engine sets it when it raises the error"
        self._chunks.append(self._last(error.end))
        if not keep:
            raise IncompleteOutput(str(error), self.message) from error
        return ChatGenerationChunk(message=self._chunks[-1])

    @property
    def message(self) -> AIMessage:
        """The answer so far as one message, with the errors of calls that cannot be made."""
        first, *rest = self._chunks or [AIMessageChunk(content="")]
        message = message_chunk_to_message(first + rest if rest else first)
        assert isinstance(message, AIMessage), "it is converted from an AIMessageChunk"
        message.invalid_tool_calls = [
            self._invalid.get(call["id"], call) for call in message.invalid_tool_calls
        ]
        return message

    def _chunk(self, event: Event) -> AIMessageChunk | None:
        if isinstance(event, Text):
            return AIMessageChunk(content=event.text)
        if isinstance(event, Reasoning):
            return AIMessageChunk(content="", additional_kwargs={"reasoning_content": event.text})
        if isinstance(event, ToolCallStart):
            self._arguments[event.index] = ""
            return _piece(event.index, "", name=event.name, id=event.id)
        if isinstance(event, ToolCallArguments):
            self._arguments[event.index] += event.text
            return _piece(event.index, event.text)
        if isinstance(event, ToolCall) and event.error is not None:
            return self._invalid_call(event)
        if isinstance(event, Logprobs):
            token = _logprob(event.token)
            token["top_logprobs"] = [_logprob(other) for other in event.top]
            return AIMessageChunk(content="", response_metadata={"logprobs": {"content": [token]}})
        if isinstance(event, End):
            return self._last(event)
        return None

    def _invalid_call(self, call: ToolCall) -> AIMessageChunk:
        """Return the chunk that makes a call invalid.

        In chunks, a call is invalid if its arguments are not JSON, but LangChain completes JSON
        that is only cut short. So an ending is appended that makes this impossible.
        """
        self._invalid[call.id] = invalid_tool_call(
            name=call.name, args=call.text, id=call.id, error=call.error
        )
        streamed = self._arguments.get(call.index)
        if streamed is None:
            text = call.text + _invalid_ending(call.text)
            return _piece(call.index, text, name=call.name, id=call.id)
        return _piece(call.index, _invalid_ending(streamed))

    def _last(self, end: End) -> AIMessageChunk:
        usage = UsageMetadata(
            input_tokens=end.prompt_tokens,
            output_tokens=end.generated_tokens,
            total_tokens=end.prompt_tokens + end.generated_tokens,
            input_token_details=InputTokenDetails(cache_read=end.cached_tokens),
            output_token_details=OutputTokenDetails(reasoning=end.reasoning_tokens),
        )
        names = {"model_name": self._model_name, "model_provider": "flashmoe"}
        metadata: dict[str, Any] = names | end.figures()
        if end.finish_reason in _NORMALIZED:
            metadata["normalized_finish_reason"] = _NORMALIZED[end.finish_reason]
        if self._invalid:
            # A stream's chunks, added up, have these calls without their errors.
            metadata["invalid_tool_calls"] = [
                {k: call[k] for k in ("id", "name", "error")} for call in self._invalid.values()
            ]
        return AIMessageChunk(
            content="",
            chunk_position="last",
            usage_metadata=usage,
            response_metadata=metadata,
        )


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": [*token.data]}


def _piece(index: int, args: str, name: str | None = None, id: str | None = None) -> AIMessageChunk:
    """Return a chunk with a piece of the arguments of a tool call."""
    chunk = tool_call_chunk(name=name, args=args, id=id, index=index)
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _invalid_ending(args: str) -> str:
    """Return the ending with which LangChain takes arguments for invalid, "" if it already does."""
    return next(ending for ending in ("", *_INVALID_ENDINGS) if _is_invalid(args + ending))


def _is_invalid(args: str) -> bool:
    try:
        # LangChain takes empty arguments for an empty object.
        return args != "" and not isinstance(parse_partial_json(args), dict)
    except ValueError:
        return True
