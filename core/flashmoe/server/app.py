"""The ASGI application of the server: chat completions, models, health and metrics of one engine.

mlx-lm's server cannot be used: it generates inside its request handler, from a model that it loads
itself, so it cannot answer from our engine. This one is built on starlette. Nothing here touches
MLX: the event loop hands requests to the engine's thread and waits for events.

A client that disconnects cancels its answer, streamed or not. While there is nothing else to send,
a stream carries comments, so that neither client nor proxy gives up during a long prefill.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine
from ..errors import OutputError
from ..events import End, Event, Progress
from .access import AccessMiddleware, send_error
from .metrics import Metrics
from .openai_errors import ApiError
from .openai_request import ChatCompletionCall, read_call
from .openai_response import ChatCompletion, queue_full, shutting_down, to_api_error
from .served_model import ServedModel
from .sse import BodyMemory, SseStream, read_body, send_in_time, wait_for_disconnect, with_pauses

log = logging.getLogger("flashmoe")

#: Bodies of the maximum size that are received at the same time, and threads that read requests.
_BODIES, _READERS = 8, 32
#: Bytes from which bodies are read one after the other: no other thread runs while one is parsed.
_LARGE = 10**6
_CHAT, _MODELS, _HEALTH, _METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"


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


class Server:
    """The ASGI application that serves one engine.

    Args:
        engine: the engine that answers.
        model: the model as clients see it.
        limits: None: the defaults.
        key, origins: see `flashmoe.server.access.AccessMiddleware`.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        limits: Limits | None = None,
        *,
        key: str | None = None,
        origins: Sequence[str] = (),
    ):
        self.metrics = Metrics()
        self._engine = engine
        self._model = model
        self._limits = limits or Limits()
        self._stopping = asyncio.Event()
        self._bodies = BodyMemory(_BODIES * self._limits.body)
        # Most of these threads wait for a helper process that checks a schema.
        self._readers = ThreadPoolExecutor(_READERS, "flashmoe-request")
        self._large_reader = ThreadPoolExecutor(1, "flashmoe-large-request")
        routes = [
            Route(_CHAT, _Endpoint(self._chat), methods=["POST"]),
            Route(_MODELS, self._list_models),
            Route(_MODELS + "/{name:path}", self._get_model),
            Route(_HEALTH, self._health),
            Route(_METRICS, self._metrics_text),
        ]
        # starlette's types of handlers know no subclasses of Exception, hence the plain dict type.
        handlers: dict = {HTTPException: _http_error, ApiError: _api_error}
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        self._app = AccessMiddleware(starlette, key, origins)

    def stop(self) -> None:
        """End the answers in flight with an error. Must be called on the event loop."""
        self._stopping.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan events are needed, and there are no web sockets
        start = time.monotonic()
        status: int | str = "disconnected"

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            known = (_CHAT, _MODELS, _HEALTH, _METRICS)
            path = scope["path"] if scope["path"] in known else "other"
            self.metrics.count_request(path, status)
            seconds = time.monotonic() - start
            log.info("%s %s %s %.2f s", scope["method"], path, status, seconds)

    # Endpoints.

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model.model_object()]})

    async def _get_model(self, request: Request) -> Response:
        self._model.check_name(request.path_params["name"])
        return JSONResponse(self._model.model_object())

    async def _health(self, request: Request) -> Response:
        if self._stopping.is_set() or self._engine.closed:
            raise shutting_down()
        # An expert that could not be read drops the model; the next request loads it again.
        state = "ready" if self._engine.loaded else "not loaded"
        return JSONResponse({"status": "ok", "model": state})

    async def _metrics_text(self, request: Request) -> Response:
        text = self.metrics.prometheus_text(self._engine)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = SseStream(send)
        try:
            with ExitStack() as place:
                call = await self._read(Request(scope, receive), place)
                answer = self._stream(call, stream) if call.stream else self._complete(call)
                response = await self._run_while_connected(receive, answer)
                if response is not None:
                    await send_in_time(response(scope, receive, send))
        except ClientDisconnect:
            self.metrics.count("disconnects")
        except Exception as e:
            error = to_api_error(e)
            if stream.started:
                self.metrics.count("stream_errors")
                await stream.fail(error)
            else:
                await send_error(error, scope, receive, send)

    async def _read(self, request: Request, place: ExitStack) -> ChatCompletionCall:
        """Return what a request asks for.

        It takes its place among those in flight when it has arrived: a client that sends slowly
        does not keep others waiting.
        """
        self._check_room()
        with self._bodies.share() as take:
            body = await read_body(request, self._limits.body, take)
            place.enter_context(self._in_flight())
            readers = self._readers if len(body) < _LARGE else self._large_reader
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(readers, read_call, body, self._model)

    async def _complete(self, call: ChatCompletionCall) -> Response:
        completion = self._new_completion(call)
        async with aclosing(self._events(call)) as events:
            async for event in events:
                _chunks(completion, event)
        return Response(json.dumps(completion.to_dict()), media_type="application/json")

    async def _stream(self, call: ChatCompletionCall, stream: SseStream) -> None:
        completion, comment = self._new_completion(call), "waiting"
        events = with_pauses(self._events(call), lambda: stream.time_to_comment(self._limits.pause))
        async with aclosing(events):
            async for event in events:
                if event is None:
                    await stream.comment(comment)
                elif isinstance(event, Progress):
                    comment = f"reading {event.done} of {event.total}"
                    comment += f", layer {event.layer} of {event.layers}"
                else:
                    for chunk in _chunks(completion, event):
                        await stream.data(chunk)
        await stream.end()

    async def _events(self, call: ChatCompletionCall) -> AsyncGenerator[Event | OutputError, None]:
        """Yield the engine's events. An OutputError is yielded as the last one, not raised."""
        start = time.monotonic()
        end: End | None = None
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
            self.metrics.count_answer(end, time.monotonic() - start)

    def _new_completion(self, call: ChatCompletionCall) -> ChatCompletion:
        return ChatCompletion(
            f"chatcmpl-{secrets.token_hex(12)}",
            int(time.time()),
            self._model.names[0],
            include_usage=call.include_usage,
        )

    def _check_room(self) -> None:
        """Refuse a request that cannot be answered now.

        Raises:
            ApiError: too many requests are in flight, or the server is shutting down.
        """
        metrics = self.metrics
        if self._stopping.is_set():
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
        tasks = [working, gone, asyncio.ensure_future(self._stopping.wait())]
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


class _Endpoint:
    """An ASGI application as the endpoint of a route.

    starlette would take a plain function for an endpoint of its own kind, request to response.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _chunks(completion: ChatCompletion, event: Event | OutputError) -> list[dict]:
    if isinstance(event, OutputError):
        return completion.error_chunks(event)
    return completion.chunks(event)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:200]
    texts = {
        404: f"there is no {path!r} here: use POST {_CHAT}, GET {_MODELS}, {_HEALTH} or {_METRICS}",
        405: f"{path!r} does not accept {request.method}: use POST for {_CHAT} and GET for the "
        "others",
    }
    text = texts.get(error.status_code, error.detail)
    return await _api_error(request, ApiError(error.status_code, text, headers=error.headers))


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)
