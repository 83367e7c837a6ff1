"""How the hosts of a cluster know of each other, beside the collectives of MLX.

A collective cannot be left, and waits for a host that is gone for as long as the system's
connection does, so each host tells the lead twice a second that it lives, and the lead each host.
Whoever hears nothing for SILENCE seconds cuts the collectives' connections: what waits in them ends
with an error. Errors of hosts come in words here too, and the news that there is work: collectives
wait in a loop that takes a core, so hosts with nothing to do wait here.

Lines of JSON over TCP, each host with the lead. A host names the secret that the lead gave to all
by a collective, so that nobody else joins.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic

from ..errors import ClusterError

BEAT = 0.5
SILENCE = 5.0
JOIN = 60.0


class Line:
    """One connection. Messages are dicts with a `kind`; beats are seen to here.

    Args:
        who: whom it leads to, for people.
        lost: called once with why, when the other end is gone.
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

    def send(self, kind: str, **message) -> None:
        """Raises OSError when the other end is gone."""
        data = json.dumps({"kind": kind, **message}).encode() + b"\n"
        with self._sending:
            self._connection.sendall(data)

    def get(self, timeout: float | None = None) -> dict | None:
        """The next message; None when there will be none, or none came in time."""
        try:
            message = self._messages.get(timeout=timeout)
        except Empty:
            return None
        if message is None:
            self._messages.put(None)  # for the next one who asks
        return message

    @property
    def ended(self) -> bool:
        """Whether the other end said that it ends, or this one did."""
        return self._ended

    def close(self) -> None:
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
                return  # the listener says so
            if monotonic() - self._heard > SILENCE:
                self._gone(f"nothing was heard of it for {SILENCE:g} seconds")
                return

    def _gone(self, why: str) -> None:
        if not self._over.is_set():
            self._over.set()
            self._messages.put(None)
            self._lost(why)


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of an address of this machine."""
    return socket.create_server((address, 0), backlog=16)


def accept(
    server: socket.socket, count: int, secret: str, lost: Callable[[int, str], None]
) -> dict[int, Line]:
    """Wait for `count` hosts: rank -> its line.

    Raises:
        ClusterError: not all came within JOIN seconds.
    """
    found: dict[int, Line] = {}
    deadline = monotonic() + JOIN
    while len(found) < count:
        server.settimeout(max(0.01, deadline - monotonic()))
        try:
            connection, address = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count + 1)) - found.keys())
            raise ClusterError(
                f"hosts {missing} did not reach the lead within {JOIN:g} seconds: see what they "
                "say, and whether a firewall lets them connect to any port of the lead"
            ) from None
        hello = _hello(connection)
        rank = hello.get("rank")
        if hello.get("secret") != secret or rank not in range(1, count + 1) or rank in found:
            connection.close()
            continue
        who = f"host {rank} ({address[0]})"
        found[rank] = Line(connection, who, lambda why, rank=rank: lost(rank, why))
    return found


def _hello(connection: socket.socket) -> dict:
    """The first line of a stranger, or {}."""
    try:
        connection.settimeout(5)
        data = b""
        while not data.endswith(b"\n") and len(data) < 1000 and (byte := connection.recv(1)):
            data += byte
        found = json.loads(data)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def join(address: tuple[str, int], rank: int, secret: str, lost: Callable[[str], None]) -> Line:
    """Connect to the lead.

    Raises:
        ClusterError: it cannot be reached.
    """
    try:
        connection = socket.create_connection(address, timeout=JOIN)
        hello = {"rank": rank, "secret": secret}
        connection.sendall(json.dumps(hello).encode() + b"\n")
    except OSError as e:
        raise ClusterError(f"host {rank} cannot reach the lead at {address[0]}: {e}") from e
    return Line(connection, f"the lead ({address[0]})", lost)


def ring() -> list[list[str]]:
    """ip:port of each host, by rank, where MLX's ring connects; [] with another back end."""
    try:
        with open(os.environ["MLX_HOSTFILE"]) as file:
            found = json.load(file)
        return [[str(address) for address in host] for host in found]
    except (KeyError, OSError, ValueError, TypeError):
        return []


def cut(addresses: Iterable[str]) -> int:
    """Shut down the connections of this process from or to these ip:port; how many.

    MLX keeps its sockets to itself, so they are looked for among the open files.
    """
    wanted, count = set(addresses), 0
    for name in os.listdir("/dev/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as found:
                ends = [found.getsockname(), found.getpeername()]
                if wanted & {f"{end[0]}:{end[1]}" for end in ends}:
                    found.shutdown(socket.SHUT_RDWR)
                    count += 1
        except (OSError, ValueError, IndexError, TypeError):
            pass  # no socket, or gone since
    return count
