"""Limits on open files and threads, and closed standard streams, are dealt with before a load."""

import subprocess
import sys

import pytest

SHOW = """
import resource, sys
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
{}
import mlx_lm
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits_after_import(soft: int, hard: int, first: str = "import flashmoe") -> str:
    command = [sys.executable, "-c", SHOW.format(first), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout.strip() or done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [(64, 64, 64), (256, 1024, 1024), (1024, 5000, 4096), (5000, 5000, 5000)],
)
def test_limit_on_open_files_is_raised_as_far_as_it_may_be(soft, hard, after):
    assert limits_after_import(soft, hard) == f"{after} {hard}"


def test_mlx_lm_alone_fails_at_a_low_limit_and_lowers_a_high_one():
    assert "ValueError" in limits_after_import(64, 64, "")
    assert limits_after_import(5000, 5000, "") == "2048 4096"


STREAMS = """
import os, sys
from flashmoe.process_limits import fill_standard_streams
fill_standard_streams()
fill_standard_streams()
fd = os.open(".", os.O_RDONLY)
print("out"); print("error", file=sys.stderr); sys.stdin.read()
sys.exit(0 if fd == 3 else fd or 99)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-", "</dev/null"])
def test_closed_streams_are_filled(closed):
    command = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, STREAMS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert done.stdout == ("" if " >&-" in f" {closed}" else "out\n")
