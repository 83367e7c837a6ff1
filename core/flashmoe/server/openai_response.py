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

from ..errors import (
    ContextError,
    FlashMoEError,
    LimitError,
    OutputError,
    SettingError,
    TimedOut,
)
from ..events import End, Event
from .api import Answer, check_cut_short
from .chat_choice import ChatChoice
from .openai_errors import ApiError
from .openai_request import refused_request

log = logging.getLogger("flashmoe")


class ChatCompletion(Answer):
    """A completion in OpenAI's format. Events must be given in the order of the engine.

    Args:
        id: id of the completion.
        created: seconds since 1970.
        model: name of the model in the answer.
        include_usage: whether the stream ends with a chunk that holds only the usage.
        n: number of answers.
    """

    def __init__(
        self, id: str, created: int, model: str, *, include_usage: bool = False, n: int = 1
    ):
        self._head = {"id": id, "created": created, "model": model}
        self._include_usage = include_usage
        self._choices = [ChatChoice(index) for index in range(n)]

    @property
    def ends(self) -> list[End]:
        """The last events of the answers that have ended."""
        return [choice.end for choice in self._choices if choice.end is not None]

    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        """Return the chunks of a stream for an event, and add it to the whole answer."""
        choice = self._choices[index]
        chunks = [self._chunk([part]) for part in choice.add(event)]
        if isinstance(event, End):
            chunks[-1]["flashmoe"] = choice.figures()
            if self._include_usage and len(self.ends) == len(self._choices):
                chunks.append(self._chunk([]) | {"usage": usage(*self.ends)})
        return chunks

    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        """Return the last chunks of an answer that does not have the requested form.

        Raises:
            OutputError: the same error, if the reason is not that max_tokens cut the answer short.
        """
        check_cut_short(error)
        assert error.end is not None, "an answer that was cut short has its end"
        return self.chunks(error.end, index)

    def to_dict(self) -> dict:
        """Return the answer as one chat.completion object. Its end must have been given before."""
        figures = [choice.figures() for choice in self._choices]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice.to_dict() for choice in self._choices],
            "usage": usage(*self.ends),
            "flashmoe": figures[0] if len(figures) == 1 else {"choices": figures},
        }

    def _chunk(self, choices: list[dict]) -> dict:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | ({"usage": None} if self._include_usage else {})


def usage(first: End, *others: End) -> dict:
    """Return the token counts of answers to one prompt in OpenAI's format.

    As there, the prompt is counted once, reasoning tokens are part of the completion and cached
    tokens part of the prompt.
    """
    ends = [first, *others]
    generated = sum(end.generated_tokens for end in ends)
    reasoning = sum(end.reasoning_tokens for end in ends)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": first.prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
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
