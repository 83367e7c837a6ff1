"""`flashmoe serve`: a model for clients of OpenAI's API."""

from __future__ import annotations

import logging
import sys
import time

import click

from .. import catalog, macos
from ..checkpoint.capabilities import capabilities
from ..errors import SettingError
from ..options import EngineOptions
from ..requests import Request
from ..shutdown import exit_at_once
from ..sizes import parse_size
from .cluster import leads
from .options import engine_options, with_preset


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen at this address.")
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Listen at this port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="FLASHMOE_API_KEY",
    help="Let only clients with this key in. Required when --host lets other machines in. Better "
    "set the variable FLASHMOE_API_KEY: other users of this machine see command lines.",
)
@click.option(
    "--allow-origin",
    "origins",
    metavar="ORIGIN",
    multiple=True,
    help="Let scripts of this web page in; may be repeated.",
)
@engine_options("memory", "slots", "experts", "batch", "depth", "io", "activations", "cluster")
@click.option(
    "--queue",
    metavar="N",
    default=64,
    show_default=True,
    help="Let this many requests wait, and refuse more.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=float,
    show_default="no limit",
    help="End an answer that takes longer, time in the queue included.",
)
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(1),
    show_default="what is left of the context",
    help="Length of an answer whose request has no limit.",
)
@click.option(
    "--max-body",
    metavar="SIZE",
    default="8MB",
    show_default=True,
    help="Refuse larger requests.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and each request.")
def serve(
    model: str,
    options: EngineOptions,
    host: str,
    port: int,
    api_key: str | None,
    origins: tuple[str, ...],
    queue: int,
    timeout: float | None,
    max_tokens: int | None,
    max_body: str,
    verbose: bool,
) -> None:
    """Serve a model over an OpenAI-compatible API.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint. Only programs on
    this machine can connect, unless --host says otherwise.
    """
    from ..engine import Engine
    from ..server import run as serving  # late: starlette and uvicorn
    from ..server.access import check_key
    from ..server.answering import Limits
    from ..server.app import Server
    from ..server.served_model import ServedModel

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    check_key(host, api_key)
    if queue < 0:
        raise SettingError(f"queue={queue} must be 0 or more: it is a number of requests")
    if timeout is not None and not timeout > 0:
        raise SettingError(f"timeout={timeout} must be above 0: it is a number of seconds")
    body_nbytes = parse_size(max_body)
    named, path = catalog.model(model), catalog.find(model)
    options = with_preset(options, named)
    if not leads(path, options):
        return
    can = capabilities(path)
    macos.keep_awake()
    with serving.bind_socket(host, port) as bound, Engine(path, options) as engine:
        # Load the model and compile its kernels now, so that the first client does not wait.
        hello = [{"role": "user", "content": "Hello"}]
        for _ in engine.stream(Request(hello, max_tokens=3, cache=False)):
            pass
        from ..generation.batch import DEFAULT_BATCH  # late: MLX, which is loaded now

        names = tuple(dict.fromkeys((named.name, *named.aliases, model)))
        served = ServedModel(
            names, can.context, can.reasoning, int(time.time()), max_tokens=max_tokens
        )
        limits = Limits(body_nbytes, (options.batch or DEFAULT_BATCH) + queue, timeout)
        server = Server(engine, served, limits, key=api_key, origins=origins)
        url = serving.api_url(host, bound)

        def ready() -> None:
            click.echo(f"{named.name} is served at {url}")

        uvicorn = serving.make_uvicorn(server, ready)
        uvicorn.run([bound])
    if uvicorn.signalled:
        exit_at_once(0)
