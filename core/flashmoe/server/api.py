"""What each API of the server provides: it reads requests, and builds responses from events.

The endpoints (`flashmoe.server.answering`) are the same for all APIs: limits, the queue, clients
that disconnect, and streams. So an API is a function that turns the body of a request into a
`Call`, and a subclass of `Answer` that turns the engine's events into the JSON of the response.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import OutputError
from ..events import Event
from ..requests import Request
from .openai_errors import ApiError
from .served_model import ServedModels
from .wire import SSE_WITH_DONE, Wire


class Answer(ABC):
    """The response to one call, which may hold the answers of several requests.

    Events of each request must be given in the order of the engine.
    """

    @abstractmethod
    def chunks(self, event: Event, index: int = 0) -> list[dict]:
        """Add an event to the response, and return what a stream sends for it.

        Args:
            index: number of the request in the call.
        """

    @abstractmethod
    def error_chunks(self, error: OutputError, index: int = 0) -> list[dict]:
        """Do what `chunks` does for the end of an answer that does not have the requested form.

        Raises:
            OutputError: the same error, unless the reason is that the answer was cut short.
        """

    @abstractmethod
    def to_dict(self) -> dict:
        """Return the response that is not streamed. All answers must have ended."""

    def first_chunks(self) -> list[dict]:
        """Return what a stream begins with."""
        return []

    def pause_chunks(self) -> list[dict]:
        """Return what is sent in a pause; if nothing, the stream gets a comment."""
        return []

    def last_chunks(self) -> list[dict]:
        """Return what a stream sends when all answers have ended."""
        return []

    def failure_chunks(self, error: ApiError) -> list[dict]:
        """Return how a stream ends that has begun and fails."""
        return [error.body()]


def check_cut_short(error: OutputError) -> None:
    """Raise an error again, unless max_tokens cut the answer short.

    Clients look at the reason why an answer ended before they parse it.
    """
    if error.end is None or error.end.finish_reason != "length":
        raise error


def new_id(prefix: str) -> str:
    """Return a new id of a response or of a part of one."""
    return prefix + secrets.token_hex(12)


@dataclass(frozen=True)
class Call:
    """A request of a client, checked.

    Attributes:
        requests: what the engine is asked for, once or several times.
        answer: builds the response.
        stream: whether the response is streamed.
    """

    requests: tuple[Request, ...]
    answer: Answer
    stream: bool


@dataclass(frozen=True)
class Api:
    """One API.

    Attributes:
        path: where its requests go.
        read: turns the body of a request into a call, on a thread. It raises ApiError for what is
            refused without running the model.
        wire: how its streams are written.
        renamed: names of fields in errors, where the API has another name than chat completions.
    """

    path: str
    read: Callable[[bytes, ServedModels], Call]
    wire: Wire = SSE_WITH_DONE
    renamed: Mapping[str, str] = field(default_factory=dict)

    def translated(self, error: ApiError) -> ApiError:
        """Return the error with this API's name of the field that is wrong."""
        if error.param is not None:
            error.param = self.renamed.get(error.param, error.param)
        return error
