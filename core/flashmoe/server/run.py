"""Runs the server with uvicorn: its socket, its signals, its shutdown."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from ..errors import SettingError
from ..shutdown import STATUS, end_at_next, end_within
from .app import Server
from .connections import Connection, ConnectionLimits, check_times

#: Seconds after Ctrl-C or SIGTERM in which answers in flight may end with an error, and after which
#: the process has ended, whatever its threads do.
_GRACE, _END = 1, 1.5
#: Files that may be opened while connections take all others, and connections that the operating
#: system accepts at most before they are counted.
_SPARE_FILES, _BACKLOG = 64, 512
#: Seconds after which a client that is silent is asked whether it is still there.
_PROBE_AFTER = 60


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address and does not accept connections yet.

    Args:
        port: 0 takes any free port.

    Raises:
        SettingError: the address is not one of this machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise SettingError(
            f"host={host!r} is not an address of this machine ({e}): leave out --host to serve "
            "this machine only, or give one of its addresses"
        ) from e
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _probe_silent_clients(bound)
        bound.bind(address)
    except OSError as e:
        bound.close()
        raise SettingError(
            f"the server cannot listen at host={host!r} port={port} ({e.strerror or e}): choose "
            "another --port, or stop the program that uses this one"
        ) from e
    return bound


def api_url(host: str, bound: socket.socket) -> str:
    """Return the base URL of the API, which clients are configured with."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}/v1"


def _probe_silent_clients(bound: socket.socket) -> None:
    """Let the operating system close connections whose other end is gone without a word."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the first one otherwise; what a system does not know keeps its default.
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):
        if hasattr(socket, name):
            bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _PROBE_AFTER)
    with suppress(OSError):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def connection_limits() -> tuple[ConnectionLimits, int]:
    """Return the limits of connections and the length of the queue of new ones.

    There are fewer where this process may open few files. Call it when the model is loaded.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = ConnectionLimits()
    if soft == resource.RLIM_INFINITY:
        return limits, _BACKLOG
    free = soft - len(os.listdir("/dev/fd")) - limits.vital - _SPARE_FILES
    backlog = max(8, min(_BACKLOG, free // 4))
    # The files of closed connections are given back only after the next ones were accepted.
    return replace(limits, count=max(8, min(limits.count, free - 2 * backlog))), backlog


def make_uvicorn(
    server: Server, ready: Callable[[], None], limits: ConnectionLimits | None = None
) -> UvicornServer:
    """Return the uvicorn server for an application.

    Its `run([socket])` serves until SIGINT or SIGTERM, or until its `should_exit` is set.

    Args:
        ready: called once connections are accepted.
        limits: None: what `connection_limits` returns.
    """
    possible, backlog = connection_limits()
    # uvicorn only calls it, with keywords, for each connection.
    connection: Any = partial(Connection, limits or possible)
    config = uvicorn.Config(
        server,
        http=connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        # Longer than clients keep an idle connection, so that none sends on one being closed.
        timeout_keep_alive=75,
        backlog=backlog,
    )
    return UvicornServer(config, server, ready)


class UvicornServer(uvicorn.Server):
    """uvicorn's server, which ends cleanly and soon at a signal.

    Attributes:
        signalled: whether a signal ended it.
    """

    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[], None]):
        super().__init__(config)
        self._app = server
        self._ready = ready
        self.signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        # Ten times a second.
        if counter % 10 == 0:
            check_times(self.server_state.connections)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own version raises the signals again at the end. Here they are the normal way
        # to stop the server.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in STATUS}
        try:
            yield
        finally:
            if not self.signalled:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for each in STATUS:
            end_at_next(each)
        end_within(_END, STATUS[signal.Signals(number)])
        self.signalled = self.should_exit = True
