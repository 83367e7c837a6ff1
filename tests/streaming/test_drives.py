"""Tests how a drive is measured, and how its settings are remembered and used by a load."""

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.cli import bench as cli_bench
from flashmoe.cli import cli
from flashmoe.models.loading import load_streaming
from flashmoe.streaming import drives
from flashmoe.streaming.disk_bench import Measured, probe
from flashmoe.streaming.drives import DEFAULT, Drive, drive_of, remember
from flashmoe.streaming.io_modes import BLOCK, IO_MODES
from flashmoe.streaming.reader import Reader, ReadRequest, _pieces


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """The directory in which settings are remembered."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


def flashmoe(*args):
    """Run a command and return its result."""
    return CliRunner().invoke(cli, list(map(str, args)))


@given(start=st.integers(0, 10**5), size=st.integers(1, 10**5), nbytes=st.integers(BLOCK, 10**5))
def test_split_covers_each_byte_once(start, size, nbytes):
    buffer = np.zeros(size, np.uint8)
    at = start
    for piece in _pieces(ReadRequest("x", start, buffer, 1, 2), nbytes):
        view = memoryview(piece.buffer)
        assert piece.start == at
        assert view.nbytes >= 1
        np.frombuffer(view, np.uint8)[:] += 1
        at += view.nbytes
        assert at % BLOCK == 0 or at == start + size
    assert at == start + size
    assert (buffer == 1).all()


def test_split_below_a_block_is_refused():
    with pytest.raises(ValueError, match="split is 4095 bytes, must be 0, or 4096 or more"):
        Reader(2, split=BLOCK - 1)


@pytest.mark.parametrize("io", IO_MODES)
def test_split_read_gives_the_bytes_of_the_file(tmp_path, io):
    path = tmp_path / "file"
    data = os.urandom(700_001)
    path.write_bytes(data)
    with Reader(4, io=io, split=1 << 16) as reader:
        buffer = bytearray(690_000)
        reader.submit([ReadRequest(path, 1234, buffer, 0, 0)]).wait()
        assert reader.stats.reads == 11
    assert buffer == data[1234:691_234]


def test_settings_are_remembered_for_each_drive(tmp_path):
    assert drive_of(tmp_path) == DEFAULT
    settings = Drive("uncached", 3, 1 << 20)
    remember(tmp_path, settings)
    assert drive_of(tmp_path) == settings
    content = json.loads(drives.file().read_text())
    (key,) = content["drives"]
    content["drives"] = {"999:999": content["drives"][key]}
    drives.file().write_text(json.dumps(content))
    assert drive_of(tmp_path) == DEFAULT
    remember(tmp_path, settings)
    assert len(json.loads(drives.file().read_text())["drives"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"drives": 3}', "[" * 10**5]
    + [
        json.dumps({"drives": {"KEY": entry}})
        for entry in (
            7,
            {"io": "fast"},
            {"io": "direct", "depth": 0},
            {"io": "direct", "x": 1},
        )
        + ({"io": "direct", "depth": True}, {"io": "direct", "split": -1}, {"depth": 3})
    ],
)
def test_broken_settings_are_ignored_with_a_warning(tmp_path, config, text, caplog):
    device = os.stat(tmp_path).st_dev
    config.mkdir()
    key = f"{os.major(device)}:{os.minor(device)}"
    drives.file().write_text(text.replace("KEY", key))
    assert drive_of(tmp_path) == DEFAULT
    assert "is ignored" in caplog.text


def test_load_uses_the_remembered_settings():
    checkpoint = Checkpoint.open(find(DEMO))

    def reader(**settings):
        model = load_streaming(checkpoint, **settings)
        reader = model.reader
        model.close()
        modes = [name for name, mode in IO_MODES.items() if type(reader._pool.io) is mode]
        return modes[0], len(reader._threads), reader._split

    assert reader(slots=20) == (DEFAULT.io, DEFAULT.depth, 0)
    assert reader(slots=64) == ("buffered", 8, 0), "the next process reads from the page cache"
    remember(checkpoint.path, Drive("uncached", 3, 1 << 20))
    assert reader(slots=20) == ("uncached", 3, 1 << 20)
    assert reader(slots=20, io="buffered", depth=2) == ("buffered", 2, 1 << 20)


def test_probe_measures_each_io_mode_and_depth():
    rows: list[Measured] = []
    checkpoint = Checkpoint.open(find(DEMO))
    best = probe(checkpoint, seconds=0.01, report=rows.append)
    assert best in [row.drive for row in rows]
    assert {row.drive.io for row in rows} == set(IO_MODES)
    assert {row.drive.depth for row in rows} == {1, 2, 4, 8, 16}
    assert all(row.gb_per_s > 0 for row in rows)


def test_bench_disk_remembers_the_best_settings(monkeypatch):
    done = flashmoe("bench", "disk", DEMO, "--seconds", 0.01)
    assert done.exit_code == 1
    assert "of experts, too little to tell" in done.output
    assert not drives.file().exists()
    monkeypatch.setattr(cli_bench, "ENOUGH", 1)
    done = flashmoe("bench", "disk", DEMO, "--seconds", 0.01, "--json")
    report = json.loads(done.output)
    assert Drive(**report["best"]) == drive_of(find(DEMO))
    assert report["kept_in"] == str(drives.file())
    drives.file().unlink()
    done = flashmoe("bench", "disk", DEMO, "--seconds", 0.01, "--no-keep")
    assert "best: io=" in done.output
    assert not drives.file().exists()


def test_unwritable_settings_are_an_error_message(config, monkeypatch):
    monkeypatch.setattr(cli_bench, "ENOUGH", 1)
    config.write_text("a file")
    done = flashmoe("bench", "disk", DEMO, "--seconds", 0.01)
    assert done.exit_code == 1
    assert "drives.json cannot be written" in done.output.splitlines()[-1]
