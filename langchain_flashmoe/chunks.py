"""Events of the engine to chunks of LangChain, for one answer."""

from __future__ import annotations

from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.utils.json import parse_partial_json

from flashmoe.errors import FlashMoEError, OutputError
from flashmoe.events import End, Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart

from .errors import IncompleteOutput, translated

# Each, put behind some piece of JSON, makes it none: inside an object or array, then inside a
# string there, then behind a backslash in it.
_SPOILERS = ("]", "}", '"]', '"}', '""]', '""}')


class Translator:
    """Takes the events of one answer in order.

    Attributes:
        message: the chunks so far, as one.
    """

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._arguments: dict[int, str] = {}
        self._invalid: dict[str, dict] = {}
        self._chunks: list[AIMessageChunk] = []

    def __call__(self, event: Event) -> ChatGenerationChunk | None:
        """The chunk of an event; None when it has none."""
        chunk = self._chunk(event)
        if chunk is None:
            return None
        self._chunks.append(chunk)
        return ChatGenerationChunk(message=chunk)

    def ending(self, error: FlashMoEError, *, keep: bool) -> ChatGenerationChunk:
        """What ends an answer that failed: the last chunk of a structured one that is not what was
        asked for, if it is to be kept as it is.

        Raises:
            the error as LangChain's users know it, otherwise.
        """
        if not isinstance(error, OutputError):
            raise translated(error) from error
        last = self(error.end)
        if not keep:
            raise IncompleteOutput(str(error), self.message) from error
        return last

    @property
    def message(self) -> AIMessage:
        """The answer as a whole, with what is wrong with calls that cannot be made."""
        first, *rest = self._chunks or [AIMessageChunk(content="")]
        message = message_chunk_to_message(first + rest if rest else first)
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
            return self._spoil(event)
        if isinstance(event, End):
            return self._last(event)
        return None

    def _spoil(self, call: ToolCall) -> AIMessageChunk:
        """Chunks say that a call is invalid by arguments that are no JSON, and LangChain mends what
        is only cut short. So something is added that cannot be mended."""
        self._invalid[call.id] = invalid_tool_call(
            name=call.name, args=call.text, id=call.id, error=call.error
        )
        known = self._arguments.get(call.index)
        if known is None:
            text = call.text + _spoiler(call.text)
            return _piece(call.index, text, name=call.name, id=call.id)
        return _piece(call.index, _spoiler(known))

    def _last(self, end: End) -> AIMessageChunk:
        usage = UsageMetadata(
            input_tokens=end.prompt_tokens,
            output_tokens=end.generated_tokens,
            total_tokens=end.prompt_tokens + end.generated_tokens,
            input_token_details=InputTokenDetails(cache_read=end.cached_tokens),
            output_token_details=OutputTokenDetails(reasoning=end.reasoning_tokens),
        )
        names = {"model_name": self._model_name, "model_provider": "flashmoe"}
        return AIMessageChunk(
            content="",
            chunk_position="last",
            usage_metadata=usage,
            response_metadata=names | end.figures(),
        )


def _piece(index: int, args: str, name: str | None = None, id: str | None = None) -> AIMessageChunk:
    chunk = tool_call_chunk(name=name, args=args, id=id, index=index)
    return AIMessageChunk(content="", tool_call_chunks=[chunk])


def _spoiler(args: str) -> str:
    """What makes arguments invalid in LangChain's eyes; nothing, if they are so already."""
    return next(s for s in ("", *_SPOILERS) if _is_invalid(args + s))


def _is_invalid(args: str) -> bool:
    try:
        # No arguments at all are taken for an empty object.
        return args != "" and not isinstance(parse_partial_json(args), dict)
    except ValueError:
        return True
