"""Events of the engine as OpenAI's chat completions, whole or in chunks; its errors as theirs.

    chat.completion         a text, its thought as `reasoning_content`, tool calls, usage
    chat.completion.chunk   the same in pieces

Beside them, under `flashmoe`, are the figures of the answer (`End.figures`): K, bits, hit rate,
bytes read. A structured answer that max_tokens cut short is one whose finish_reason is "length", as
in OpenAI's API: clients look there before they parse. Any other that is not what was asked for is
an error, 422.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ..errors import ContextError, FlashMoEError, OutputError, SettingError, TimedOut
from ..events import End, Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from .openai_errors import ApiError
from .openai_request import refused

log = logging.getLogger("flashmoe")


class Completion:
    """One answer. Takes the events in order.

    Args:
        id: of the completion. created: seconds since 1970. model: its name in answers.
        include_usage: the last chunk is one of usage alone.

    Attributes:
        end: the last event, once it came.
    """

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool = False):
        self.end: End | None = None
        self._head = {"id": id, "created": created, "model": model}
        self._include_usage = include_usage
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, dict] = {}
        self._invalid: list[dict] = []
        self._begun = False

    def chunks(self, event: Event) -> list[dict]:
        """What a stream says of an event."""
        if isinstance(event, Text):
            self._texts.append(event.text)
            return [self._delta({"content": event.text})]
        if isinstance(event, Reasoning):
            self._thoughts.append(event.text)
            return [self._delta({"reasoning_content": event.text})]
        if isinstance(event, ToolCallStart):
            return [self._start(event.index, event.id, event.name)]
        if isinstance(event, ToolCallArguments):
            return [self._arguments(event.index, event.text)]
        if isinstance(event, ToolCall):
            return self._call_ends(event)
        if isinstance(event, End):
            return self._last(event)
        return []

    def fails(self, error: OutputError) -> list[dict]:
        """What a stream says of an answer that is not what was asked for.

        Raises:
            OutputError: it is not for want of tokens.
        """
        if error.end is None or error.end.finish_reason != "length":
            raise error
        return self._last(error.end)

    def whole(self) -> dict:
        """The answer in one piece, after its End."""
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = "".join(self._texts) if self._texts or not self._calls else None
        message["refusal"] = None
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(self.end),
            "flashmoe": self._figures,
        }

    def _start(self, index: int, id: str, name: str) -> dict:
        self._calls[index] = {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        call = {"index": index, "id": id, "type": "function"}
        return self._delta({"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]})

    def _arguments(self, index: int, text: str) -> dict:
        self._calls[index]["function"]["arguments"] += text
        return self._delta({"tool_calls": [{"index": index, "function": {"arguments": text}}]})

    def _call_ends(self, call: ToolCall) -> list[dict]:
        if call.error is None:
            return []
        self._invalid.append(
            {"index": call.index, "id": call.id, "name": call.name, "error": call.error}
        )
        known = self._calls.get(call.index)
        if not call.name or (known and known["function"]["arguments"]):
            return []
        # Without arguments clients take it for a call that needs none.
        first = [] if known else [self._start(call.index, call.id, call.name)]
        return [*first, self._arguments(call.index, call.text)]

    def _last(self, end: End) -> list[dict]:
        self.end = end
        last = self._delta({}, self._reason)
        chunks = [last | {"flashmoe": self._figures}]
        if self._include_usage:
            chunks.append(self._chunk([]) | {"usage": usage(end)})
        return chunks

    @property
    def _reason(self) -> str:
        reason = self.end.finish_reason
        return "stop" if reason == "tool_calls" and not self._calls else reason

    @property
    def _figures(self) -> dict:
        figures = self.end.figures()
        return figures | ({"invalid_tool_calls": self._invalid} if self._invalid else {})

    def _delta(self, delta: dict, reason: str | None = None) -> dict:
        if not self._begun:
            self._begun = True
            delta = {"role": "assistant", "content": ""} | delta
        return self._chunk(
            [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        )

    def _chunk(self, choices: list[dict]) -> dict:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._include_usage else {})


def usage(end: End) -> dict:
    """Tokens of an answer: those of a thought are of the completion, cached ones of the prompt."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.generated_tokens,
        "total_tokens": end.prompt_tokens + end.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
    }


#: Clients of OpenAI send a request again after a 5xx, unless they are told so.
_NOT_AGAIN = {"x-should-retry": "false"}


def failure(error: BaseException) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ContextError):
        return ApiError(400, text, param="messages", code="context_length_exceeded")
    if isinstance(error, SettingError):
        return refused(error)
    if isinstance(error, OutputError):
        return ApiError(422, text, code="invalid_output")
    if isinstance(error, TimedOut):
        return ApiError(504, text, code="timeout", headers=_NOT_AGAIN)
    if isinstance(error, FlashMoEError):
        return ApiError(500, text, code="model_failed", headers=_NOT_AGAIN)
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "internal error: see the server's log", headers=_NOT_AGAIN)


def stopping() -> ApiError:
    """For answers that the server's end cuts short."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=_NOT_AGAIN)


def busy(in_flight: int, seconds: float) -> ApiError:
    """For a request too many. seconds: that an answer takes."""
    wait = min(60, max(1, math.ceil(seconds)))
    return ApiError(
        429,
        f"{in_flight} requests are being answered or wait, which is the limit: try again in "
        f"{wait} s, or start the server with a longer --queue",
        code="queue_full",
        headers={"Retry-After": str(wait)},
    )
