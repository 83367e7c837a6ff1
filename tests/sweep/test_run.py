"""Test `flashmoe sweep` through the command."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from toys import write_chat_toy, write_toy

from flashmoe.catalog import DEMO
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.cli import cli
from flashmoe.models.streaming_moe import StreamingMoE
from flashmoe.plan import speed_probe
from flashmoe.sweep import cost as sweep_cost
from flashmoe.sweep import pass_rates
from flashmoe.sweep import run as driver
from flashmoe.sweep.cost import token_bytes
from flashmoe.sweep.versions import read_versions

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

TEXT = "The cat sat by the sea. It asked a friend what bread is made of, and why leaves fall. "
FEW = ("--tokens", 40, "--calls", 0, "--schemas", 0)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(sweep_cost, "SPEED_TOKENS", 4)
    monkeypatch.setattr(pass_rates, "MAX_TOKENS", 60)


@pytest.fixture(autouse=True, scope="module")
def short_measurements():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STEPS_SECONDS", "DISK_SECONDS"):
            patch.setattr(speed_probe, name, 0.05)
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_chat_toy(tmp_path_factory.mktemp("sweep") / "toy")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sweep") / "text"
    file.write_text(TEXT * 8)
    return file


def run(*args, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["sweep", *map(str, args)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.output


def run_json(*args) -> dict:
    return json.loads(run(*args, "--json"))


def points(report: dict) -> dict:
    """Return the points of a report by version and K."""
    return {(p["version"], p["experts"]): p for p in report["points"]}


def test_sweep_measures_every_version_and_k(toy, text, tmp_path):
    plot = tmp_path / "plot.svg"
    report = run_json(
        toy, "--experts", "3,1", "--bits", "4,2/3", "--text", text, *FEW, "--plot", plot
    )  # fmt: skip
    every = points(report)
    assert list(every) == [("own", 3), ("own", 1), ("2/3", 3), ("2/3", 1)]
    exact = every["own", 3]["fidelity"]
    assert (exact["kl"], exact["excess"], exact["same_top"], exact["tokens"]) == (0, 0, 1, 40)
    assert all(p["fidelity"]["kl"] > 0.001 for key, p in every.items() if key != ("own", 3))
    layer = Checkpoint.open(toy).expert_layers[0]
    assert every["own", 3]["size"]["expert_bytes"] == 4 * 3 * layer.expert_nbytes
    assert every["2/3", 1]["size"]["bits"] == pytest.approx(7 / 3)
    assert every["2/3", 1]["size"]["expert_bytes"] < 4 * layer.expert_nbytes
    for p in every.values():
        assert p["speed"]["tokens_per_second"] > 0
        assert set(p) == {"version", "experts", "size", "fidelity", "speed"}
    assert report["whole"]
    ET.parse(plot)


def test_sweep_of_the_demo_asks_for_calls_and_documents():
    by_k = points(
        run_json(DEMO, "--experts", "10", "--tokens", 12, "--calls", 1, "--schemas", 1)
    )  # fmt: skip
    assert list(by_k) == [("own", 10)]
    point = by_k["own", 10]
    assert point["fidelity"]["kl"] == 0
    assert 1 < point["fidelity"]["perplexity"] < 50
    assert point["calls"]["grammar"] == {"asked": 1, "passed": 1, "right": 1, "cut": 0}
    held = point["schemas"]["grammar"]
    assert held["passed"] + held["cut"] == 1
    assert point["schemas"]["free"]["asked"] == 1


def test_second_sweep_reuses_points_and_versions(toy, text, tmp_path):
    """A sweep of more points uses the points that exist; one of another text uses the versions."""
    work = tmp_path / "work"
    common = (toy, "--work", work, *FEW)
    first = run_json(*common, "--experts", 1, "--bits", 2, "--text", text)
    assert list(points(first)) == [("own", 3), ("2", 1)]
    files = {f: f.stat().st_mtime_ns for f in work.rglob("*.safetensors")}
    assert len(files) == 1
    (journal,) = work.rglob("points.jsonl")
    with open(journal, "a") as f:
        f.write('{"key": "own", "exp')  # what a killed process leaves
    again = run_json(*common, "--experts", "2,1", "--bits", 2, "--text", text)
    assert points(again)["2", 1] == points(first)["2", 1]
    assert ("2", 2) in points(again)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    run_json(*common, "--experts", 1, "--bits", 2)
    assert {f: f.stat().st_mtime_ns for f in work.rglob("*.safetensors")} == files


def test_only_one_model_is_in_memory(toy, text, tmp_path):
    """The model that read the text is freed before the engine loads one."""
    seen, held = {}, {}

    def models():
        return [o for o in gc.get_objects() if issubclass(type(o), StreamingMoE)]

    @contextmanager
    def progress(what, total):
        seen[what] = len(models()) - len(before)
        held[what] = mx.get_cache_memory()
        yield lambda done: None

    checkpoint = Checkpoint.open(toy)
    settings = driver.Settings((3,), text, 40, calls=0, schemas=0)
    versions = read_versions(["own", "2"], checkpoint)
    gc.collect()
    before = models()  # other tests of this process hold them, and so does this list
    gc.disable()  # models must be freed at once, and not at the next collection
    try:
        driver.Sweep(checkpoint, versions, settings, tmp_path, keep=True, progress=progress).run()
    finally:
        gc.enable()
    assert list(seen) == ["own: text", "own: answers", "2: rounding", "2: text", "2: answers"]
    assert list(seen.values()) == [1, 0, 0, 1, 0]
    assert held["own: answers"] == held["2: rounding"] == held["2: answers"] == 0


def test_other_checkpoint_is_a_version(toy, text, tmp_path):
    other = write_chat_toy(tmp_path / "other", seed=1)
    by_version = points(run_json(toy, "--experts", 3, "--bits", other, "--text", text, *FEW))
    assert list(by_version) == [("own", 3), (str(other), 3)]
    assert by_version[str(other), 3]["fidelity"]["kl"] > 0.1
    small = write_chat_toy(tmp_path / "small", num_experts=5)
    output = run(toy, "--bits", small, "--text", text, *FEW, code=1)
    assert "num_experts 5" in output
    assert "has 7" in output


def test_bytes_of_a_token_leave_out_what_it_does_not_read(tmp_path):
    tied, own = (
        Checkpoint.open(write_toy(tmp_path / str(tie), "qwen3_next", tie=tie))
        for tie in (True, False)
    )
    embedding = sum(t.nbytes for t in own.dense if "embed_tokens" in t.name)
    head = sum(t.nbytes for t in own.dense if "lm_head" in t.name)
    assert token_bytes(own, 2).dense == own.dense_nbytes - embedding
    assert token_bytes(tied, 2).dense == tied.dense_nbytes == own.dense_nbytes - head
    assert token_bytes(own, 3).experts == 3 * own.expert_nbytes // own.num_experts


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (("--experts", "4"), "experts must be between 1 and 3"),
        (("--experts", "0"), "experts must be between 1 and 3"),
        (("--experts", "two"), "write it as 10,6,4"),
        (("--bits", "8"), "would not make the experts of"),
        (("--bits", "7"), "2, 3, 4, 5, 6, 8"),
        (("--bits", "nobody"), "is no model name"),
        (("--text", "/nowhere"), "there is no file /nowhere"),
        (("--tokens", "5000"), "a longer one, or --tokens"),
        (("--memory", "much"), "is not a memory size"),
        (("--plot", "/nowhere/plot.svg"), "there is no directory /nowhere"),
    ],
)
def test_invalid_option_is_refused(toy, text, options, output):
    assert output in run(toy, "--text", text, *FEW, *options, code=1)


def test_checkpoint_without_a_template_needs_a_text(tmp_path, toy, text):
    path = write_chat_toy(tmp_path / "toy")
    (path / "chat_template.jinja").unlink()
    assert "--text FILE --calls 0 --schemas 0" in run(path, code=1)
    by_k = points(run_json(path, "--experts", 1, "--text", text, *FEW))
    assert set(by_k["own", 1]) == {"version", "experts", "size", "fidelity"}


def test_disk_without_enough_space_is_refused(toy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    output = run(toy, "--bits", 2, "--work", tmp_path / "work", code=1)
    assert "1.0 MB free" in output
    assert "--work on another disk" in output
    assert not (tmp_path / "work").exists()


def test_ctrl_c_keeps_finished_points(toy, text, tmp_path):
    work = tmp_path / "work"
    options = ("--experts", "3,2,1", "--text", text, "--work", work)
    options += ("--tokens", 40, "--calls", 120, "--schemas", 0)
    code = "from flashmoe import cli\nfrom flashmoe.sweep import cost\n"
    code += "cost.SPEED_TOKENS = 4\ncli.cli()"
    command = [sys.executable, "-c", code, "sweep", toy, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), **pipes)
    while not any('"speed"' in f.read_text() for f in work.rglob("points.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        ["version", "K"], ["own", "3"], ["own", "2"], ["own", "1"]
    ]  # fmt: skip
    assert "stopped before all points were measured" in err


def test_a_sweep_says_before_it_begins_how_long_it_takes(toy, text, tmp_path):
    checkpoint = Checkpoint.open(toy)

    def forecast(settings: driver.Settings) -> float | None:
        versions = read_versions(["own"], checkpoint)
        return driver.Sweep(
            checkpoint, versions, settings, tmp_path, keep=True, progress=_no_progress
        ).forecast_seconds()

    few = driver.Settings((3,), text, 40, calls=0, schemas=1)
    more = driver.Settings((3, 2, 1), text, 40, calls=20, schemas=12)
    assert 0 < forecast(few) < forecast(more)
    assert forecast(driver.Settings((3,), text, 40, memory="1MB")) is None
    driver.Sweep(
        *(checkpoint, read_versions(["own"], checkpoint), few, tmp_path),
        keep=True,
        progress=_no_progress,
    ).run()
    assert forecast(few) == 0  # all of it is there


@contextmanager
def _no_progress(what, total):
    yield lambda done: None
