"""`flashmoe sweep`: what pruning and fewer bits cost a model, and where to stop."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import catalog, macos
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..locks import temporary_directory
from ..options import EngineOptions
from ..sizes import format_size
from ..terminal import (
    format_seconds,
    json_option,
    print_json,
    print_remark,
    print_table,
    progress_bar,
    waiting_line,
)
from .options import engine_options

if TYPE_CHECKING:
    from ..sweep.run import Sweep

#: The values of K by default: the trained one, and those of these that are lower.
EXPERTS = (8, 6, 5, 4, 3, 2, 1)


@click.command()
@click.argument("model")
@click.option(
    "--experts",
    metavar="K,K,...",
    show_default="from the trained K down to 1",
    help="Measure these numbers of experts per token.",
)
@click.option(
    "--bits",
    metavar="V,V,...",
    default="own",
    show_default=True,
    help="Measure these versions: 'own' is MODEL itself; 3 its experts at 3 bits; 2/4 gate and up "
    "at 2, down at 4; 2/4/6 dense weights at 6 too; or the name or directory of another checkpoint "
    "of the same model.",
)
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    show_default="answers of the exact model to bundled questions",
    help="Compare on this text.",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(2),
    default=2000,
    show_default=True,
    help="Compare on N tokens of the text.",
)
@click.option(
    "--calls",
    metavar="N",
    type=click.IntRange(0, 120),
    default=24,
    show_default=True,
    help="Ask for N tool calls at each point, with and without the grammar.",
)
@click.option(
    "--schemas",
    metavar="N",
    type=click.IntRange(0, 40),
    default=12,
    show_default=True,
    help="Ask for N JSON documents at each point, with and without the grammar.",
)
@click.option(
    "--threshold",
    metavar="NATS",
    type=click.FloatRange(0),
    default=0.05,
    show_default=True,
    help="Recommend the smallest point with at most this KL divergence per token.",
)
@engine_options("memory")
@click.option(
    "--work",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="a temporary directory",
    help="Keep versions and results in this directory, and resume from it.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Draw a plot, as .svg, .png or .pdf. Needs matplotlib: pip install "llm-flashmoe[plot]".',
)
@json_option
def sweep(
    model: str,
    options: EngineOptions,
    experts: str | None,
    bits: str,
    threshold: float,
    work: Path | None,
    plot: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure what pruning and fewer bits cost a model.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint. Each point is a
    number of experts per token (K) of a version of it. A point has the perplexity and the KL
    divergence from the exact model, the share of correct tool calls and JSON with and without a
    grammar, the bytes per token, and the speed. Ctrl-C shows the points that are finished; with
    --work, the same command resumes.
    """
    from ..sweep.run import Settings, Sweep  # late: llguidance and MLX
    from ..sweep.versions import read_versions

    checkpoint = Checkpoint.open(catalog.find(model))
    versions = read_versions([v.strip() for v in bits.split(",")], checkpoint)
    asked = Settings(experts=_experts(experts, checkpoint), memory=options.memory, **settings)
    if plot is not None:
        from ..sweep.plot import check_plot_file

        check_plot_file(plot)
    with ExitStack() as stack:
        keep = work is not None
        if work is None:
            work = stack.enter_context(temporary_directory("flashmoe-sweep-"))
        run = Sweep(checkpoint, versions, asked, work, keep=keep, progress=progress_bar)
        click.echo(
            f"{format_size(run.needed_nbytes())} to write in {work}, "
            f"{format_size(run.free_nbytes())} free",
            err=True,
        )
        with waiting_line("measuring this machine"):
            seconds = run.forecast_seconds()
        if seconds:
            click.echo(f"all of it takes about {format_seconds(seconds)} here", err=True)
        macos.keep_awake()
        try:
            run.run()
        except KeyboardInterrupt:
            _show(model, run, threshold, plot, as_json=as_json)
            raise click.Abort() from None
        _show(model, run, threshold, plot, as_json=as_json)


def _experts(text: str | None, checkpoint: Checkpoint) -> tuple[int, ...]:
    if text is None:
        return (checkpoint.top_k, *(k for k in EXPERTS if k < checkpoint.top_k))
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise SettingError(f"--experts {text!r} is no list of numbers: write it as 10,6,4")
    return tuple(dict.fromkeys(int(k) for k in text.split(",")))


def _show(name: str, run: Sweep, threshold: float, plot: Path | None, *, as_json: bool) -> None:
    from ..sweep.plot import write_plot
    from ..sweep.report import columns, report, rows, summary

    results = report(name, run.points(), threshold, whole=run.whole)
    if results["points"] and plot is not None:
        write_plot(results, plot)
    if as_json:
        print_json(results)
        return
    if not results["points"]:
        print_remark("no point was finished")
        return
    names = columns(results)
    print_table(rows(results), names, right=[n for n in names if n not in ("version", "")])
    for line in summary(results):
        print_remark(line)
