"""Print what commands report: tables for people, tab-separated values in a pipe, JSON on request.

On a terminal, tables have headings, fit the width of the window, and may have colour. In a pipe a
table is one header line and one line per record, with tabs between columns, nothing padded or cut,
and no colour, so that `cut`, `awk` and spreadsheets read it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import floor, isfinite, log10
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import click

from .events import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

#: Seconds before the progress of a prompt is shown: most prompts are done by then.
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
        # Below a microsecond there is only the rounding of sums that should be 0.
        return f"{format_number(round(1000 * seconds, 3), 2)} ms"
    if round(seconds) < 120:
        return f"{format_number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def format_path(path: str | Path) -> str:
    """Write a path for people, with `~` for the home directory."""
    try:
        return f"~/{Path(path).relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # it is elsewhere, or there is no home
        return str(path)


def is_terminal() -> bool:
    """Return whether a person looks at what is printed."""
    return sys.stdout.isatty()


def print_json(value: dict | list) -> None:
    """Print indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    right: Collection[str] = (),
    style: Callable[[Mapping[str, Any]], str] | None = None,
) -> None:
    """Print one line per record.

    Args:
        records: values by column. On a terminal, a Path is shown with `~`.
        columns: the keys to print, which are also the headings. The first column is never cut.
        right: the columns that are aligned to the right: numbers.
        style: returns the colour of a record on a terminal, in rich's words; "" for none.
    """
    if not is_terminal():
        click.echo("\t".join(columns))
        for record in records:
            click.echo(_line(record, columns))
        return
    from rich.console import Console  # late: 50 ms

    view = _view(columns, right)
    for record in records:
        view.add_row(*_texts(record, columns), style=style(record) if style else None)
    Console().print(view)


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print one record, as a table with one line per field."""
    records = [{"field": name, "value": value} for name, value in fields.items()]
    print_table(records, ("field", "value"))


@contextmanager
def growing_table(
    columns: Sequence[str], *, right: Collection[str] = ()
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that prints the next record of a table at once."""
    if not is_terminal():
        click.echo("\t".join(columns))
        yield lambda record: click.echo(_line(record, columns))
        return
    from rich.live import Live

    view = _view(columns, right)
    with Live(view, console=_console(), auto_refresh=False) as live:

        def add(record: Mapping[str, Any]) -> None:
            view.add_row(*_texts(record, columns))
            live.refresh()

        yield add


def print_remark(text: str) -> None:
    """Print a sentence about a table: below it, or on stderr if the table goes into a pipe."""
    click.echo(text, err=not is_terminal())


def _console(*, stderr: bool = False) -> Console:
    """Return a console that leaves the cursor visible: a killed process could not show it again."""
    from rich.console import Console

    class WithCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    return WithCursor(stderr=stderr)


def _view(columns: Sequence[str], right: Collection[str]) -> Table:
    from rich import box
    from rich.table import Table

    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        # The first column names the record, so people copy it: other columns give way first.
        view.add_column(name, justify=justify, no_wrap=not number, overflow="fold")
    return view


def _texts(record: Mapping[str, Any], columns: Sequence[str]) -> list[Text]:
    from rich.text import Text

    values = [record.get(column) for column in columns]
    values = [format_path(value) if isinstance(value, Path) else value for value in values]
    # Text and not str: rich would read "[...]" in a path as markup.
    return [Text(_cell(value)) for value in values]


def _line(record: Mapping[str, Any], columns: Sequence[str]) -> str:
    return "\t".join(_cell(record.get(column)) for column in columns)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value, 6)
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    # Names of files may hold tabs, line ends and terminal codes.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a bar with speed and time left, on stderr.

    The bar is shown on a terminal only, and removed at the end.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
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
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, speed="")

        def advance(done: int) -> None:
            bar.update(task, advance=done)
            if (speed := bar.tasks[0].speed) and total > 10**6:
                bar.update(task, speed=f"{speed / 1e6:.0f} M weights/s")

        yield advance


@contextmanager
def waiting_line(text: str) -> Iterator[None]:
    """Show a dim line on stderr while something takes long, on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    _show_line(text)
    try:
        yield
    finally:
        _clear_line()


class ProgressLine:
    """Show the Progress events of an answer in one line on stderr, and remove the line at the end.

    Nothing is shown outside a command: Python code that uses a model may own the terminal.
    """

    def __init__(self) -> None:
        self._start = monotonic()
        self._shown = False

    def show(self, event: Progress) -> None:
        """Show how much of the prompt is done."""
        if click.get_current_context(silent=True) is None or not sys.stderr.isatty():
            return
        if monotonic() - self._start < PATIENCE:
            return
        self._shown = True
        text = (
            f"processing the prompt: {event.done} of {event.total} tokens, "
            f"layer {event.layer} of {event.layers}"
        )
        _show_line(text)

    def close(self) -> None:
        """Remove the line."""
        if self._shown:
            self._shown = False
            _clear_line()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _show_line(text: str) -> None:
    _clear_line()
    # A line that wraps could not be removed.
    text = text[: shutil.get_terminal_size().columns - 1]
    click.echo(click.style(text, dim=True), nl=False, err=True)


def _clear_line() -> None:
    click.echo("\r\x1b[K", nl=False, err=True)
