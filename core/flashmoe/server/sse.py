"""What goes over a connection of the server: bodies in, events out, and clients that are slow or
gone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from .openai_errors import ApiError

#: Seconds that a client may take to send its request, and to take what is sent to it.
BODY_SECONDS, SEND_SECONDS = 30.0, 60.0


class Stream:
    """Server-sent events. Nothing is sent before there is something to say, so that an error until
    then has its own status."""

    def __init__(self, send: Send):
        self.begun = False
        self._send = send
        self._last = time.monotonic()

    def silence(self, pause: float) -> float:
        """Seconds until nothing has been said for so long."""
        return max(0.0, self._last + pause - time.monotonic())

    async def data(self, content: dict) -> None:
        # In ASCII: some clients split lines at characters that are none to JSON.
        await self._write(f"data: {json.dumps(content, separators=(',', ':'))}\n\n")

    async def comment(self, words: str) -> None:
        await self._write(f": {words}\n\n")

    async def end(self) -> None:
        await self._write("data: [DONE]\n\n", more=False)

    async def fail(self, error: ApiError) -> None:
        """End with an error. A client that does not take it is gone."""
        try:
            await self.data(error.body())
            await self._write("", more=False)
        except ClientDisconnect:
            pass

    async def _write(self, text: str, more: bool = True) -> None:
        self._last = time.monotonic()
        if not self.begun:
            self.begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await sent(self._send(start))
        body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
        await sent(self._send(body))


async def read_body(request: Request, most: int) -> bytes:
    """The JSON text of a request.

    Raises:
        ApiError: 408, 413 or 415.
        ClientDisconnect
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != (
        "identity"
    ):
        raise ApiError(
            415, "send the body as it is, with Content-Type: application/json", code="not_json"
        )
    found = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            # The rest of what is too large is taken and dropped: a client that is still sending
            # would not see the answer.
            if len(found) <= most:
                found.extend(piece)

    in_time = await _within(BODY_SECONDS, read())
    if len(found) > most:
        raise ApiError(
            413,
            f"the body is larger than {most} bytes: shorten it, or start the server with a larger "
            "--max-body",
            code="body_too_large",
        )
    if not in_time:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s", code="timeout")
    return bytes(found)


async def with_pauses(events: AsyncIterator, seconds) -> AsyncIterator:
    """The events, and None whenever the next one takes longer than `seconds()`."""
    coming = None
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


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def sent(sending: Coroutine) -> None:
    """Waits until the client has taken it.

    Raises:
        ClientDisconnect: it was not taken in time.
    """
    if not await _within(SEND_SECONDS, sending):
        raise ClientDisconnect


async def _within(seconds: float, work: Coroutine) -> bool:
    """Whether it was done in time. Not `asyncio.wait_for`, which before Python 3.12 forgets that it
    was cancelled when the work is done at that moment."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
