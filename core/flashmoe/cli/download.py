"""`flashmoe download`: a model of the hub onto this disk, under a name."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from .. import catalog, macos
from ..errors import DownloadError
from ..hub import registry
from ..sizes import format_size
from ..terminal import format_seconds, json_option, print_json

if TYPE_CHECKING:
    from ..hub.download import Download

#: Seconds between lines of progress where there is no terminal.
PERIOD = 30.0


@click.command()
@click.argument("name")
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="the cache of huggingface_hub",
    help="Download into this directory.",
)
@click.option(
    "--revision",
    metavar="REVISION",
    show_default="as downloaded before, or main",
    help="Download this branch, tag or commit.",
)
@click.option("--dry-run", is_flag=True, help="Show the size and whether it fits, and stop.")
@json_option
def download(
    name: str, to: Path | None, revision: str | None, dry_run: bool, as_json: bool
) -> None:
    """Download a model from the Hugging Face Hub.

    NAME is a name of the catalogue (see `flashmoe list`) or hub:OWNER/NAME[@REVISION]. Run the same
    command again to resume an interrupted download. The model gets its name once all of its files
    are verified.
    """
    model = catalog.model(name)
    if model.published is None:
        raise DownloadError(
            f"{name} is {model.path}: there is nothing to download. Give a name of the catalogue "
            "(flashmoe list) or hub:OWNER/NAME"
        )
    registry.check_names(model.name, model.aliases)
    from ..hub import api as hub  # late: huggingface_hub
    from ..hub.download import Download

    published = replace(model.published, revision=revision or model.published.revision)
    planned = Download(hub.fetch_listing(published.repo, published.revision), to)
    listing = planned.listing
    click.echo(_describe(planned), err=as_json)
    planned.check_free_space()
    if not dry_run:
        macos.keep_awake()
        with _progress(listing.nbytes) as advance:
            path = planned.fetch(advance)
        registry.add(model.name, path, model.aliases, repo=listing.repo, revision=listing.commit)
    if as_json:
        print_json(
            {
                "name": model.name,
                "repo": listing.repo,
                "revision": listing.commit,
                "bytes": listing.nbytes,
                "fetched": planned.missing_nbytes,
                "free": planned.free_nbytes,
                "files": len(listing.files),
                "path": str(planned.paths.directory),
                "registered": not dry_run,
            }
        )
    elif not dry_run:
        click.echo(f"{model.name} is verified and registered: {planned.paths.directory}")


def _describe(planned: Download) -> str:
    listing, paths = planned.listing, planned.paths
    where = paths.directory if paths.chosen_by_user else paths.blobs
    here = f"{format_size(planned.present_nbytes)} are here, " if planned.present_nbytes else ""
    return (
        f"{listing.repo} at {listing.commit[:12]}: {format_size(listing.nbytes)} in "
        f"{len(listing.files)} files; {here}{format_size(planned.missing_nbytes)} to download, "
        f"{format_size(planned.free_nbytes)} free in {where}"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes that arrived, and shows progress on stderr."""
    if not sys.stderr.isatty():
        yield _ProgressLog(total).advance
        return
    from rich import progress as bars  # late: 50 ms
    from rich.console import Console

    columns = (
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda nbytes: shown.advance(task, nbytes)


class _ProgressLog:
    """Print a line of progress every `PERIOD` seconds, for a log. Several threads may use it."""

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
                f"{format_size(int(speed))}/s, {format_seconds(left)} left",
                err=True,
            )
