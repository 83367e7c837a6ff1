"""Define the job that a request becomes between the caller's thread and the engine's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..events import Event
from ..requests import Request


class Cancellation:
    """Tells whether a job is cancelled.

    A job is cancelled when its answer was closed, when one of the caller's events is set, or when
    the engine is closing.

    Args:
        events: each cancels the job when it is set; None is left out.
    """

    def __init__(self, *events: threading.Event | None):
        self._closed = threading.Event()
        self._events = [self._closed, *(e for e in events if e is not None)]

    @property
    def closed(self) -> bool:
        """Whether nobody reads the answer any more."""
        return self._closed.is_set()

    def set(self) -> None:
        """Cancel the job because nobody reads its answer any more."""
        self._closed.set()

    def is_set(self) -> bool:
        """Return whether the job is cancelled."""
        return any(event.is_set() for event in self._events)


@dataclass(frozen=True, eq=False)
class Job:
    """A request and where its answer goes.

    Attributes:
        request: what the caller asks.
        put: takes the events of the answer, or the error that ends it.
        cancelled: tells whether anybody still waits for the answer.
    """

    request: Request
    put: Callable[[Event | BaseException], None]
    cancelled: Cancellation
