"""Connections of the server: how many there may be, and how long they may keep their places.

uvicorn's connections have no time limit for the head of a request, and a full server refuses all
newcomers. Here a place belongs to a client that has sent a whole request, until it is answered. Who
has not yet sent one has it for a limited time, and for less if the server is full: a newcomer then
takes the place that has waited longest. So connections that send nothing cannot keep others out,
however many they are.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..terminal import format_number
from .access import send_error
from .openai_errors import ApiError


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take.

    Attributes:
        count: maximum number of connections.
        vital: number of further connections, which only get an answer from `VITAL_PATHS`.
        head: seconds for the head of a request, counted from its first byte. A connection on which
            nothing has been sent yet is closed after the same time.
        rest: seconds in which a client may send the rest of a request that was answered early, and
            receive what is being sent to it.
    """

    count: int = 1000
    vital: int = 16
    head: float = 10.0
    rest: float = 60.0


#: Paths that are answered when all places are taken: they tell an operator why.
VITAL_PATHS = ("/health", "/metrics")


class Connection(H11Protocol):
    """A connection of one client, with limits.

    Args:
        limits: shared by all connections of a server.
        args: uvicorn's.
    """

    def __init__(self, limits: ConnectionLimits, **args: Any):
        super().__init__(**args)
        self._limits = limits
        #: Since when there has been no whole request.
        self._waiting_since = monotonic()
        #: When the first byte of what is not yet a whole head arrived.
        self._head_since: float | None = None
        #: Since when the client has not received what is being sent, and the connection stays open
        #: only for that.
        self._stuck_since: float | None = None

    @property
    def waits(self) -> bool:
        """Whether the client has not sent a whole request that is to be answered."""
        return not self._answering or self.cycle.more_body

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place: a free one, one of a client that waits, or a vital one."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        others = self.connections - {self}
        if len(others) < self._limits.count:
            return
        waiting = [c for c in others if isinstance(c, Connection) and c.waits]
        if waiting:
            min(waiting, key=lambda c: c._waiting_since).drop()
        elif len(others) < self._limits.count + self._limits.vital:
            self.app = _only_vital(self.app)
        else:
            self.drop()

    def drop(self) -> None:
        """Close the connection at once, whatever was to be sent."""
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Note when the head of a request begins."""
        if self._head_since is None and not self._answering:
            self._head_since = monotonic()
        super().data_received(data)
        if self._answering:
            self._head_since = None

    def on_response_complete(self) -> None:
        """Wait for the next request, of which a part may be here."""
        self._waiting_since = monotonic()
        super().on_response_complete()
        more = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        self._head_since = self._waiting_since if more and not self._answering else None

    def pause_writing(self) -> None:
        """Note that the client receives too slowly."""
        super().pause_writing()
        self._stuck_since = monotonic()

    def resume_writing(self) -> None:
        """Note that the client receives again."""
        super().resume_writing()
        self._stuck_since = None

    def check_times(self, now: float) -> None:
        """Close the connection if its client is too slow. Is called about once a second.

        Args:
            now: the time on the monotonic clock.
        """
        limits = self._limits
        if self.transport.is_closing() and self._stuck_since is None:
            self._stuck_since = now
        if self._stuck_since is not None and now - self._stuck_since > limits.rest:
            self.drop()
        elif self._answering or self.transport.is_closing():
            return
        elif self._head_since is not None:
            if self.conn.their_state is h11.SEND_BODY:
                if now - self._head_since > limits.rest:
                    self.drop()
            elif now - self._head_since > limits.head:
                self._refuse_head()
        elif self.cycle is None and now - self._waiting_since > limits.head:
            self.drop()

    def _refuse_head(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = format_number(self._limits.head)
            text = f"the head of the request did not arrive within {seconds} s: send it again"
            self._refuse(408, text, "timeout")
        else:
            self.drop()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status, f"the request is not valid HTTP/1.1: {error or msg}", "invalid_http")

    def _refuse(self, status: int, text: str, code: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, text, code=code).body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


def check_times(connections: Iterable[Any]) -> None:
    """Close the connections of clients that are too slow."""
    now = monotonic()
    for connection in list(connections):
        connection.check_times(now)


def _only_vital(app: ASGIApp) -> ASGIApp:
    async def refuse_others(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in VITAL_PATHS:
            await app(scope, receive, send)
            return
        error = ApiError(
            503,
            "all connections of the server are in use: try again later",
            code="too_many_connections",
            headers={"Retry-After": "1", "Connection": "close"},
        )
        await send_error(error, scope, receive, send)

    return refuse_others
