"""`flashmoe launch`: a coding agent with a model of its own server."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import click

from ..errors import SettingError
from ..options import EngineOptions
from ..shutdown import exit_at_once
from .agents import AGENTS, Agent, Endpoint
from .options import engine_options
from .serving import ServerSettings, one_checkpoint, opened, served_models, shared_experts

#: Tokens of context that agents need for their first prompt and some work.
_ENOUGH = 32_000


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("agent", type=click.Choice(sorted(AGENTS)))
@click.argument("model")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@engine_options("memory", "slots", "context", "experts", "batch", "io", "activations")
def launch(agent: str, model: str, arguments: tuple[str, ...], options: EngineOptions) -> None:
    """Start a coding agent with a model, and end both together.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint. It is served at a
    free port of this machine, with a key that only the agent gets. ARGUMENTS after -- are the
    agent's own. The agent must be installed.
    """
    chosen = AGENTS[agent]
    program = shutil.which(chosen.program)
    if program is None:
        raise SettingError(
            f"{chosen.program} is not installed: run `{chosen.install}`, or start `flashmoe serve` "
            "and configure another client (docs/clients.md)"
        )
    path, known = one_checkpoint([model])
    served = served_models(path, known, [model], options)
    if served[0].context < _ENOUGH:
        click.echo(
            f"Warning: {served[0].name} has a context of {served[0].context} tokens, and the first "
            f"prompt of an agent alone may have {_ENOUGH // 1000},000.",
            err=True,
        )
    directory = Path(tempfile.mkdtemp(prefix="flashmoe-launch-"))
    # The agent owns the terminal from now on.
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=directory / "server.log")
    settings = ServerSettings(key=secrets.token_hex(16))
    status = 1
    urls: list[str] = []
    started = threading.Event()

    def ready(url: str) -> None:
        urls.append(url)
        started.set()

    click.echo(
        f"Loading {served[0].name}. The server's log is {directory / 'server.log'}", err=True
    )
    options = shared_experts(options, known)
    with opened(path, served, options, settings, ready) as (uvicorn, bound):

        def run_server() -> None:
            try:
                uvicorn.run([bound])
            finally:
                started.set()

        thread = threading.Thread(target=run_server, name="flashmoe-server")
        thread.start()
        try:
            started.wait()
            if not urls:
                raise SettingError(f"the server did not start: see {directory / 'server.log'}")
            assert settings.key is not None, "it was made above"
            endpoint = Endpoint(urls[0], settings.key, served[0].name, served[0].context, directory)
            status = run_agent(chosen, program, endpoint, arguments)
        finally:
            uvicorn.should_exit = True
            thread.join()
    exit_at_once(status)


def run_agent(agent: Agent, program: str, endpoint: Endpoint, arguments: tuple[str, ...]) -> int:
    """Run an agent to its end, and return its exit status.

    Ctrl-C is the agent's. SIGTERM ends it, and then this process.
    """
    first, environ = agent.configure(endpoint)
    with subprocess.Popen([program, *first, *arguments], env=os.environ | environ) as process:
        # A handler, and not SIG_IGN, which the agent would inherit.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        status = process.wait()
    return 128 - status if status < 0 else status
