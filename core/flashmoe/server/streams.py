"""Reading request bodies and sending streams, with time limits for slow clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from ..terminal import format_number
from .openai_errors import ApiError
from .wire import Wire

#: Seconds that a client may take to send its request, and to accept each piece of the response.
BODY_SECONDS, SEND_SECONDS = 30.0, 60.0

_T = TypeVar("_T")


class EventStream:
    """A streamed response.

    The response starts with the first chunk or comment, not before, so that an error that occurs
    earlier can still be sent with an HTTP status of its own.

    Attributes:
        started: whether the response has started.
    """

    def __init__(self, send: Send, wire: Wire):
        self.started = False
        self._send = send
        self._wire = wire
        self._last = time.monotonic()

    def time_to_comment(self, pause: float) -> float:
        """Return the seconds until the stream has been silent for `pause` seconds; at least 0."""
        return max(0.0, self._last + pause - time.monotonic())

    async def chunks(self, chunks: Sequence[dict]) -> None:
        """Send some chunks."""
        if chunks:
            await self._write("".join(map(self._wire.chunk, chunks)))

    async def pause(self, chunks: Sequence[dict], comment: str) -> None:
        """Keep the connection alive with chunks that say nothing new, or with a comment."""
        self._last = time.monotonic()
        if chunks:
            await self.chunks(chunks)
        elif self._wire.comment:
            await self._write(self._wire.comment.format(comment))

    async def end(self, chunks: Sequence[dict] = ()) -> None:
        """Send the last chunks and end the response."""
        text = "".join(map(self._wire.chunk, chunks)) + self._wire.end
        await self._write(text, more=False)

    async def fail(self, chunks: Sequence[dict]) -> None:
        """Send the last chunks of a stream that fails, without its usual end.

        A client that does not accept them has disconnected.
        """
        with suppress(ClientDisconnect):
            await self._write("".join(map(self._wire.chunk, chunks)), more=False)

    async def _write(self, text: str, more: bool = True) -> None:
        self._last = time.monotonic()
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", self._wire.media_type.encode()),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await send_in_time(self._send(start))
        body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
        await send_in_time(self._send(body))


class BodyMemory:
    """The memory for bodies of requests that are not read yet.

    Args:
        limit: maximum number of bytes of all these bodies.
    """

    def __init__(self, limit: int):
        self._free = limit

    @contextmanager
    def share(self) -> Iterator[Callable[[int], bool]]:
        """Yield a function that takes bytes for a body. All are given back at the end.

        It returns False if there are not so many.
        """
        taken = 0

        def take(nbytes: int) -> bool:
            nonlocal taken
            if nbytes > self._free:
                return False
            self._free -= nbytes
            taken += nbytes
            return True

        try:
            yield take
        finally:
            self._free += taken


async def read_body(request: Request, limit: int, take: Callable[[int], bool]) -> bytes:
    """Read the JSON text of a request, at most `limit` bytes.

    Args:
        take: is called before each piece is kept, with its number of bytes; it returns False if
            there is no memory for the piece.

    Raises:
        ApiError: 415 if the body is not plain JSON, 413 if it is too large, 503 if there is no
            memory for it, 408 if it does not arrive in time.
        ClientDisconnect: the client disconnected.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity")
    if content_type != "application/json" or encoding != "identity":
        raise ApiError(
            415,
            "send the body uncompressed, with Content-Type: application/json",
            code="not_json",
        )
    body = bytearray()
    refusal: ApiError | None = None
    # h11 has checked that it is a number.
    if int(request.headers.get("content-length", 0)) > limit:
        refusal = _too_large(limit)

    async def read() -> None:
        nonlocal refusal
        async for piece in request.stream():
            # What is refused is read to its end and dropped: a client that is still sending would
            # not see the response.
            if refusal is not None:
                continue
            if len(body) + len(piece) > limit:
                refusal = _too_large(limit)
            elif not take(len(piece)):
                refusal = _no_memory()
            else:
                body.extend(piece)
                continue
            body.clear()

    in_time = await _finishes_within(BODY_SECONDS, read())
    if refusal is not None:
        raise refusal
    if not in_time:
        raise ApiError(
            408,
            f"the body did not arrive within {format_number(BODY_SECONDS)} s: send it again",
            code="timeout",
        )
    return bytes(body)


def _no_memory() -> ApiError:
    return ApiError(
        503,
        "the server is receiving too many large requests: try again",
        code="too_many_bodies",
        headers={"Retry-After": "1"},
    )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes: shorten it, or start the server with a larger "
        "--max-body",
        code="body_too_large",
    )


async def with_pauses(
    events: AsyncGenerator[_T, None], seconds: Callable[[], float]
) -> AsyncGenerator[_T | None, None]:
    """Yield the events, and None whenever the next event takes longer than `seconds()`."""
    coming: asyncio.Future[_T] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            await asyncio.wait([coming], timeout=seconds())
            if not coming.done():
                yield None
                continue
            done, coming = coming, None
            try:
                event = done.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait([coming])
        await events.aclose()


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_in_time(sending: Awaitable[Any]) -> None:
    """Wait until the client has accepted what is being sent.

    Raises:
        ClientDisconnect: the client did not accept it within SEND_SECONDS.
    """
    if not await _finishes_within(SEND_SECONDS, sending):
        raise ClientDisconnect


async def _finishes_within(seconds: float, work: Awaitable[Any]) -> bool:
    """Return whether the work was done in time; if not, it is cancelled.

    `asyncio.wait_for` is not used: before Python 3.12 it loses its own cancellation if the work
    finishes at the same moment.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
