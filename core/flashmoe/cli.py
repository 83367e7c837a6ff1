"""The commands, as `flashmoe ...` and as `llm flashmoe ...`."""

from __future__ import annotations

import logging
import sys

import click

from .catalog import find
from .errors import FlashMoEError
from .events import End, Reasoning, Text
from .memory import format_size
from .requests import Request


@click.group()
@click.version_option(package_name="llm-flashmoe")
def cli() -> None:
    """Run Mixture-of-Experts models that are larger than memory."""


@cli.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--memory", metavar="SIZE", help='Peak memory of the process, such as "8GB".')
@click.option("--slots", type=int, help="Experts kept in each layer, instead of --memory.")
@click.option("--experts", type=int, help="Prune the router to its top K experts.")
@click.option("--depth", type=int, default=8, show_default=True, help="Reads in flight.")
@click.option("--max-tokens", type=int, help="End the answer after so many tokens.")
@click.option("--temperature", type=float, help="0 picks the likeliest token each time.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and the figures.")
def run(model, prompt, memory, slots, experts, depth, max_tokens, temperature, seed, verbose):
    """Answer PROMPT with MODEL: a name, or the directory of an MLX checkpoint.

    Without PROMPT, the prompt is read from standard input.
    """
    from .engine import Engine

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    request = Request(
        messages=[{"role": "user", "content": sys.stdin.read() if prompt is None else prompt}],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    try:
        settings = {"memory": memory, "slots": slots, "experts": experts, "depth": depth}
        with Engine(find(model), **settings) as engine:
            for event in engine.stream(request):
                if isinstance(event, Text):
                    click.echo(event.text, nl=False)
                elif isinstance(event, Reasoning):
                    click.echo(click.style(event.text, dim=True), nl=False, err=True)
            click.echo()
    except FlashMoEError as e:
        raise click.ClickException(str(e)) from e
    if verbose and isinstance(event, End):
        click.echo(figures(event), err=True)


def figures(end) -> str:
    """What the last event says, in one line."""
    return (
        f"{end.prompt_tokens} tokens of prompt in {end.prompt_seconds:.2f} s; "
        f"{end.generated_tokens} generated at {end.tokens_per_second:.1f} tokens/s; "
        f"K={end.experts} of {end.trained_experts}, {end.bits:g} bits; "
        f"hit rate {end.hit_rate:.1%}, {format_size(end.bytes_read)} read, "
        f"{end.wait_seconds:.2f} s waited for the disk; peak {format_size(end.peak_nbytes)}"
    )
