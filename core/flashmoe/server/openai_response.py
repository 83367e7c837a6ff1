"""Builds OpenAI's chat completions from the engine's events, and API errors from its errors.

    chat.completion         the whole answer: text, reasoning as `reasoning_content`, tool calls
    chat.completion.chunk   the same in pieces

Beside OpenAI's fields, `flashmoe` holds the figures of the answer (`End.figures`): K, bits, hit
rate, bytes read. A structured answer that max_tokens cut short is returned with the finish_reason
"length", as in OpenAI's API: clients look there before they parse. Any other answer that does not
have the requested form is an error with the status 422.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ..errors import (
    ContextError,
    FlashMoEError,
    LimitError,
    OutputError,
    SettingError,
    TimedOut,
)
from ..events import End, Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from .api import Answer, check_cut_short
from .openai_errors import ApiError
from .openai_request import refused_request

log = logging.getLogger("flashmoe")


class ChatCompletion(Answer):
    """One answer in OpenAI's format. Events must be given in the order of the engine.

    Args:
        id: id of the completion.
        created: seconds since 1970.
        model: name of the model in the answer.
        include_usage: whether the stream ends with a chunk that holds only the usage.
    """

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool = False):
        self._head = {"id": id, "created": created, "model": model}
        self._include_usage = include_usage
        self._end: End | None = None
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict] = {}
        self._invalid: list[dict] = []
        self._started = False

    @property
    def end(self) -> End:
        """The last event. It must have been given to `chunks` or `error_chunks` before."""
        assert self._end is not None, "the answer has not ended"
        return self._end

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        """Return the chunks of a stream for an event, and add it to the whole answer."""
        if isinstance(event, Text):
            self._texts.append(event.text)
            return [self._delta({"content": event.text})]
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
            return [self._delta({"reasoning_content": event.text})]
        if isinstance(event, ToolCallStart):
            return [self._start_call(event.index, event.id, event.name)]
        if isinstance(event, ToolCallArguments):
            return [self._add_arguments(event.index, event.text)]
        if isinstance(event, ToolCall):
            return self._finish_call(event)
        if isinstance(event, End):
            return self._finish(event)
        return []

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        """Return the last chunks of an answer that does not have the requested form.

        Raises:
            OutputError: the same error, if the reason is not that max_tokens cut the answer short.
        """
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self._finish(error.end)

    def to_dict(self) -> dict:
        """Return the answer as one chat.completion object. Its end must have been given before."""
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = "".join(self._texts) if self._texts or not self._calls else None
        message["refusal"] = None
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(self.end),
            "flashmoe": self._figures,
        }

    def _start_call(self, index: int, id: str, name: str) -> dict:
        self._calls[index] = {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        call = {"index": index, "id": id, "type": "function"}
        return self._delta({"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]})

    def _add_arguments(self, index: int, text: str) -> dict:
        self._calls[index]["function"]["arguments"] += text
        return self._delta({"tool_calls": [{"index": index, "function": {"arguments": text}}]})

    def _finish_call(self, call: ToolCall) -> list[dict]:
        if call.error is None:
            return []
        self._invalid.append(
            {
                "index": call.index,
                "id": call.id,
                "name": call.name,
                "error": call.error,
                "text": call.text,
            }
        )
        known = self._calls.get(call.index)
        if not call.name or (known and known["function"]["arguments"]):
            return []
        # Clients would take a call without arguments for one that needs none.
        first = [] if known else [self._start_call(call.index, call.id, call.name)]
        return [*first, self._add_arguments(call.index, "{")]

    def _finish(self, end: End) -> list[dict]:
        self._end = end
        last = self._delta({}, self._finish_reason)
        chunks = [last | {"flashmoe": self._figures}]
        if self._include_usage:
            chunks.append(self._chunk([]) | {"usage": usage(end)})
        return chunks

    @property
    def _finish_reason(self) -> str:
        return self.end.finish_reason

    @property
    def _figures(self) -> dict:
        figures = self.end.figures()
        return figures | ({"invalid_tool_calls": self._invalid} if self._invalid else {})

    def _delta(self, delta: dict, finish_reason: str | None = None) -> dict:
        if not self._started:
            self._started = True
            delta = {"role": "assistant", "content": ""} | delta
        return self._chunk(
            [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        )

    def _chunk(self, choices: list[dict]) -> dict:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._include_usage else {})


def usage(end: End) -> dict:
    """Return the token counts of an answer in OpenAI's format.

    As there, reasoning tokens are part of the completion and cached tokens part of the prompt.
    """
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.generated_tokens,
        "total_tokens": end.prompt_tokens + end.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
    }


#: OpenAI's clients repeat a request after a 5xx status unless this header forbids it.
_NO_RETRY = {"x-should-retry": "false"}


def to_api_error(error: BaseException) -> ApiError:
    """Return the API error that a client gets for an exception of the engine."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ContextError):
        return ApiError(400, text, param="messages", code="context_length_exceeded")
    if isinstance(error, SettingError):
        return refused_request(error)
    if isinstance(error, LimitError):
        return ApiError(400, text, code="limit_exceeded")
    if isinstance(error, OutputError):
        return ApiError(422, text, code="invalid_output")
    if isinstance(error, TimedOut):
        return ApiError(504, text, code="timeout", headers=_NO_RETRY)
    if isinstance(error, FlashMoEError):
        return ApiError(500, text, code="model_failed", headers=_NO_RETRY)
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "internal error: see the server's log", headers=_NO_RETRY)


def shutting_down() -> ApiError:
    """Return the error of answers that the shutdown of the server cuts short."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=_NO_RETRY)


def queue_full(in_flight: int, answer_seconds: float) -> ApiError:
    """Return the error for a request beyond the limit.

    Args:
        in_flight: number of requests that are answered or wait now.
        answer_seconds: mean time of an answer; the client is told to wait that long.
    """
    wait = min(60, max(1, math.ceil(answer_seconds)))
    return ApiError(
        429,
        f"{in_flight} requests are being answered or waiting, and that is the limit: try again in "
        f"{wait} s, or start the server with a longer --queue",
        code="queue_full",
        headers={"Retry-After": str(wait)},
    )
