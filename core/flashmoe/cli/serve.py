"""`flashmoe serve`: a model for clients of OpenAI's API."""

from __future__ import annotations

import logging
import sys
import time

import click

from .. import catalog
from ..checkpoint.capabilities import capabilities
from ..errors import SettingError
from ..memory.budget import parse_size
from ..ops.activations import ACTIVATIONS
from ..requests import Request
from ..streaming.io_modes import IO_MODES
from .options import cluster_option, leads


@click.command()
@click.argument("name", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="FLASHMOE_API_KEY",
    help="What clients must show. Required when --host lets other machines in. Better set as "
    "FLASHMOE_API_KEY: others on this machine see command lines.",
)
@click.option("--allow-origin", "origins", multiple=True, help="Let this web page in; repeatable.")
@click.option("--memory", metavar="SIZE", help='Peak memory of the process, such as "8GB".')
@click.option("--slots", type=int, help="Experts kept in each layer, instead of --memory.")
@click.option("--experts", type=int, help="Prune the router to its top K experts.")
@click.option("--batch", type=int, help="Answers computed together at most. Default: 16.")
@click.option("--queue", default=64, show_default=True, help="Requests that may wait beside them.")
@click.option("--timeout", type=float, help="Seconds for an answer. Default: no limit.")
@click.option("--max-body", default="8MB", show_default=True, help="Bytes of a request at most.")
@click.option("--depth", type=int, help="Reads in flight. Default: as `bench disk` found, or 8.")
@click.option("--io", type=click.Choice(IO_MODES), help="How experts are read. Default: the same.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="float32",
    help="int8: faster on a CPU, not exact.",
)
@cluster_option
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and each request.")
def serve(
    name,
    host,
    port,
    api_key,
    origins,
    experts,
    batch,
    queue,
    timeout,
    max_body,
    cluster,
    verbose,
    **settings,
):
    """Serve MODEL to clients of OpenAI's API, on this machine unless told otherwise.

    MODEL is a name, or the directory of an MLX checkpoint.
    """
    from ..engine import Engine
    from ..server import run as serving  # late: starlette and uvicorn
    from ..server.access import check_key
    from ..server.app import Limits, Server
    from ..server.openai_request import Served

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    check_key(host, api_key)
    if queue < 0:
        raise SettingError(f"queue={queue} must be 0 or more: it is a number of requests")
    if timeout is not None and not timeout > 0:
        raise SettingError(f"timeout={timeout:g} must be above 0: it is a number of seconds")
    nbytes = parse_size(max_body)
    model, path = catalog.model(name), catalog.find(name)
    here = [settings[option] for option in ("memory", "slots", "depth", "io")]
    if not leads(path, cluster, *here):
        return
    can = capabilities(path)
    with (
        serving.bind(host, port) as bound,
        Engine(
            path,
            batch=batch,
            experts=model.experts if experts is None else experts,
            cluster=cluster,
            **settings,
        ) as engine,
    ):
        # The first client waits for nothing: the model is loaded, its kernels are compiled.
        hello = [{"role": "user", "content": "Hello"}]
        for _ in engine.stream(Request(hello, max_tokens=3, cache=False)):
            pass
        from ..generation.batch import DEFAULT_ROWS  # late: MLX, which is loaded now

        names = tuple(dict.fromkeys((model.name, *model.aliases, name)))
        served = Served(names, can.context, can.thoughts, int(time.time()))
        limits = Limits(nbytes, (batch or DEFAULT_ROWS) + queue, timeout)
        server = Server(engine, served, limits, key=api_key, origins=origins)
        url = serving.url(host, bound)

        def ready() -> None:
            click.echo(f"{model.name} is served at {url}")

        serving.prepare(server, ready).run([bound])
