"""Run commands as another user of this machine, who may read all files, as tests must.

The interpreter may lie in a directory that only root may enter. Only root can become another user.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UID = 12345
_SETPRIV = (
    "setpriv",
    *(f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    "--bounding-set=-all,+dac_read_search",
)
BIN = Path(sys.executable).parent


@functools.cache
def _possible() -> bool:
    if shutil.which("setpriv") is None:
        return False
    done = subprocess.run([*_SETPRIV, sys.executable, "-c", ""], capture_output=True)
    return done.returncode == 0


def as_other_user(command: list, env: dict, **kwargs) -> subprocess.CompletedProcess:
    """Run a command as the other user; the test is skipped where that is not possible."""
    if not _possible():
        pytest.skip("only root on Linux, with setpriv, can become another user")
    arguments = [*_SETPRIV, *map(str, command)]
    return subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=600, **kwargs)
