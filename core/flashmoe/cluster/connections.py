"""Connect the workers of a cluster with the lead, beside the collectives of MLX.

A collective cannot be cancelled, and waits for a machine that is gone as long as the system's
connection does. So each worker sends the lead a heartbeat twice a second, and the lead each worker.
A machine that hears nothing for SILENCE seconds cuts the collectives' connections: what waits in
them ends with an error. These connections also carry the errors of workers as text, and the message
that there is work: collectives wait in a loop that takes a core, so idle workers wait here.

The protocol is lines of JSON over TCP, between each worker and the lead. A worker sends the secret
that the lead gave to all machines by a collective, so that nobody else can join.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from ..errors import ClusterError

#: Seconds between two heartbeats.
BEAT = 0.5
#: Seconds without a heartbeat after which the other end counts as gone.
SILENCE = 5.0
#: Seconds for a worker to connect.
JOIN = 60.0


class Connection:
    """One connection between the lead and a worker, with heartbeats.

    Messages are dicts with a `kind`.

    Args:
        who: the other end, as text for people.
        lost: called once with the reason when the other end is gone.
    """

    def __init__(self, connection: socket.socket, who: str, lost: Callable[[str], None]):
        self.who = who
        self._connection = connection
        self._lost = lost
        self._messages: SimpleQueue[dict | None] = SimpleQueue()
        self._sending = threading.Lock()
        self._heard = monotonic()
        self._over = threading.Event()
        self._ended = False
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"flashmoe-{who}", daemon=True).start()

    def send(self, kind: str, **message: Any) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone.
        """
        data = json.dumps({"kind": kind, **message}).encode() + b"\n"
        with self._sending:
            self._connection.sendall(data)

    def receive(self, timeout: float | None = None) -> dict | None:
        """Return the next message; None when there will be none, or none came in time."""
        try:
            message = self._messages.get(timeout=timeout)
        except Empty:
            return None
        if message is None:
            self._messages.put(None)  # for the next call
        return message

    @property
    def ended(self) -> bool:
        """Whether one of the ends has said that it ends."""
        return self._ended

    def close(self) -> None:
        """Close the connection; the other end is not reported as lost."""
        self._ended = True
        self._over.set()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _listen(self) -> None:
        why = "it closed the connection"
        try:
            for line in self._connection.makefile("rb"):
                self._heard = monotonic()
                message = json.loads(line)
                if message["kind"] == "end":
                    self._ended = True
                    self._over.set()
                if message["kind"] != "beat":
                    self._messages.put(message)
        except (OSError, ValueError, KeyError, TypeError) as e:
            why = str(e)
        self._messages.put(None)
        self._gone(why)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.send("beat")
            except OSError:
                return  # the listener reports it
            if monotonic() - self._heard > SILENCE:
                self._gone(f"it sent nothing for {SILENCE:g} seconds")
                return

    def _gone(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._messages.put(None)
            self._lost(why)


def listen(address: str) -> socket.socket:
    """Return a listening socket on a free port of an address of this machine."""
    return socket.create_server((address, 0), backlog=16)


def accept(
    server: socket.socket, count: int, secret: str, lost: Callable[[int, str], None]
) -> dict[int, Connection]:
    """Wait for `count` workers to connect; return their connections by rank.

    Args:
        secret: what a worker must send.
        lost: called with a rank and a reason when a worker is gone.

    Raises:
        ClusterError: not all connected within JOIN seconds.
    """
    connections: dict[int, Connection] = {}
    deadline = monotonic() + JOIN
    while len(connections) < count:
        server.settimeout(max(0.01, deadline - monotonic()))
        try:
            connection, address = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count + 1)) - connections.keys())
            raise ClusterError(
                f"workers {missing} did not reach the lead within {JOIN:g} seconds: see what they "
                "print, and whether a firewall lets them connect to any port of the lead"
            ) from None
        hello = _hello(connection)
        rank = hello.get("rank")
        expected = isinstance(rank, int) and 1 <= rank <= count and rank not in connections
        if hello.get("secret") != secret or not expected:
            connection.close()
            continue
        assert isinstance(rank, int), "as just checked"
        who = f"worker {rank} ({address[0]})"
        connections[rank] = Connection(connection, who, partial(lost, rank))
    return connections


def _hello(connection: socket.socket) -> dict:
    """Return the first line that a new connection sends, or {} when it is not valid."""
    try:
        connection.settimeout(5)
        data = b""
        while not data.endswith(b"\n") and len(data) < 1000 and (byte := connection.recv(1)):
            data += byte
        hello = json.loads(data)
        return hello if isinstance(hello, dict) else {}
    except (OSError, ValueError):
        return {}


def join(
    address: tuple[str, int], rank: int, secret: str, lost: Callable[[str], None]
) -> Connection:
    """Connect a worker to the lead.

    Raises:
        ClusterError: the lead cannot be reached.
    """
    try:
        connection = socket.create_connection(address, timeout=JOIN)
        hello = {"rank": rank, "secret": secret}
        connection.sendall(json.dumps(hello).encode() + b"\n")
    except OSError as e:
        raise ClusterError(f"worker {rank} cannot reach the lead at {address[0]}: {e}") from e
    return Connection(connection, f"the lead ({address[0]})", lost)


def ring() -> list[list[str]]:
    """Return the addresses, ip:port, where MLX's ring connects each machine, by rank.

    An empty list with another back end of MLX.
    """
    try:
        with open(os.environ["MLX_HOSTFILE"]) as file:
            machines = json.load(file)
        return [[str(address) for address in machine] for machine in machines]
    except (KeyError, OSError, ValueError, TypeError):
        return []


def cut(addresses: Iterable[str]) -> int:
    """Shut down this process's connections from or to these ip:port; return how many there were.

    MLX does not expose its sockets, so this looks for them among the open files.
    """
    wanted, count = set(addresses), 0
    for name in os.listdir("/dev/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as other:
                ends = [other.getsockname(), other.getpeername()]
                if wanted & {f"{end[0]}:{end[1]}" for end in ends}:
                    other.shutdown(socket.SHUT_RDWR)
                    count += 1
        except (OSError, ValueError, IndexError, TypeError):
            pass  # not a socket, or closed since
    return count
