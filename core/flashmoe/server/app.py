"""The HTTP server of one engine: OpenAI's chat completions, models, health, metrics.

mlx-lm's own server generates in its request handler, from a model that it loads itself, and so
cannot answer from our engine; starlette is used instead. Nothing here touches MLX: the event loop
hands requests to the engine's thread and waits for events.

A client that goes away cancels its answer, streamed or not. While nothing else is to be said, a
stream has comments, so that neither client nor proxy gives up on a long prompt.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ..engine import Engine
from ..errors import OutputError
from ..events import End, Event, Progress
from .access import Access, respond
from .metrics import Metrics
from .openai_errors import ApiError
from .openai_request import Call, Served, read_call
from .openai_response import Completion, busy, failure, stopping
from .sse import Stream, disconnected, read_body, sent, with_pauses

log = logging.getLogger("flashmoe")

_CHAT, _MODELS, _HEALTH, _METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        body: bytes of a request.
        requests: that are answered or wait; one more is told to come back.
        seconds: of an answer, its time in the queue included; None: no limit.
        pause: seconds of silence in a stream before a comment.
    """

    body: int = 8 * 10**6
    requests: int = 80
    seconds: float | None = None
    pause: float = 5.0


class Server:
    """The ASGI application.

    Args:
        key, origins: see `flashmoe.server.access.Access`.
    """

    def __init__(
        self,
        engine: Engine,
        served: Served,
        limits: Limits | None = None,
        *,
        key: str | None = None,
        origins: Sequence[str] = (),
    ):
        self.metrics = Metrics()
        self._engine = engine
        self._served = served
        self._limits = limits or Limits()
        self._stopping = asyncio.Event()
        routes = [
            Route(_CHAT, _Endpoint(self._chat), methods=["POST"]),
            Route(_MODELS, self._models),
            Route(_MODELS + "/{name:path}", self._model),
            Route(_HEALTH, self._health),
            Route(_METRICS, self._metrics_text),
        ]
        handlers = {HTTPException: _http_error, ApiError: _api_error}
        self._app = Access(Starlette(routes=routes, exception_handlers=handlers), key, origins)

    def stop(self) -> None:
        """Cut the answers in flight short. On the event loop."""
        self._stopping.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there is nothing to start or to end, and no web socket
        begun, status = time.monotonic(), "disconnected"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            known = (_CHAT, _MODELS, _HEALTH, _METRICS)
            path = scope["path"] if scope["path"] in known else "other"
            self.metrics.answered(path, status)
            seconds = time.monotonic() - begun
            log.info("%s %s %s %.2f s", scope["method"], path, status, seconds)

    # What is asked for.

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._served.card()]})

    async def _model(self, request: Request) -> Response:
        self._served.check(request.path_params["name"])
        return JSONResponse(self._served.card())

    async def _health(self, request: Request) -> Response:
        if self._stopping.is_set() or self._engine.closed:
            raise stopping()
        # An expert that could not be read drops the model; the next request loads it again.
        state = "ready" if self._engine.loaded else "not loaded"
        return JSONResponse({"status": "ok", "model": state})

    async def _metrics_text(self, request: Request) -> Response:
        text = self.metrics.text(self._engine)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = Stream(send)
        try:
            with self._counted():
                body = await read_body(Request(scope, receive), self._limits.body)
                call = await asyncio.to_thread(read_call, body, self._served)
                del body
                answer = self._streamed(call, stream) if call.stream else self._whole(call)
                response = await self._unless_over(receive, answer)
                if response is not None:
                    await sent(response(scope, receive, send))
        except ClientDisconnect:
            self.metrics.add("disconnects")
        except Exception as e:
            error = failure(e)
            if stream.begun:
                self.metrics.add("stream_errors")
                await stream.fail(error)
            else:
                await respond(error, scope, receive, send)

    async def _whole(self, call: Call) -> Response:
        completion = self._completion(call)
        async with aclosing(self._events(call)) as events:
            async for event in events:
                _say(completion, event)
        return Response(json.dumps(completion.whole()), media_type="application/json")

    async def _streamed(self, call: Call, stream: Stream) -> None:
        completion, words = self._completion(call), "waiting"
        events = with_pauses(self._events(call), lambda: stream.silence(self._limits.pause))
        async with aclosing(events):
            async for event in events:
                if event is None:
                    await stream.comment(words)
                elif isinstance(event, Progress):
                    words = f"reading {event.done} of {event.total}"
                    words += f", layer {event.layer} of {event.layers}"
                else:
                    for chunk in _say(completion, event):
                        await stream.data(chunk)
        await stream.end()

    async def _events(self, call: Call) -> AsyncIterator[Event | OutputError]:
        """Those of the engine; an answer that is not what was asked for ends with its error."""
        begun, end = time.monotonic(), None
        answer = self._engine.astream(call.request, timeout=self._limits.seconds)
        async with aclosing(answer) as events:
            try:
                async for event in events:
                    end = event if isinstance(event, End) else None
                    yield event
            except OutputError as e:
                end = e.end
                yield e
        if end is not None:
            self.metrics.ended(end, time.monotonic() - begun)

    def _completion(self, call: Call) -> Completion:
        return Completion(
            f"chatcmpl-{secrets.token_hex(12)}",
            int(time.time()),
            self._served.names[0],
            include_usage=call.include_usage,
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """In here a request is in flight.

        Raises:
            ApiError: there are too many, or the server ends.
        """
        metrics = self.metrics
        if self._stopping.is_set():
            raise stopping()
        if metrics.in_flight >= self._limits.requests:
            raise busy(metrics.in_flight, metrics.answer_seconds())
        metrics.in_flight += 1
        try:
            yield
        finally:
            metrics.in_flight -= 1

    async def _unless_over(self, receive: Receive, work: Coroutine) -> Response | None:
        """What the work gives.

        Raises:
            ClientDisconnect: the client went away, and the work was cancelled.
            ApiError: the same for the server.
        """
        doing, gone, over = tasks = [
            asyncio.ensure_future(c) for c in (work, disconnected(receive), self._stopping.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise ClientDisconnect if gone.done() else stopping()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in (doing, gone):
                if not task.cancelled():
                    task.exception()  # it was raised, or came too late to matter


class _Endpoint:
    """An ASGI application in a route: starlette takes functions for its own kind of endpoint."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _say(completion: Completion, event: Event | OutputError) -> list[dict]:
    if isinstance(event, OutputError):
        return completion.fails(event)
    return completion.chunks(event)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:200]
    words = {
        404: f"there is no {path!r} here: there are POST {_CHAT}, GET {_MODELS}, {_HEALTH} and "
        f"{_METRICS}",
        405: f"{request.method} is not for {path!r}",
    }
    text = words.get(error.status_code, error.detail)
    return await _api_error(request, ApiError(error.status_code, text, headers=error.headers))


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)
