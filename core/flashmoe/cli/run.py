"""`flashmoe run`: the answer to one prompt."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from .. import catalog
from ..events import End, Progress, Reasoning, Text
from ..options import EngineOptions
from ..requests import Request
from ..sizes import format_size
from ..terminal import ProgressLine, format_number, format_seconds
from .cluster import leads
from .options import engine_options, with_preset


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-tokens", metavar="N", type=int, help="End the answer after N tokens.")
@click.option(
    "--temperature",
    metavar="T",
    type=float,
    show_default="as the checkpoint recommends",
    help="Set the sampling temperature. 0 takes the likeliest token each time.",
)
@click.option("--seed", metavar="N", type=int, help="Make sampling repeatable.")
@click.option(
    "--think/--no-think",
    default=None,
    show_default="as the chat template does",
    help="Reason before the answer, or answer at once.",
)
@engine_options("memory", "slots", "context", "experts", "depth", "io", "activations", "cluster")
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and statistics.")
def run(
    model: str, prompt: str | None, options: EngineOptions, verbose: bool, **settings: Any
) -> None:
    """Generate the answer to a prompt.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint. Without PROMPT, the
    prompt is read from standard input. Reasoning goes to standard error.
    """
    from ..engine import Engine  # late: asyncio

    path = catalog.find(model)
    options = with_preset(options, catalog.model(model))
    if not leads(path, options):
        return
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    content = _standard_input() if prompt is None else prompt
    request = Request(messages=[{"role": "user", "content": content}], **settings)
    with Engine(path, options) as engine, ProgressLine() as line:
        for event in engine.stream(request):
            if isinstance(event, Progress):
                line.show(event)
                continue
            line.close()
            if isinstance(event, Text):
                click.echo(event.text, nl=False)
            elif isinstance(event, Reasoning):
                click.echo(click.style(event.text, dim=True), nl=False, err=True)
            elif verbose and isinstance(event, End):
                click.echo("\n" + describe(event), err=True, nl=False)
        click.echo()


def describe(end: End) -> str:
    """Return the statistics of an answer, in one line."""
    return (
        f"{end.prompt_tokens} prompt tokens ({end.cached_tokens} cached) in "
        f"{format_seconds(end.prompt_seconds)}; "
        f"{end.generated_tokens} generated at {format_number(end.tokens_per_second)} tokens/s; "
        f"K={end.experts} of {end.trained_experts}, {format_number(end.bits)} bits, "
        f"{end.activations} activations, {end.ops} ops; "
        f"hit rate {end.hit_rate:.1%}, {format_size(end.bytes_read)} read, waited "
        f"{format_seconds(end.wait_seconds)} for the disk; peak {format_size(end.peak_nbytes)}"
    )


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as e:
        raise click.ClickException(f"the prompt on standard input is not text: {e}") from e
