"""Commands that measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..catalog import find
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..memory.budget import format_size
from ..streaming import drives
from ..terminal import json_option, record

#: Bytes of experts from which on a drive is measured, and not its caches.
ENOUGH = 10**9


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.argument("name", metavar="MODEL")
@click.option("--seconds", default=0.6, show_default=True, help="Seconds of each measurement.")
@click.option("--keep/--no-keep", default=True, help="Remember the winner for the next load.")
@json_option
def disk(name: str, seconds: float, keep: bool, as_json: bool) -> None:
    """Find how the experts of MODEL are read fastest from its drive, and remember it."""
    from ..streaming.disk_bench import Measured, probe  # late: MLX

    checkpoint = Checkpoint.open(find(name))
    experts = checkpoint.num_experts * sum(
        layer.expert_nbytes for layer in checkpoint.expert_layers.values()
    )
    if keep and experts < ENOUGH:
        raise SettingError(
            f"{name} has {format_size(experts)} of experts, too little to tell what its drive does "
            f"with a model larger than memory: give one of {format_size(ENOUGH)} or more, or pass "
            "--no-keep"
        )
    rows = []

    def report(found: Measured) -> None:
        rows.append(found)
        if not as_json:
            click.echo(
                f"{found.drive.io:9} depth {found.drive.depth:2}  {_split(found.drive):16} "
                f"{found.gb_per_s:6.2f} GB/s  {found.cpu_ms_per_gb:6.0f} ms of CPU a GB"
            )

    best = probe(checkpoint, seconds=seconds, report=report)
    if keep:
        try:
            drives.remember(checkpoint.path, best)
        except OSError as e:
            raise SettingError(f"{drives.file()} cannot be written: {e}") from e
    if as_json:
        measured = [
            asdict(r.drive) | {"gb_per_s": r.gb_per_s, "cpu_ms_per_gb": r.cpu_ms_per_gb}
            for r in rows
        ]
        kept = str(drives.file()) if keep else None
        record({"best": asdict(best), "kept_in": kept, "measured": measured}, as_json=True)
        return
    click.echo(f"best: io={best.io} depth={best.depth} {_split(best)}")
    if keep:
        click.echo(f"models on this drive are read so from now on ({_short(drives.file())})")


def _split(drive: drives.Drive) -> str:
    return f"pieces of {format_size(drive.split)}" if drive.split else "whole ranges"


def _short(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
