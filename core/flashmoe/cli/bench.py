"""`flashmoe bench`: measurements of this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import catalog, macos
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..options import EngineOptions
from ..sizes import format_size
from ..streaming import drives
from ..terminal import (
    format_number,
    format_path,
    format_seconds,
    growing_table,
    json_option,
    print_json,
    print_remark,
    print_table,
)
from .options import engine_options, with_preset

if TYPE_CHECKING:
    from ..streaming.disk_bench import Measured

#: Bytes of experts from which on the drive itself is measured, and not its caches.
ENOUGH = 10**9


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.argument("model")
@click.option(
    "--seconds",
    metavar="S",
    default=0.6,
    show_default=True,
    help="Take this long for each of some twenty measurements.",
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Use the fastest way from now on for all models on this drive.",
)
@json_option
def disk(model: str, seconds: float, keep: bool, as_json: bool) -> None:
    """Find the fastest way to read experts from a drive.

    The experts of MODEL are read at random, with several read modes (--io), numbers of reads in
    flight (--depth) and sizes of a read. The result is remembered for the drive of the model. MODEL
    should have 1 GB of experts or more.
    """
    from ..streaming.disk_bench import probe  # late: MLX

    if not seconds > 0:
        raise SettingError(f"seconds={seconds} must be above 0: it is the time of a measurement")
    checkpoint = Checkpoint.open(catalog.find(model))
    if keep and checkpoint.expert_nbytes < ENOUGH:
        raise SettingError(
            f"{model} has {format_size(checkpoint.expert_nbytes)} of experts, too little to tell "
            "how its drive reads a model that is larger than memory: give a model with "
            f"{format_size(ENOUGH)} or more, or pass --no-keep"
        )
    measurements: list[Measured] = []
    if as_json:
        best = probe(checkpoint, seconds=seconds, report=measurements.append)
    else:
        columns = ("io", "depth", "reads", "GB/s", "CPU ms per GB")
        with growing_table(columns, right=("depth", "GB/s", "CPU ms per GB")) as add:
            best = probe(checkpoint, seconds=seconds, report=lambda m: add(_row(m)))
    if keep:
        try:
            drives.remember(checkpoint.path, best)
        except OSError as e:
            raise SettingError(f"{drives.file()} cannot be written: {e}") from e
    if as_json:
        _print_json(best, measurements, keep)
        return
    print_remark(f"best: io={best.io} depth={best.depth}, {_reads(best)}")
    if keep:
        file = format_path(drives.file())
        print_remark(f"models on this drive are read like this from now on ({file})")


@bench.command()
@click.argument("model")
@engine_options("memory", "slots", "context", "experts", "depth", "io", "activations")
@click.option(
    "--tokens", metavar="N", default=64, show_default=True, help="Generate N tokens an answer."
)
@click.option(
    "--answers",
    metavar="N",
    default=3,
    show_default=True,
    help="Take the medians of N answers after the first one.",
)
@json_option
def model(model: str, options: EngineOptions, tokens: int, answers: int, as_json: bool) -> None:
    """Measure how fast a model runs on this machine.

    MODEL is a name (see `flashmoe list`) or the directory of an MLX checkpoint. The first answer
    starts with nothing in memory. Close other programs; a large model takes about ten minutes. The
    last lines are for the issue form "A measurement".
    """
    from ..doctor.model_bench import COLUMNS, measure  # late: MLX

    if tokens < 2 or answers < 1:
        raise SettingError(
            f"tokens={tokens} and answers={answers} must be at least 2 and 1: a speed is between "
            "two tokens"
        )
    named, path = catalog.model(model), catalog.find(model)
    options = with_preset(options, named)
    macos.keep_awake()
    result = measure(
        Path(named.name).name,
        path,
        options,
        tokens=tokens,
        answers=answers,
        report=lambda text: click.echo(f"{text} ...", err=True),
    )
    if as_json:
        print_json(asdict(result))
        return
    columns = ("", "prompt tokens", "first token", "tokens/s", "hits", "GB/s")
    kinds = {"first answer": result.cold, "later answers": result.warm}
    rows = [
        {
            "": kind,
            "prompt tokens": format_number(speed.prompt_tokens),
            "first token": format_seconds(speed.first_token_seconds),
            "tokens/s": format_number(speed.tokens_per_second),
            "hits": f"{speed.hit_rate:.0%}",
            "GB/s": f"{speed.gb_per_s:.2f}",
        }
        for kind, speed in kinds.items()
    ]
    print_table(rows, columns, right=columns[1:])
    click.echo(f"\n{COLUMNS}\n{'|---' * 12}|\n{result.markdown_row()}")


def _row(measured: Measured) -> dict[str, Any]:
    drive = measured.drive
    return {
        "io": drive.io,
        "depth": drive.depth,
        "reads": _reads(drive),
        "GB/s": f"{measured.gb_per_s:.2f}",
        "CPU ms per GB": format_number(measured.cpu_ms_per_gb),
    }


def _reads(drive: drives.Drive) -> str:
    return f"pieces of {format_size(drive.split)}" if drive.split else "whole ranges"


def _print_json(best: drives.Drive, measurements: list[Measured], keep: bool) -> None:
    measured = [
        asdict(m.drive) | {"gb_per_s": m.gb_per_s, "cpu_ms_per_gb": m.cpu_ms_per_gb}
        for m in measurements
    ]
    kept = str(drives.file()) if keep else None
    print_json({"best": asdict(best), "kept_in": kept, "measured": measured})
