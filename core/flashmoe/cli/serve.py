"""`flashmoe serve`: a model for clients of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import logging
import sys

import click

from ..errors import SettingError
from ..options import EngineOptions
from ..shutdown import exit_at_once
from ..sizes import parse_size
from .cluster import leads
from .options import engine_options
from .serving import ServerSettings, one_checkpoint, opened, served_models, shared_experts

#: Where Ollama listens.
OLLAMA_PORT = 11434


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen at this address.")
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    show_default="8080, or 11434 with --ollama",
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
@engine_options(
    "memory", "slots", "context", "experts", "batch", "depth", "io", "activations", "cluster"
)
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
@click.option(
    "--store",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Keep the last N responses of the Responses API in memory, to be continued by their id.",
)
@click.option(
    "--ollama", is_flag=True, help="Serve Ollama's API, too, for programs that know only that."
)
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and each request.")
def serve(
    models: tuple[str, ...],
    options: EngineOptions,
    host: str,
    port: int | None,
    api_key: str | None,
    origins: tuple[str, ...],
    queue: int,
    timeout: float | None,
    max_tokens: int | None,
    max_body: str,
    store: int,
    ollama: bool,
    verbose: bool,
) -> None:
    """Serve a model over the APIs of OpenAI and Anthropic.

    There is a page to chat, too. MODEL is a name (see `flashmoe list`) or the directory of an MLX
    checkpoint. Several names of one checkpoint share its memory and differ in the experts per
    token. Only programs on this machine can connect, unless --host says otherwise.
    """
    from ..server.access import check_key  # late: starlette

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    check_key(host, api_key)
    if queue < 0:
        raise SettingError(f"queue={queue} must be 0 or more: it is a number of requests")
    if timeout is not None and not timeout > 0:
        raise SettingError(f"timeout={timeout} must be above 0: it is a number of seconds")
    settings = ServerSettings(
        host=host,
        port=(OLLAMA_PORT if ollama else 8080) if port is None else port,
        key=api_key,
        origins=origins,
        queue=queue,
        seconds=timeout,
        body_nbytes=parse_size(max_body),
        store=store,
        ollama=ollama,
    )
    path, known = one_checkpoint(models)
    served = served_models(path, known, models, options)
    options = shared_experts(options, known)
    if not leads(path, options):
        return
    names = " and ".join(model.name for model in served)

    def ready(url: str) -> None:
        click.echo(f"{names} {'is' if len(served) == 1 else 'are'} served at {url}")

    with opened(path, served, options, settings, ready) as (uvicorn, bound):
        uvicorn.run([bound])
    if uvicorn.signalled:
        exit_at_once(0)
