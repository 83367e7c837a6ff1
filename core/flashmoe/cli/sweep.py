"""`flashmoe sweep`: what pruning and fewer bits cost a model, and where to stop."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from ..catalog import find
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..sizes import format_size
from ..terminal import json_option, progress, record, table

#: Values of K by default: the trained one, and these.
EXPERTS = (8, 6, 5, 4, 3, 2, 1)


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--experts", metavar="K,K,...", help="Default: from the trained K down to 1.")
@click.option(
    "--bits",
    default="own",
    show_default=True,
    metavar="V,V,...",
    help="Versions: own; 3 (an expert's bits); 2/4 (gate and up, down); 2/4/6 (dense weights too); "
    "another checkpoint of the model, by name or directory.",
)
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A text to compare on. Default: answers of the exact model to bundled questions.",
)
@click.option(
    "--tokens", type=click.IntRange(2), default=2000, show_default=True, help="Of the text."
)
@click.option(
    "--calls",
    type=click.IntRange(0, 120),
    default=24,
    show_default=True,
    help="Tool calls at each point, with and without the grammar.",
)
@click.option(
    "--schemas",
    type=click.IntRange(0, 40),
    default=12,
    show_default=True,
    help="JSON documents at each point, the same.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0),
    default=0.05,
    show_default=True,
    help="KL, in nats a token, that is close enough.",
)
@click.option("--memory", metavar="SIZE", help='Peak memory of the process, such as "8GB".')
@click.option(
    "--work",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep versions and results here, and use what is there. Default: a temporary directory.",
)
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Draw an SVG."
)
@json_option
def sweep(name, experts, bits, threshold, work, plot, as_json, **settings):
    """Measure what pruning (K) and fewer bits cost the model NAME, and say where to stop.

    Perplexity and KL against the exact model, tool calls and JSON with and without a grammar,
    bytes a token and speed. Ctrl-C shows the points that are finished; with --work, the same
    command goes on.
    """
    from ..sweep.run import Settings, Sweep  # late: llguidance and MLX
    from ..sweep.versions import read_versions

    checkpoint = Checkpoint.open(find(name))
    versions = read_versions([v.strip() for v in bits.split(",")], checkpoint)
    settings = Settings(experts=_experts(experts, checkpoint), **settings)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise SettingError(f"there is no directory {plot.parent}: give --plot a file in one")
    with ExitStack() as stack:
        keep = work is not None
        if not keep:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashmoe-sweep-")))
        run = Sweep(checkpoint, versions, settings, work, keep=keep, progress=progress)
        click.echo(
            f"{format_size(run.needed_nbytes())} to write in {work}, "
            f"{format_size(run.free_nbytes())} free",
            err=True,
        )
        try:
            run.run()
        except KeyboardInterrupt:
            _show(name, run, threshold, plot, as_json=as_json)
            raise click.Abort() from None
        _show(name, run, threshold, plot, as_json=as_json)


def _experts(text: str | None, checkpoint: Checkpoint) -> tuple[int, ...]:
    if text is None:
        return (checkpoint.top_k, *(k for k in EXPERTS if k < checkpoint.top_k))
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise SettingError(f"--experts {text!r} is no list of numbers: write it as 10,6,4")
    return tuple(dict.fromkeys(int(k) for k in text.split(",")))


def _show(name: str, run, threshold: float, plot: Path | None, *, as_json: bool) -> None:
    from ..sweep.plot import svg
    from ..sweep.report import columns, report, rows, summary

    found = report(name, run.points(), threshold, whole=run.whole)
    if found["points"] and plot is not None:
        try:
            plot.write_text(svg(found), encoding="utf-8")
        except OSError as e:
            raise SettingError(f"cannot write {plot}: {e.strerror}") from e
    if as_json:
        record(found, as_json=True)
        return
    names = columns(found)
    table(rows(found), names, as_json=False, empty="no point was finished")
    for line in summary(found):
        click.echo(line)
