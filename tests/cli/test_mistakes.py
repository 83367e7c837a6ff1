"""Mistakes of users end with one line that says what to do, and never with a traceback."""

import pytest
from click.testing import CliRunner

from flashmoe.catalog import DEMO
from flashmoe.cli import cli

RUN = ("run", DEMO, "hello")


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("hello")
    (tmp_path / "a-directory").mkdir()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ((*RUN, "--memory", "banana"), "is not a memory size"),
        ((*RUN, "--memory", "1GB", "--slots", "12"), "not both"),
        ((*RUN, "--depth", "0"), "depth=0 must be 1 or more"),
        ((*RUN, "--depth", "257"), "depth must be between 1 and 256"),
        ((*RUN, "--experts", "0"), "experts=0 must be 1 or more"),
        ((*RUN, "--max-tokens", "0"), "max_tokens=0 is out of range"),
        ((*RUN, "--temperature", "nan"), "temperature=nan is out of range"),
        (("run", "nobody", "hello"), "is no model name"),
        (("run", "a-file", "hello"), "is no model name"),
        (("run", "a-directory", "hello"), "config.json is missing"),
        (("info", "a-directory"), "config.json is missing"),
        (("register", "a-file"), "is not a directory"),
        (("remove", "nobody"), "is not registered"),
        (("download", DEMO), "there is nothing to download"),
        (("download", "qwen3-30b", "--to", "a-file"), "is a file"),
        (("plan", DEMO, "--machine", "pdp-11"), "is not known"),
        (("plan", DEMO, "--network", "nan", "--machine", "m3-16gb"), "network=nan is out of range"),
        (("bench", "disk", DEMO), "pass --no-keep"),
        (("bench", "disk", DEMO, "--no-keep", "--seconds", "0"), "seconds=0.0 must be above 0"),
        (("quantize", DEMO, "out", "--bits", "3", "--down", "2"), "not both"),
        (("quantize", DEMO, "out", "--dense", "x"), "neither a number of bits nor 'keep'"),
        (("quantize", DEMO, "out", "--shard-size", "0"), "is not a memory size"),
        (("quantize", DEMO, "out", "--calibrate", "a-directory"), "Is a directory"),
        (("sweep", DEMO, "--experts", "a"), "write it as 10,6,4"),
        (("sweep", DEMO, "--work", "a-file"), "is a file"),
        (("sweep", DEMO, "--plot", "nowhere/x.svg"), "there is no directory nowhere"),
        (("serve", DEMO, "--host", "0.0.0.0"), "an API key is required"),
        (("serve", DEMO, "--queue", "-1"), "queue=-1 must be 0 or more"),
        (("serve", DEMO, "--timeout", "nan"), "timeout=nan must be above 0"),
        (("serve", DEMO, "--batch", "0"), "batch=0 must be 1 or more"),
        (("info",), "Missing argument 'MODEL'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_mistake_is_explained_in_one_line(command, says):
    done = CliRunner().invoke(cli, command)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    last = done.output.splitlines()[-1]
    assert last.startswith("Error: ")
    assert says in last


def test_prompt_that_is_not_text_is_refused():
    done = CliRunner(charset="utf-8").invoke(cli, ["run", DEMO], input=b"\xff\xfe")
    assert done.exit_code == 1
    assert "the prompt on standard input is not text" in done.output
