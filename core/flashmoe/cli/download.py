"""`flashmoe download`: a model of the hub onto this disk, and under a name."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import click

from .. import catalog
from ..errors import DownloadError
from ..hub import registry
from ..sizes import format_size
from ..terminal import json_option, record

#: Seconds between lines of progress where there is no terminal.
PERIOD = 30.0


@click.command()
@click.argument("name")
@click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), help="Not in the hub's cache: here."
)
@click.option("--revision", help="A branch, tag or commit. Default: as downloaded before, or main.")
@click.option("--dry-run", is_flag=True, help="Say how large it is, and whether it fits. No more.")
@json_option
def download(name: str, to: Path | None, revision: str | None, dry_run: bool, as_json: bool):
    """Fetch the model NAME from the Hugging Face hub, or go on where it stopped.

    NAME is of the catalogue (flashmoe list), or hub:OWNER/NAME[@REVISION]. It is registered once
    all of it is verified.
    """
    model = catalog.model(name)
    if model.published is None:
        raise DownloadError(
            f"{name} is {model.path}: there is nothing to download. Give a name of the catalogue "
            "(flashmoe list) or hub:OWNER/NAME"
        )
    registry.check(model.name, model.aliases)
    from ..hub import api as hub
    from ..hub.download import Download

    published = replace(model.published, revision=revision or model.published.revision)
    planned = Download(hub.listing(published.repo, published.revision), to)
    listing = planned.listing
    click.echo(_plan(planned), err=as_json)
    planned.check_room()
    found = {"name": model.name, "repo": listing.repo, "revision": listing.commit}
    found |= {"bytes": listing.nbytes, "fetched": planned.missing, "free": planned.free}
    found |= {"files": len(listing.files), "path": str(planned.place.directory)}
    if not dry_run:
        with progress(listing.nbytes) as advance:
            path = planned.run(advance)
        registry.add(model.name, path, model.aliases, repo=listing.repo, revision=listing.commit)
    if as_json:
        record(found | {"registered": not dry_run}, as_json=True)
    elif not dry_run:
        click.echo(f"{model.name} is verified and registered: {planned.place.directory}")


def _plan(planned) -> str:
    listing, place = planned.listing, planned.place
    here = f"{format_size(planned.here)} are here, " if planned.here else ""
    return (
        f"{listing.repo} at {listing.commit[:12]}: {format_size(listing.nbytes)} in "
        f"{len(listing.files)} files; {here}{format_size(planned.missing)} to fetch, "
        f"{format_size(planned.free)} free in {place.directory if place.own else place.blobs}"
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how far it is, how fast, and how long it takes still."""
    if not sys.stderr.isatty():
        yield _Lines(total).advance
        return
    from rich import progress as bars  # late: 50 ms
    from rich.console import Console

    columns = (
        *(bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn()),
        bars.TimeRemainingColumn(compact=True),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda nbytes: shown.advance(task, nbytes)


class _Lines:
    """Progress as lines, for a log."""

    def __init__(self, total: int):
        self._total, self._done, self._lock = total, 0, threading.Lock()
        self._last = (monotonic(), 0)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now, (then, before) = monotonic(), self._last
            if now - then < PERIOD:
                return
            self._last = (now, self._done)
            speed = max(self._done - before, 1) / (now - then)
            left = (self._total - self._done) / speed
            click.echo(
                f"{format_size(self._done)} of {format_size(self._total)}, "
                f"{format_size(int(speed))}/s, {left / 60:.0f} min left",
                err=True,
            )
