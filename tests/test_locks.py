"""Writers take turns, and what killed ones left is removed, and nothing else."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmoe import locks

NAME = locks.partial_name("models", ".json")

WRITER = """
import sys, time
from pathlib import Path
from flashmoe import files, locks
with files.replacing(Path(sys.argv[1]), concurrent=True) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    time.sleep(600)
"""

OWNER = """
import sys, time
from pathlib import Path
from flashmoe import locks
with locks.temporary_directory("flashmoe-test-", Path(sys.argv[1])) as directory:
    (directory / "large").write_text("half")
    print(directory, flush=True)
    time.sleep(600)
"""

COUNTER = """
import json, sys
from pathlib import Path
from flashmoe import files, locks
file = Path(sys.argv[1])
for _ in range(50):
    with locks.locked(file.with_suffix(".lock")):
        files.write_json(file, json.loads(file.read_text()) + 1, concurrent=True)
"""


def start(code: str, path: Path) -> tuple[subprocess.Popen, Path]:
    """Start a process, and return it with the path that it prints once it is writing."""
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_partial_file_is_removed_once_its_writer_was_killed(tmp_path):
    process, partial = start(WRITER, tmp_path / "models.json")
    try:
        assert NAME.fullmatch(partial.name)
        locks.remove_partials(tmp_path, NAME)
        assert partial.exists(), "it is being written"
    finally:
        kill(process)
    assert partial.exists()
    locks.remove_partials(tmp_path, NAME)
    assert list(tmp_path.iterdir()) == []


def test_temporary_directory_of_a_killed_process_is_removed(tmp_path):
    first, directory = start(OWNER, tmp_path)
    try:
        with locks.temporary_directory("flashmoe-test-", tmp_path) as mine:
            assert directory.exists(), "it is in use"
            assert mine != directory
            assert mine.stat().st_mode & 0o077 == 0
    finally:
        kill(first)
    assert directory.exists()
    with locks.temporary_directory("flashmoe-test-", tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_directory_that_was_never_locked_is_removed_when_it_is_old(tmp_path):
    young, old = tmp_path / "flashmoe-test-abcdefgh", tmp_path / "flashmoe-test-12345678"
    young.mkdir()
    old.mkdir()
    os.utime(old, (1, 1))
    with locks.temporary_directory("flashmoe-test-", tmp_path):
        assert (young.exists(), old.exists()) == (True, False)


def test_what_is_not_ours_stays(tmp_path):
    names = [".models-abc.json", ".models-abcdefgh.txt", "models-abcdefgh.json", ".x-abcdefgh.json"]
    for name in names:
        (tmp_path / name).write_text("mine")
    os.mkfifo(tmp_path / ".models-aaaaaaaa.json")
    (tmp_path / ".models-bbbbbbbb.json").symlink_to(tmp_path / names[0])
    (tmp_path / ".models-cccccccc.json").mkdir()
    if os.geteuid() == 0:
        (tmp_path / ".models-dddddddd.json").write_text("of another user")
        os.chown(tmp_path / ".models-dddddddd.json", 12345, 12345)
    before = sorted(tmp_path.iterdir())
    locks.remove_partials(tmp_path, NAME)
    assert sorted(tmp_path.iterdir()) == before
    locks.remove_partials(tmp_path / "nowhere", NAME)


def test_processes_take_turns(tmp_path):
    file = tmp_path / "count.json"
    file.write_text("0")
    command = [sys.executable, "-c", COUNTER, str(file)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert json.loads(file.read_text()) == 200


def test_lock_that_is_kept_too_long_is_an_error(tmp_path):
    def twice():
        with locks.locked(tmp_path / "x.lock"), locks.locked(tmp_path / "x.lock", seconds=0.1):
            pass

    start = time.monotonic()
    with pytest.raises(TimeoutError, match="another process has kept it locked"):
        twice()
    assert time.monotonic() - start < 20


def test_file_system_without_locks_is_used_without_them(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.locked(tmp_path / "x.lock"):
        pass
    with locks.locked_partial(tmp_path / "models.json") as partial:
        locks.remove_partials(tmp_path, re.compile(".*"))
        assert partial.exists(), "it may be in use"
    with locks.temporary_directory("flashmoe-test-", tmp_path) as one:
        with locks.temporary_directory("flashmoe-test-", tmp_path):
            pass
        assert one.exists()
