"""The commands, as `flashmoe ...` and as `llm flashmoe ...`."""

from __future__ import annotations

import logging
import sys

import click

from ..catalog import find, model
from ..errors import FlashMoEError
from ..events import End, Progress, Reasoning, Text
from ..memory.budget import format_size
from ..ops.activations import ACTIVATIONS
from ..requests import Request
from ..streaming.io_modes import IO_MODES
from ..terminal import ProgressLine
from . import (
    bench as cli_bench,
)
from . import (
    doctor as cli_doctor,
)
from . import (
    download as cli_download,
)
from . import (
    models as cli_models,
)
from . import (
    plan as cli_plan,
)
from . import (
    quantize as cli_quantize,
)
from . import (
    serve as cli_serve,
)
from . import (
    sweep as cli_sweep,
)
from .options import cluster_option, leads


class Commands(click.Group):
    """A group whose user errors are one line."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except FlashMoEError as e:
            raise click.ClickException(str(e)) from e


@click.group(cls=Commands)
@click.version_option(package_name="llm-flashmoe")
def cli() -> None:
    """Run Mixture-of-Experts models that are larger than memory."""


for command in (
    *cli_models.COMMANDS,
    cli_download.download,
    cli_plan.plan,
    cli_quantize.quantize,
    cli_sweep.sweep,
    cli_bench.bench,
    cli_doctor.doctor,
    cli_serve.serve,
):
    cli.add_command(command)


@cli.command()
@click.argument("name", metavar="MODEL")
@click.argument("prompt", required=False)
@click.option("--memory", metavar="SIZE", help='Peak memory of the process, such as "8GB".')
@click.option("--slots", type=int, help="Experts kept in each layer, instead of --memory.")
@click.option("--experts", type=int, help="Prune the router to its top K experts.")
@click.option("--depth", type=int, help="Reads in flight. Default: as `bench disk` found, or 8.")
@click.option("--io", type=click.Choice(IO_MODES), help="How experts are read. Default: the same.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="float32",
    help="int8: faster on a CPU, not exact.",
)
@cluster_option
@click.option("--think/--no-think", default=None, help="Think before the answer.")
@click.option("--max-tokens", type=int, help="End the answer after so many tokens.")
@click.option("--temperature", type=float, help="0 picks the likeliest token each time.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Show the memory plan and the figures.")
def run(name, prompt, memory, slots, experts, depth, io, activations, cluster, verbose, **options):
    """Answer PROMPT with MODEL: a name, or the directory of an MLX checkpoint.

    Without PROMPT, the prompt is read from standard input.
    """
    from ..engine import Engine

    if not leads(find(name), cluster, memory, slots, depth, io):
        return
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    content = sys.stdin.read() if prompt is None else prompt
    request = Request(messages=[{"role": "user", "content": content}], **options)
    experts = model(name).experts if experts is None else experts
    settings = {"memory": memory, "slots": slots, "experts": experts, "depth": depth, "io": io}
    settings |= {"activations": activations, "cluster": cluster}
    with Engine(find(name), **settings) as engine, ProgressLine() as line:
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
                click.echo("\n" + figures(event), err=True, nl=False)
        click.echo()


def figures(end) -> str:
    """What the last event says, in one line."""
    return (
        f"{end.prompt_tokens} tokens of prompt ({end.cached_tokens} cached) in "
        f"{end.prompt_seconds:.2f} s; "
        f"{end.generated_tokens} generated at {end.tokens_per_second:.1f} tokens/s; "
        f"K={end.experts} of {end.trained_experts}, {end.bits:g} bits, "
        f"{end.activations} activations, {end.ops} ops; "
        f"hit rate {end.hit_rate:.1%}, {format_size(end.bytes_read)} read, "
        f"{end.wait_seconds:.2f} s waited for the disk; peak {format_size(end.peak_nbytes)}"
    )
