"""Test how the lead and the workers of a cluster notice that the other end is gone."""

import socket
import threading
import time

import pytest

from flashmoe.cluster import connections
from flashmoe.errors import ClusterError

SILENCE = 0.6


class Clock:
    """A clock that only the test moves, so that no machine is too slow for the limits."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(connections, "monotonic", clock)
    return clock


def until(condition) -> None:
    """Wait for a condition, for a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connect(monkeypatch):
    """Return the two ends of a connection, and what each end reported as lost."""
    monkeypatch.setattr(connections, "BEAT", 0.02)
    monkeypatch.setattr(connections, "SILENCE", SILENCE)
    lost = {0: [], 1: []}
    with connections.listen("127.0.0.1") as server:
        address = server.getsockname()
        joined = []
        joins = threading.Thread(
            target=lambda: joined.append(connections.join(address, 1, "s", lost[1].append))
        )
        joins.start()
        workers = connections.accept(server, 1, "s", lambda rank, why: lost[0].append((rank, why)))
        joins.join()
    return workers[1], joined[0], lost


def test_beats_keep_a_quiet_connection_until_one_end_closes(monkeypatch, clock):
    lead, worker, lost = connect(monkeypatch)
    for _ in range(5):
        clock.now += 0.5 * SILENCE
        until(lambda: lead._heard == worker._heard == clock.now)
    assert lost == {0: [], 1: []}
    worker.send("ready", text="é")
    assert lead.receive(60) == {"kind": "ready", "text": "é"}
    worker.close()
    until(lambda: lost[0])
    assert lost[0][0][0] == 1
    assert len(lost[0]) == 1
    assert lead.receive(60) is None
    lead.close()


def test_silent_worker_is_reported_as_lost(monkeypatch, clock):
    lead, worker, lost = connect(monkeypatch)
    monkeypatch.setattr(worker, "send", lambda *args, **more: None)

    def is_lost() -> bool:
        clock.now += SILENCE
        return bool(lost[0])

    until(is_lost)
    assert lost[0] == [(1, "it sent nothing for 0.6 seconds")]
    for end in (lead, worker):
        end.close()


def test_end_is_not_reported_as_a_loss(monkeypatch, clock):
    before = set(threading.enumerate())
    lead, worker, lost = connect(monkeypatch)
    lead.send("end")
    lead.close()
    assert worker.receive(60) == {"kind": "end"}
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert worker.ended
    assert lost == {0: [], 1: []}
    worker.close()


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[1]\n"])
def test_stranger_cannot_join(monkeypatch, hello):
    monkeypatch.setattr(connections, "JOIN", 1.0)
    with connections.listen("127.0.0.1") as server:
        with socket.create_connection(server.getsockname()) as stranger:
            stranger.sendall(hello)
        with pytest.raises(ClusterError, match=r"workers \[1\] did not reach the lead within 1"):
            connections.accept(server, 1, "secret", lambda *a: None)


def test_cut_closes_both_ends_of_every_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as one, socket.create_connection(address) as other:
            accepted = [server.accept()[0] for _ in range(2)]
            assert connections.cut(["127.0.0.1:1"]) == 0
            # Both ends of both connections are in this process.
            assert connections.cut([f"127.0.0.1:{address[1]}"]) == 4
            assert one.recv(1) == other.recv(1) == b""
            for connection in accepted:
                connection.close()
