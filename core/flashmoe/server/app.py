"""The ASGI application of the server: the APIs, models, health and metrics of one engine.

mlx-lm's server cannot be used: it generates inside its request handler, from a model that it loads
itself, so it cannot answer from our engine. This one is built on starlette. Nothing here touches
MLX: the event loop hands requests to the engine's thread and waits for events.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine
from .access import AccessMiddleware
from .answering import Answering, Limits
from .chat_completions import CHAT_COMPLETIONS
from .completions import COMPLETIONS
from .messages import MESSAGES, count_tokens
from .model_list import model_list, model_object
from .ollama import ollama_api, show, tags, version_object
from .openai_errors import ApiError, body_for
from .openai_response import shutting_down
from .responses import ResponseStore, responses_api
from .served_model import ServedModel, ServedModels
from .token_counts import tokenize

log = logging.getLogger("flashmoe")

_MODELS, _HEALTH, _METRICS = "/v1/models", "/health", "/metrics"
_PAGE = Path(__file__).with_name("page.html")
#: The page loads nothing, runs only its own script, and talks only to this server.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
_POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Server:
    """The ASGI application that serves one engine.

    Args:
        engine: the engine that answers.
        models: the model as clients see it, or several names of it with a K of their own.
        limits: None: the defaults.
        store: how many responses are kept for clients of the Responses API.
        ollama: serve Ollama's API, too.
        key, origins: see `flashmoe.server.access.AccessMiddleware`.
    """

    def __init__(
        self,
        engine: Engine,
        models: ServedModel | Sequence[ServedModel],
        limits: Limits | None = None,
        *,
        store: int = 0,
        ollama: bool = False,
        key: str | None = None,
        origins: Sequence[str] = (),
    ):
        self._engine = engine
        self._models = ServedModels([models] if isinstance(models, ServedModel) else models)
        self._store = ResponseStore(store)
        self._answering = Answering(engine, self._models, limits or Limits())
        self.metrics = self._answering.metrics
        apis = [CHAT_COMPLETIONS, responses_api(self._store), MESSAGES, COMPLETIONS]
        computed = {"/v1/messages/count_tokens": count_tokens, "/tokenize": tokenize}
        if ollama:
            apis.append(ollama_api(time.time))
            computed["/api/show"] = show
        routes = [
            *(
                Route(api.path, _Endpoint(partial(self._answering.answer, api)), methods=["POST"])
                for api in apis
            ),
            *(
                Route(path, _Endpoint(partial(self._answering.compute, read)), methods=["POST"])
                for path, read in computed.items()
            ),
            Route("/v1/responses/{id}", self._stored_response, methods=["GET", "DELETE"]),
            Route(_MODELS, self._list_models),
            Route(_MODELS + "/{name:path}", self._get_model),
            Route(_HEALTH, self._health),
            Route(_METRICS, self._metrics_text),
            Route("/", self._page),
        ]
        if ollama:
            routes.append(Route("/api/version", self._ollama_version))
            routes.append(Route("/api/tags", self._ollama_tags))
        self._known = {route.path for route in routes}
        # starlette's types of handlers know no subclasses of Exception, hence the plain dict type.
        handlers: dict = {HTTPException: _http_error, ApiError: _api_error}
        starlette = Starlette(routes=routes, exception_handlers=handlers)
        self._app = AccessMiddleware(starlette, key, origins)

    def stop(self) -> None:
        """End the answers in flight with an error. Must be called on the event loop."""
        self._answering.stopping.set()

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
            path = scope["path"] if scope["path"] in self._known else "other"
            self.metrics.count_request(path, status)
            seconds = time.monotonic() - start
            log.info("%s %s %s %.2f s", scope["method"], path, status, seconds)

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse(model_list(self._models))

    async def _get_model(self, request: Request) -> Response:
        return JSONResponse(model_object(self._models.find(request.path_params["name"])))

    async def _stored_response(self, request: Request) -> Response:
        id = request.path_params["id"]
        use = self._store.delete if request.method == "DELETE" else self._store.response
        return JSONResponse(use(id))

    async def _ollama_version(self, request: Request) -> Response:
        return JSONResponse(version_object())

    async def _ollama_tags(self, request: Request) -> Response:
        return JSONResponse(tags(self._models))

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_bytes(), headers={"Content-Security-Policy": _POLICY})

    async def _health(self, request: Request) -> Response:
        if self._answering.stopping.is_set() or self._engine.closed:
            raise shutting_down()
        # An expert that could not be read drops the model; the next request loads it again.
        state = "ready" if self._engine.loaded else "not loaded"
        return JSONResponse({"status": "ok", "model": state})

    async def _metrics_text(self, request: Request) -> Response:
        text = self.metrics.prometheus_text(self._engine)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class _Endpoint:
    """An ASGI application as the endpoint of a route.

    starlette would take a plain function for an endpoint of its own kind, request to response.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:200]
    texts = {
        404: f"there is no {path!r} here: use POST {CHAT_COMPLETIONS.path}, /v1/responses, "
        f"{MESSAGES.path} or /v1/completions, GET {_MODELS}, {_HEALTH} or {_METRICS}",
        405: f"{path!r} does not accept {request.method}: answers are asked for with POST, and the "
        "others with GET",
    }
    text = texts.get(error.status_code, error.detail)
    return await _api_error(request, ApiError(error.status_code, text, headers=error.headers))


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(body_for(request.url.path, error), error.status, error.headers)
