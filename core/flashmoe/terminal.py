"""How commands print: a table on a terminal, plain text in a pipe, JSON when it is asked for; and
how far a long prompt has been read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import floor, isfinite, log10
from time import monotonic

import click

from .events import Progress

#: Seconds of silence before the progress of a prompt is shown.
PATIENCE = 2.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def format_number(value: float, digits: int = 3) -> str:
    """Write a number for people: rounded to `digits` significant digits, never as 4.3e+02.

    Digits before the decimal point are all written, and zeros at the end of a fraction are not.
    """
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_seconds(seconds: float) -> str:
    """Write a duration for people, such as "350 ms", "4.3 s", "7 min 10 s" or "3 h 36 min"."""
    if not isfinite(seconds):
        return f"{seconds} s"
    if round(1000 * seconds) < 1000:
        return f"{format_number(1000 * seconds, 2)} ms"
    if round(seconds) < 120:
        return f"{format_number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def table(records: list[dict], columns: list[str], *, as_json: bool, empty: str = "") -> None:
    """Print records: as JSON all they hold, else the columns, tabs between them in a pipe.

    Args:
        empty: what to say, on stderr, when there are none.
    """
    if as_json:
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    if not records and empty:
        click.echo(empty, err=True)
        return
    rows = [[_cell(record.get(column)) for column in columns] for record in records]
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich import box  # late: 50 ms
    from rich.console import Console
    from rich.table import Table

    view = Table(*columns, box=box.SIMPLE, pad_edge=False)
    for row in rows:
        view.add_row(*row)
    Console().print(view)


def record(found: dict, *, as_json: bool) -> None:
    """Print one record, a line for each of its fields."""
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    width = max(map(len, found))
    for name, value in found.items():
        click.echo(
            f"{name:<{width}}  {_cell(value)}" if sys.stdout.isatty() else _line(name, value)
        )


def _line(name: str, value) -> str:
    return f"{name}\t{_cell(value)}"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with speed and time left, on stderr and on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, speed="")

        def advance(done: int) -> None:
            bar.update(task, advance=done)
            if (speed := bar.tasks[0].speed) and total > 10**6:
                bar.update(task, speed=f"{speed / 1e6:.0f} M weights/s")

        yield advance


class ProgressLine:
    """Shows Progress events on stderr, on a terminal only, and takes itself away."""

    def __init__(self):
        self._start = monotonic()
        self._shown = False

    def show(self, event: Progress) -> None:
        # Not for Python code that uses the model: only in a command.
        if click.get_current_context(silent=True) is None or not sys.stderr.isatty():
            return
        if monotonic() - self._start < PATIENCE:
            return
        self._shown = True
        text = (
            f"reading the prompt: {event.done} of {event.total} tokens, "
            f"layer {event.layer} of {event.layers}"
        )
        click.echo("\r\x1b[K" + click.style(text, dim=True), nl=False, err=True)

    def close(self) -> None:
        if self._shown:
            self._shown = False
            click.echo("\r\x1b[K", nl=False, err=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
