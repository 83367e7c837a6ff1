"""Run a command in a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pexpect

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def show(
    *args: str, columns: int = 80, program: str = "flashmoe", code: int = 0, **variables: str
) -> str:
    """Return what a program prints on a terminal of that width, with its control codes.

    Args:
        program: a script that is installed beside this Python.
        code: the exit status that it must end with.
        variables: environment variables.
    """
    child = pexpect.spawn(
        str(Path(sys.executable).parent / program),
        list(map(str, args)),
        dimensions=(50, columns),
        encoding="utf-8",
        timeout=120,
        env=os.environ | {"TERM": "xterm"} | variables,
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == code, child.before
    return child.before


def lines(shown: str) -> Sequence[str]:
    """Return the lines that stay on the screen, without control codes.

    A line that was erased and written again counts as last written.
    """
    screen: list[str] = []
    for part in shown.split("\r\n"):
        up = part.count("\x1b[1A")  # a table that grows is drawn again from its first line
        if up:
            del screen[-up:]
        written = re.split(r"\r|\x1b\[2K", part)[-1]
        screen.append(_CONTROL.sub("", written).rstrip())
    return [line for line in screen if line]
