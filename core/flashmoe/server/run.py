"""Runs the server: its socket, its signals, its end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from ..errors import SettingError
from .app import Server

#: Seconds for answers in flight to end with an error, after Ctrl-C.
_GRACE = 5
#: Connections at most: some wait for an answer, some are idle.
_CONNECTIONS = 1000


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, and takes no connections yet. port 0: any free one.

    Raises:
        SettingError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as e:
        raise SettingError(f"host={host!r} is no address of this machine: {e}") from e
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as e:
        found.close()
        raise SettingError(
            f"host={host!r} port={port} cannot be had ({e.strerror or e}): give another --port, or "
            "end what uses it"
        ) from e
    return found


def url(host: str, bound: socket.socket) -> str:
    """Where clients find the API."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}/v1"


def prepare(server: Server, ready: Callable[[], None]) -> uvicorn.Server:
    """What serves, by its `run([socket])`, until SIGINT or SIGTERM, or its `should_exit`.

    ready: called when connections are taken.
    """
    config = uvicorn.Config(
        server,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=75,  # longer than clients keep one, so that none is used as it closes
        backlog=512,
    )
    return _Uvicorn(config, server, ready)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[], None]):
        super().__init__(config)
        self._app = server
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises them again at the end. Here they are how the server is ended.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = signal.SIGINT, signal.SIGTERM
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
