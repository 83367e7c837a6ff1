"""The fuzzers of tools/fuzz: what they find, and that inputs can be made again."""

import os
import signal
from pathlib import Path
from time import monotonic

import pytest
from fuzz.checkpoint_mutations import CHANGES, mutated
from fuzz.checkpoint_worker import make
from fuzz.findings import Findings
from fuzz.known_checkpoints import KNOWN
from fuzz.toy_files import TOYS, read_toy, write_toys

from fuzz import checkpoints, request_mutations, requests, values

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    write_toys(root)
    return {name: read_toy(root / name) for name in TOYS}


def _is_small(file):
    return not file.is_symlink() and file.is_file() and file.stat().st_size < 10**8


def files(directory):
    """Return what each entry of a directory is, without reading what never ends."""
    return {
        f.name: f.read_bytes() if _is_small(f) else f.lstat().st_mode for f in directory.iterdir()
    }


def test_same_number_makes_the_same_checkpoint(toys, tmp_path):
    for number in (0, 40, *range(len(KNOWN), len(KNOWN) + 150)):
        for copy in ("a", "b"):
            mutant, original, _ = make(7, number, toys)
            mutant.write(tmp_path / copy, original)
        assert mutant.changes
        assert files(tmp_path / "a") == files(tmp_path / "b"), mutant.changes


def test_mutants_leave_the_toys_as_they_are(toys):
    before = {name: files(toy.toy) for name, toy in toys.items()}
    for number in range(400):
        make(3, number, toys)
    assert {name: files(toy.toy) for name, toy in toys.items()} == before
    for toy in toys.values():
        again = read_toy(toy.toy)
        assert (again.documents, again.weights, again.template) == (
            toy.documents,
            toy.weights,
            toy.template,
        )


def test_each_change_is_made(toys):
    from random import Random

    random = Random(1)
    for change in CHANGES:
        for toy in toys.values():
            for _ in range(20):
                assert change(random, toy.copy())
    assert mutated(random, toys["qwen3"]).changes


def test_same_number_makes_the_same_request():
    for number in (*range(0, 20, 3), *range(100, 200)):
        one, other = (request_mutations.make(7, number) for _ in range(2))
        assert (one.body, one.headers, one.changes) == (other.body, other.headers, other.changes)
        assert one.changes


def test_dumps_writes_what_json_cannot():
    assert values.dumps({"a": ["@@raw3@@", "x"]}) == '{"a": [NaN, "x"]}'
    assert values.drop({"a": [1, 2]}, ("a", 0)) == {"a": [2]}
    assert values.put({"a": [1, 2]}, ("a", 1), 3) == {"a": [1, 3]}


def test_findings_are_reported_once(capsys):
    findings = Findings()
    for _ in range(3):
        findings.add("crash SIGFPE", "a.py:1", "checkpoints --replay 1:2", "bits = 0")
    findings.count("refused")
    assert capsys.readouterr().out.count("crash SIGFPE") == 1
    assert "3 x crash SIGFPE" in findings.summary()
    assert findings.summary().endswith("4 inputs: crash SIGFPE: 3, refused: 1")


@pytest.mark.slow
def test_worker_that_crashes_or_hangs_is_a_finding(tmp_path, monkeypatch):
    """The worker runs its mutants as long as its process lives, and its end has a name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(checkpoints, "SECONDS", 3.0)
    write_toys(tmp_path)
    for sent, why in ((signal.SIGSEGV, "crash SIGSEGV"), (signal.SIGSTOP, "hang")):
        worker = checkpoints.Worker(tmp_path, tmp_path / "work", seed=1)
        try:
            assert worker.run(len(KNOWN) + 1)["outcome"] in ("loaded", "refused")
            os.kill(worker.pid, sent)
            with pytest.raises(checkpoints.Died, match=why):
                worker.run(len(KNOWN) + 2)
        finally:
            worker.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [(checkpoints, 150), (requests, 25)])
def test_hostile_input_is_refused_or_right(kind, count):
    """`make fuzz` in short: the seed is always the same, so that a change that fails is known."""
    findings = Findings()
    run = kind.Run(seed=19, jobs=1, findings=findings)
    try:
        run.run(first=10_000, count=count, until=monotonic() + 600)
    finally:
        run.close()
    assert findings.broken is None
    assert not findings.kinds, findings.summary()
    assert sum(findings.outcomes.values()) == count
