"""`flashmoe plan`: will a model run here, or on a known Mac, and how fast; before a download."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import click

from .. import catalog
from ..checkpoint.checkpoint import Checkpoint
from ..errors import DownloadError
from ..files import nearest_existing_parent
from ..ops.activations import ACTIVATIONS
from ..plan.report import Planned, Source
from ..plan.routing import REAL
from ..terminal import json_option, record

_WIDTH, _LABEL = 100, 11


@click.command()
@click.argument("name", metavar="NAME|PATH", required=False)
@click.option("--context", type=int, help="Tokens that memory is kept for. Default: 8192.")
@click.option("--prompt", type=int, help="Tokens to read before the answer. Default: 1000.")
@click.option("--memory", metavar="SIZE", help='Peak memory of the process, such as "8GB".')
@click.option("--experts", type=int, help="Prune the router to its top K experts.")
@click.option("--batch", default=1, show_default=True, help="Requests that run together.")
@click.option("--hosts", default=1, show_default=True, help="Machines like it, see --cluster.")
@click.option(
    "--network", default=1.0, show_default=True, metavar="GB/S", help="Between the hosts."
)
@click.option(
    "--machine",
    metavar="MAC",
    help="Predict for a Mac such as m3-max-48gb instead of measuring here; `list` shows them.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="float32",
    help="int8: faster on a CPU, not exact.",
)
@click.option(
    "--routing",
    type=click.Choice([REAL, "uniform"]),
    default=REAL,
    help="Where hit rates are from: real models, or all experts alike.",
)
@json_option
def plan(name, machine, activations, as_json, **asked) -> None:
    """Say whether the model NAME will run here, and how fast, before it is downloaded.

    NAME is a name (flashmoe list), hub:OWNER/NAME or a directory. Of a model that is not here only
    headers are fetched, less than 1 MB. It says memory, hit rate, tokens per second and the time to
    the first token, from five seconds of measuring this machine, with the formula; or for a known
    Mac. The exit code is 1 when it will not run.
    """
    from ..plan.machines import machine as known_machine
    from ..plan.machines import machines

    if machine == "list":
        for found in machines().values():
            click.echo(found.describe())
        return
    if name is None:
        raise click.UsageError("Missing argument 'NAME|PATH'.")
    mac = machine and known_machine(machine)
    with opened(name) as (checkpoint, source):
        if asked["experts"] is None:
            asked["experts"] = catalog.model(name).experts
        found = Planned(name, checkpoint, source, mac, activations, asked)
        if as_json:
            record(found.as_json(), as_json=True)
        else:
            for label, text in found.lines():
                _show(label, text)
    click.get_current_context().exit(0 if found.runs else 1)


@contextmanager
def opened(name: str) -> Iterator[tuple[Checkpoint, Source]]:
    """The checkpoint of a name, with headers from the hub where it is not on this disk.

    Raises:
        CheckpointError, DownloadError
    """
    model = catalog.model(name)
    if model.path is not None:
        path = catalog.find(name)
        yield Checkpoint.open(path), Source(path)
        return
    from ..hub import api as hub  # late: huggingface_hub
    from ..hub import headers as hub_headers
    from ..hub.download import Download

    try:
        listing = hub.listing(model.published.repo, model.published.revision)
    except DownloadError as e:
        raise DownloadError(
            f"{name} is not on this disk ({model.published.size}), and its headers could not be "
            f"fetched: {e}"
        ) from e
    planned = Download(listing)
    directory = nearest_existing_parent(planned.place.blobs)
    with hub_headers.checkpoint(listing) as checkpoint:
        yield (
            checkpoint,
            Source(directory, listing.repo, listing.commit, planned.missing, planned.free),
        )


def _show(label: str, text: str) -> None:
    indent = " " * _LABEL
    if len(label) >= _LABEL:
        click.echo(click.style(label, bold=True))
        label = ""
    wrapped = textwrap.wrap(text, _WIDTH - _LABEL, break_on_hyphens=False)
    for number, line in enumerate(wrapped):
        head = click.style(f"{label:<{_LABEL}}", bold=True) if not number else indent
        click.echo(head + line)
