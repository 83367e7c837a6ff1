"""Give the events of an answer to its caller, in order, without holding up other answers.

Most events are there at once, and are given on by the engine's thread. Events that take long to
make, because a value is checked by a schema, are made on a thread that the answer starts then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from ..chat.output_parser import is_late
from ..events import Event
from .job import Job


class Delivery:
    """The events of one answer on their way to the caller.

    Args:
        job: takes the events. It is cancelled when an event cannot be made.
    """

    def __init__(self, job: Job):
        self._job = job
        self._late: SimpleQueue[Callable[[], Iterable[Event]] | None] | None = None

    def event(self, event: Event) -> None:
        """Give on one event."""
        self.events([event])

    def events(self, events: Iterable[Event]) -> None:
        """Give on events, after all earlier ones."""
        if self._late is None and not is_late(events):
            for event in events:
                self._job.put(event)
        else:
            self._queue().put(lambda: events)

    def last(self, make: Callable[[], Event], *, late: bool) -> None:
        """Give on the last event.

        Args:
            make: returns the event, or raises the error that the answer ends with.
            late: it may take long.
        """
        if self._late is None and not late:
            self._give(lambda: [make()])
        else:
            queue = self._queue()
            queue.put(lambda: [make()])
            queue.put(None)

    def fail(self, error: BaseException) -> None:
        """End the answer with an error, after the events before it."""
        if self._late is None:
            self._job.put(error)
        else:

            def throw() -> Iterable[Event]:
                raise error

            self._late.put(throw)
            self._late.put(None)

    def _queue(self) -> SimpleQueue[Callable[[], Iterable[Event]] | None]:
        if self._late is None:
            self._late = SimpleQueue()
            threading.Thread(
                target=self._give_late, args=[self._late], name="flashmoe-delivery", daemon=True
            ).start()
        return self._late

    def _give_late(self, queue: SimpleQueue[Callable[[], Iterable[Event]] | None]) -> None:
        good = True
        while (make := queue.get()) is not None:
            good = good and self._give(make)

    def _give(self, make: Callable[[], Iterable[Event]]) -> bool:
        """Give on events; return False after an error, which is given on too."""
        try:
            for event in make():
                self._job.put(event)
        except BaseException as e:  # whatever it is, it belongs to the caller
            self._job.put(e)
            self._job.cancelled.set()
            return False
        return True
