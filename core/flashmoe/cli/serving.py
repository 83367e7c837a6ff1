"""Open a server for the names that a user typed, as `serve` and `launch` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog
from ..checkpoint.capabilities import capabilities
from ..errors import SettingError
from ..options import EngineOptions
from ..requests import Request

if TYPE_CHECKING:
    import socket

    from ..server.run import UvicornServer
    from ..server.served_model import ServedModel


@dataclass(frozen=True)
class ServerSettings:
    """How a server is reached, and what it accepts.

    Attributes:
        host, port: where it listens; port 0: a free one.
        key: the API key; None: none is needed.
        origins: web pages that may use it.
        queue: requests that may wait.
        seconds: maximum time of an answer; None: no limit.
        body_nbytes: maximum size of a request.
        store: responses that are kept for clients of the Responses API.
        ollama: whether Ollama's API is served, too.
    """

    host: str = "127.0.0.1"
    port: int = 0
    key: str | None = None
    origins: tuple[str, ...] = ()
    queue: int = 64
    seconds: float | None = None
    body_nbytes: int = 8 * 10**6
    store: int = 0
    ollama: bool = False


def one_checkpoint(names: Sequence[str]) -> tuple[Path, list[catalog.Model]]:
    """Return the checkpoint that all names stand for, and what the catalogue knows of each.

    Raises:
        SettingError: the names stand for different checkpoints.
        CheckpointError: a name is unknown, or not on this disk.
    """
    paths = {name: catalog.find(name) for name in names}
    first, *others = paths
    for other in others:
        if paths[other].resolve() != paths[first].resolve():
            raise SettingError(
                f"{first} and {other} are different checkpoints, and a server has the experts of "
                "one in memory: start another server for it, with another --port"
            )
    known = {model.name: model for model in map(catalog.model, paths)}
    return paths[first], list(known.values())


def shared_experts(options: EngineOptions, models: Sequence[catalog.Model]) -> EngineOptions:
    """Return the options with the largest K of the models, unless --experts was given."""
    wanted = [model.experts for model in models]
    if options.experts is not None or None in wanted:
        return options
    return replace(options, experts=max(k for k in wanted if k is not None))


def served_models(
    path: Path, models: Sequence[catalog.Model], names: Sequence[str], options: EngineOptions
) -> list[ServedModel]:
    """Return the models as clients see them.

    Args:
        names: what the user typed, which are names, too.
        options: a K there is that of all models.
    """
    from ..server.served_model import ServedModel  # late: starlette

    can, now = capabilities(path), int(time.time())
    typed = {name: catalog.model(name).name for name in names}
    return [
        ServedModel(
            names=tuple(
                dict.fromkeys(
                    (model.name, *model.aliases, *(n for n in names if typed[n] == model.name))
                )
            ),
            context=can.context,
            thinks=can.reasoning,
            created=now,
            experts=model.experts if options.experts is None else None,
            tools=can.tools,
            path=path,
        )
        for model in models
    ]


@contextmanager
def opened(
    path: Path,
    served: Sequence[ServedModel],
    options: EngineOptions,
    settings: ServerSettings,
    ready: Callable[[str], None],
) -> Iterator[tuple[UvicornServer, socket.socket]]:
    """Yield a server that is ready to `run` with a socket; its model is in memory.

    Args:
        options: of the engine.
        ready: called with the URL of the API once connections are accepted.
    """
    from ..engine import Engine
    from ..server import run as serving  # late: starlette and uvicorn
    from ..server.answering import Limits
    from ..server.app import Server

    with (
        serving.bind_socket(settings.host, settings.port) as bound,
        Engine(path, options) as engine,
    ):
        # Load the model and compile its kernels now, so that the first client does not wait.
        hello = [{"role": "user", "content": "Hello"}]
        for _ in engine.stream(Request(hello, max_tokens=3, cache=False)):
            pass
        from ..generation.batch import DEFAULT_BATCH  # late: MLX, which is loaded now

        requests = (options.batch or DEFAULT_BATCH) + settings.queue
        server = Server(
            engine,
            served,
            Limits(settings.body_nbytes, requests, settings.seconds),
            store=settings.store,
            ollama=settings.ollama,
            key=settings.key,
            origins=settings.origins,
        )
        url = serving.api_url(settings.host, bound)
        yield serving.make_uvicorn(server, lambda: ready(url)), bound
