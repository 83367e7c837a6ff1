"""Answers the calls of all APIs: what they share from the first byte of a request to the last.

A request takes its place among those in flight, is read by its API, goes to the engine, and its
events become a response, whole or streamed. A client that disconnects cancels its answer, streamed
or not. While there is nothing else to send, a stream carries comments, so that neither client nor
proxy gives up during a long prefill.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .. import requests
from ..engine import Engine
from ..errors import OutputError
from ..events import End, Event, Progress
from .access import send_error
from .api import Answer, Api, Call
from .merging import merged
from .metrics import Metrics
from .openai_response import queue_full, shutting_down, to_api_error
from .served_model import ServedModels
from .streams import (
    BodyMemory,
    EventStream,
    read_body,
    send_in_time,
    wait_for_disconnect,
    with_pauses,
)

#: Bodies of the maximum size that are received at the same time, and threads that read requests.
_BODIES, _READERS = 8, 32
#: Bytes from which bodies are read one after the other: no other thread runs while one is parsed.
_LARGE = 10**6

_T = TypeVar("_T")


@dataclass(frozen=True)
class Limits:
    """What a server accepts from its clients.

    Attributes:
        body: maximum size of a request in bytes.
        requests: maximum number of requests that are answered or wait. Another one gets the status
            429 and is told when to try again.
        seconds: maximum time of an answer, including its time in the queue; None: no limit.
        pause: seconds of silence in a stream before a comment is sent.
    """

    body: int = 8 * 10**6
    requests: int = 80
    seconds: float | None = None
    pause: float = 5.0


class Answering:
    """Answers calls with one engine.

    Args:
        engine: the engine that answers.
        models: the names under which it is served.
        limits: what is accepted.

    Attributes:
        metrics: counts what is answered.
        stopping: is set when the server shuts down.
    """

    def __init__(self, engine: Engine, models: ServedModels, limits: Limits):
        self.metrics = Metrics()
        self.stopping = asyncio.Event()
        self._engine = engine
        self._models = models
        self._limits = limits
        self._bodies = BodyMemory(_BODIES * limits.body)
        # Most of these threads wait for a helper process that checks a schema.
        self._readers = ThreadPoolExecutor(_READERS, "flashmoe-request")
        self._large_reader = ThreadPoolExecutor(1, "flashmoe-large-request")

    async def answer(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call of an API, as an ASGI application."""
        stream = EventStream(send, api.wire)
        answer: Answer | None = None
        try:
            with ExitStack() as place:
                call = await self._read(Request(scope, receive), api.read, place)
                answer = call.answer
                work = self._stream(call, stream) if call.stream else self._complete(call)
                response = await self._run_while_connected(receive, work)
                if response is not None:
                    await send_in_time(response(scope, receive, send))
        except ClientDisconnect:
            self.metrics.count("disconnects")
        except Exception as e:
            error = api.translated(to_api_error(e))
            if answer is not None and stream.started:
                self.metrics.count("stream_errors")
                await stream.fail(answer.failure_chunks(error))
            else:
                await send_error(error, scope, receive, send)

    async def compute(
        self,
        read: Callable[[bytes, ServedModels], dict],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer a request whose response is made without the engine, as an ASGI application.

        Args:
            read: turns the body into the JSON of the response.
        """
        try:
            with ExitStack() as place:
                content = await self._read(Request(scope, receive), read, place)
            await send_in_time(JSONResponse(content)(scope, receive, send))
        except ClientDisconnect:
            self.metrics.count("disconnects")
        except Exception as e:
            await send_error(to_api_error(e), scope, receive, send)

    async def _read(
        self, request: Request, read: Callable[[bytes, ServedModels], _T], place: ExitStack
    ) -> _T:
        """Return what `read` makes of the body of a request, on a thread.

        The request takes its place among those in flight when it has arrived: a client that sends
        slowly does not keep others waiting.

        Args:
            place: gives the place back when it is closed.

        Raises:
            ApiError: the body is refused, too many requests are in flight, or the server is
                shutting down.
            ClientDisconnect: the client disconnected.
        """
        self._check_room()
        with self._bodies.share() as take:
            body = await read_body(request, self._limits.body, take)
            place.enter_context(self._in_flight())
            readers = self._readers if len(body) < _LARGE else self._large_reader
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(readers, read, body, self._models)

    async def _complete(self, call: Call) -> Response:
        async with aclosing(self._events(call)) as events:
            async for index, event in events:
                _chunks(call.answer, event, index)
        return Response(json.dumps(call.answer.to_dict()), media_type="application/json")

    async def _stream(self, call: Call, stream: EventStream) -> None:
        answer, comment = call.answer, "waiting"
        events = with_pauses(self._events(call), lambda: stream.time_to_comment(self._limits.pause))
        async with aclosing(events):
            async for item in events:
                if not stream.started:
                    await stream.chunks(answer.first_chunks())
                if item is None:
                    await stream.pause(answer.pause_chunks(), comment)
                    continue
                index, event = item
                if isinstance(event, Progress):
                    comment = f"reading {event.done} of {event.total}"
                    comment += f", layer {event.layer} of {event.layers}"
                else:
                    await stream.chunks(_chunks(answer, event, index))
        await stream.end(answer.last_chunks())

    async def _events(self, call: Call) -> AsyncGenerator[tuple[int, Event | OutputError], None]:
        """Yield the engine's events, each with the number of its request."""
        async with aclosing(merged([self._events_of(r) for r in call.requests])) as events:
            async for item in events:
                yield item

    async def _events_of(
        self, request: requests.Request
    ) -> AsyncGenerator[Event | OutputError, None]:
        """Yield the engine's events. An OutputError is yielded as the last one, not raised."""
        start = time.monotonic()
        end: End | None = None
        answer = self._engine.astream(request, timeout=self._limits.seconds)
        async with aclosing(answer) as events:
            try:
                async for event in events:
                    end = event if isinstance(event, End) else None
                    if not isinstance(event, Progress | End):
                        self.metrics.count("pieces")
                    yield event
            except OutputError as e:
                end = e.end
                yield e
        if end is not None:
            self.metrics.count_answer(end, time.monotonic() - start)

    def _check_room(self) -> None:
        """Refuse a request that cannot be answered now.

        Raises:
            ApiError: too many requests are in flight, or the server is shutting down.
        """
        metrics = self.metrics
        if self.stopping.is_set():
            raise shutting_down()
        if metrics.in_flight >= self._limits.requests:
            raise queue_full(metrics.in_flight, metrics.mean_answer_seconds())

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        """Count a request as in flight while the context lasts.

        Raises:
            ApiError: see `_check_room`.
        """
        self._check_room()
        self.metrics.in_flight += 1
        try:
            yield
        finally:
            self.metrics.in_flight -= 1

    async def _run_while_connected(
        self, receive: Receive, work: Coroutine[None, None, Response | None]
    ) -> Response | None:
        """Return the result of `work`.

        Raises:
            ClientDisconnect: the client disconnected, and the work was cancelled.
            ApiError: the server is shutting down, and the work was cancelled.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(wait_for_disconnect(receive))
        tasks = [working, gone, asyncio.ensure_future(self.stopping.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientDisconnect if gone.done() else shutting_down()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks[:2]:
                if not task.cancelled():
                    # Marks the exception as seen: it was raised above, or came too late to matter.
                    task.exception()


def _chunks(answer: Answer, event: Event | OutputError, index: int) -> list[dict]:
    if isinstance(event, OutputError):
        return answer.error_chunks(event, index)
    return answer.chunks(event, index)
