"""One line on the terminal while a long prompt is read."""

from __future__ import annotations

import sys
from time import monotonic

import click

#: Seconds of silence before anything is shown.
PATIENCE = 2.0


class ProgressLine:
    """Shows Progress events on stderr, on a terminal only, and takes itself away."""

    def __init__(self):
        self._start = monotonic()
        self._shown = False

    def show(self, event) -> None:
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
