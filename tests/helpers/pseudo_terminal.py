"""Run a command in a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

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
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm"} | variables
    for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them
        environment.pop(name, None)
    command = [str(Path(sys.executable).parent / program), *map(str, args)]
    try:
        # pty.fork would fork a process that may have threads.
        child = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b"")).decode()
        assert child.wait(timeout=10) == code, shown
    finally:
        os.close(ours)
    return shown


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 10000)
    except OSError:  # on Linux the end of a terminal is an error
        return b""


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
