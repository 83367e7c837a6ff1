"""`make` with a Python that flashmoe does not run on, and over an environment that is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(directory: Path, *args: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", "-C", str(ROOT), f"VENV={directory}", *args]
    # The tests themselves may run under make, whose flags its children would take over.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_old_python_is_one_line(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.9.6\n')
    old.chmod(0o755)
    done = make(tmp_path / "venv", "setup", f"PYTHON={old}")
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "needs Python 3.11 or newer" in line
    assert "Python 3.9.6" in line
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("environment", [True, False])
def test_only_an_old_environment_is_cleared(tmp_path, environment):
    (tmp_path / ("pyvenv.cfg" if environment else "thesis.txt")).touch()
    done = make(tmp_path, "--dry-run", "setup", f"PYTHON={sys.executable}")
    assert done.returncode == 0
    assert ("venv --clear" in done.stdout) is environment
