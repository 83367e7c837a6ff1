"""Test that events reach the caller in order, also when some of them take long to make."""

import threading

from flashmoe.events import Text
from flashmoe.generation.delivery import Delivery
from flashmoe.generation.job import Cancellation, Job
from flashmoe.requests import Request


class Caller:
    """Keeps what arrives, and waits for it."""

    def __init__(self):
        self.received = []
        self._arrived = threading.Condition()
        self.job = Job(Request([]), self._put, Cancellation())
        self.delivery = Delivery(self.job)

    def _put(self, event):
        with self._arrived:
            self.received.append(event)
            self._arrived.notify_all()

    def wait_for(self, count):
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.received) >= count, timeout=60)
        return self.received


def test_events_that_are_ready_are_given_on_at_once():
    caller = Caller()
    caller.delivery.events([Text("a"), Text("b")])
    assert caller.received == [Text("a"), Text("b")]
    caller.delivery.last(lambda: Text("end"), late=False)
    assert caller.received[-1] == Text("end")


def test_later_events_wait_for_one_that_takes_long():
    caller, go = Caller(), threading.Event()

    def slow():
        assert go.wait(60)
        yield Text("a")

    caller.delivery.events(slow())
    caller.delivery.events([Text("b")])
    caller.delivery.last(lambda: Text("end"), late=False)
    assert caller.received == []
    go.set()
    assert caller.wait_for(3) == [Text("a"), Text("b"), Text("end")]


def test_last_event_that_takes_long_is_made_on_another_thread():
    caller = Caller()
    caller.delivery.last(lambda: Text(threading.current_thread().name), late=True)
    assert caller.wait_for(1) == [Text("flashmoe-delivery")]


def test_event_that_cannot_be_made_ends_the_answer():
    caller, error = Caller(), ValueError("no")

    def broken():
        yield Text("a")
        raise error

    caller.delivery.events(broken())
    caller.delivery.events([Text("b")])
    caller.delivery.last(lambda: Text("end"), late=False)
    assert caller.wait_for(2) == [Text("a"), error]
    assert caller.job.cancelled.closed


def test_error_comes_after_the_events_before_it():
    caller, go, error = Caller(), threading.Event(), ValueError("read error")

    def slow():
        assert go.wait(60)
        yield Text("a")

    caller.delivery.events(slow())
    caller.delivery.fail(error)
    go.set()
    assert caller.wait_for(2) == [Text("a"), error]
    other = Caller()
    other.delivery.fail(error)
    assert other.received == [error]
