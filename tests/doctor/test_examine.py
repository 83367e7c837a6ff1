"""Test `flashmoe doctor` as users run it, with problems of each kind that are really planted."""

import ctypes
import getpass
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pseudo_terminal import lines, show
from toys import write_toy

import flashmoe
from flashmoe.catalog import DEMO, find
from flashmoe.cli import doctor as cli_doctor
from flashmoe.doctor import examine as doctor
from flashmoe.doctor import machine, self_test
from flashmoe.ops import backend as ops
from flashmoe.streaming.drives import Drive, drive_of
from flashmoe_metal import kernel

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

FLASHMOE = [sys.executable, "-c", "from flashmoe.cli import cli; cli()"]


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))


@pytest.fixture
def no_self_test(monkeypatch):
    """Skip the self-test in tests that are about something else."""
    monkeypatch.setattr(self_test, "run", lambda path: [])


def run(*args, code=0, command=FLASHMOE, preexec_fn=None, **variables) -> str:
    done = subprocess.run(
        [*command, "doctor", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        preexec_fn=preexec_fn,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def problems(report, section) -> list[str]:
    """Return the problems of a section as texts."""
    entries = report["problems"] if isinstance(report, dict) else report.as_json()["problems"]
    return [f"{p['what']} -> {p['way_out']}" for p in entries if p["section"] == section]


def test_screen_is_short_and_has_every_section():
    secret = "hf_aSecretThatNobodyMaySee"
    home = Path.home()
    screen = lines(
        show(
            "doctor",
            DEMO,
            columns=100,
            **{f"NUMBA_OF_{n}": "x" * 50 for n in range(3)},
            FLASHMOE_HUB_TOKEN=secret,
            FLASHMOE_PROXY=f"http://me:{secret}@host/x",
            FLASHMOE_CACHE=str(home / ".cache" / "of-this-test"),
            MLX_SOMETHING="7",
        )
    )
    assert len(screen) <= 45
    assert max(map(len, screen)) <= 100
    for section in (*cli_doctor.SHOWN, "all is well"):
        assert any(line.startswith(f"{section}  ") for line in screen)
    text = " ".join(" ".join(screen).split())
    assert "0 of 81,920 logits differ from all experts resident" in text
    assert f"mlx {machine.versions()['mlx']}" in text
    assert "MLX_SOMETHING=7" in text
    assert secret not in text
    assert "FLASHMOE_HUB_TOKEN=(set, not shown)" in text
    assert "~/.cache/of-this-test" in text
    assert f"{home}/" not in text


@pytest.mark.parametrize("used", ["reference"])
def test_json_has_every_section_and_the_ops_in_use(used):
    report = json.loads(run("--json", FLASHMOE_OPS=used))
    assert report["ok"] is True
    assert report["problems"] == []
    sections = ("versions", "environment", "backend", "ops", "memory", "open files", "cache")
    assert {*sections, "reading", "self-test", "cpu"} <= report.keys()
    assert report["ops"]["used"] == used
    assert report["environment"]["FLASHMOE_OPS"] == used
    assert report["reading"]["drives"][0]["io"] == drive_of(find(DEMO)).io
    assert report["reading"]["probe"]["gb_per_s"] > 0
    assert 0 < report["memory"]["default"] <= report["memory"]["total"]
    checks = {c["name"]: c for c in report["self-test"]["checks"]}
    assert checks["demo file"]["passed"]
    assert checks["streaming"]["found"] == 0
    assert all(c["passed"] for c in checks.values())


def few_open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
    if sys.platform == "linux":  # root could raise it again: PR_CAPBSET_DROP, CAP_SYS_RESOURCE
        ctypes.CDLL(None).prctl(24, 24, 0, 0, 0)


def test_open_files_are_counted_after_the_limit_was_raised():
    code = "from flashmoe.doctor import machine; print(machine.open_files())"
    command = ["bash", "-c", f'ulimit -Sn 100; ulimit -Hn 1000; exec {sys.executable} -c "{code}"']
    done = subprocess.run(command, capture_output=True, text=True)
    assert eval(done.stdout) == {"soft": 100, "hard": 1000, "raised": 1000, "shards": 484}


def test_unknown_ops_few_open_files_and_a_missing_model_are_problems():
    """One process has a broken setting, a low limit and a model name that does not exist."""
    text = run("no-such-model", code=1, preexec_fn=few_open_files, FLASHMOE_OPS="fast")
    header, *rows = text.splitlines()
    assert header == "section\tresult"
    assert all(len(row.split("\t")) == 2 for row in rows)
    words = " ".join(text.split())
    assert "PROBLEM" in text
    assert "ops: FLASHMOE_OPS='fast' is not one of cpu, fused, gather, reference" in words
    assert "unset FLASHMOE_OPS" in words
    assert "the hard limit on open files is 30, too low for a model" in words
    assert "limits.conf" in words
    assert "'no-such-model' is no model name" in words
    assert "all is well" not in text


def linked_copy(directory: Path) -> Path:
    """Link the package with a copy of the demo model, and return its model.safetensors."""
    package = Path(flashmoe.__file__).parent
    (directory / "flashmoe").mkdir(parents=True)
    for path in package.iterdir():
        if path.name not in ("demo", "__pycache__"):
            (directory / "flashmoe" / path.name).symlink_to(path)
    shutil.copytree(package / "demo", directory / "flashmoe" / "demo")
    return directory / "flashmoe" / "demo" / "model.safetensors"


def test_corrupt_demo_fails_the_self_test(tmp_path):
    weights = linked_copy(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-100_000:-50_000] = b"\xff" * 50_000
    weights.write_bytes(content)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {FLASHMOE[2]}"
    command = [sys.executable, "-c", start]
    report = json.loads(run("--json", code=1, command=command, FLASHMOE_OPS="reference"))
    (problem, *_) = problems(report, "self-test")
    assert "demo file: not as shipped" in problem
    assert "install flashmoe again" in problem


def test_wrong_logits_fail_the_self_test(monkeypatch):
    """The logits of each model differ a little from those of the model before."""
    right = self_test._logits
    scale = iter([1.0, 1.0 + 1e-3, 1.0 + 2e-3])
    monkeypatch.setattr(self_test, "_logits", lambda m: right(m) * np.float32(next(scale)))
    checks = {c.name: c for c in self_test.run(find(DEMO))}
    assert checks["demo file"].passed
    assert not checks["streaming"].passed
    assert checks["streaming"].value > 1000
    assert not checks["kernels"].passed
    assert checks["kernels"].value > self_test.TOLERANCE


def test_nan_is_never_the_same_bits():
    nan = np.full((2, 2), np.nan, np.float32)
    assert not self_test._same_bits(nan, nan).passed
    assert self_test._same_bits(np.ones_like(nan), np.ones_like(nan)).passed


def test_gpu_kernels_are_used_if_they_can_be_launched(no_self_test):
    def launch(kernel, **call):
        raise AssertionError("nothing is computed here")

    with kernel.launched_by(launch):
        section = doctor.examine().sections["ops"]
    assert section["used"] == "fused"
    assert "cpu" in section["missing"]
    assert doctor.examine().sections["ops"]["used"] == ops.pick().name


def test_broken_checkpoint_is_a_problem(tmp_path, no_self_test):
    toy = write_toy(tmp_path / "toy", bits=8)
    report = doctor.examine(str(toy))
    assert "has no tokenizer that can be read" in problems(report, "model")[0]
    assert report.sections["model"]["shards"] == 1
    assert report.sections["model"]["plan"]["num_layers"] > 0
    os.truncate(toy / "model.safetensors", 5000)
    (problem,) = problems(doctor.examine(str(toy)), "model")
    assert "model.safetensors" in problem
    assert "download" in problem


def test_sparse_file_of_a_download_is_a_problem(tmp_path, no_self_test):
    toy = write_toy(tmp_path / "toy", bits=8)
    weights = toy / "model.safetensors"
    head = weights.read_bytes()[:65536]
    nbytes = weights.stat().st_size
    weights.write_bytes(head)
    os.truncate(weights, nbytes)
    if weights.stat().st_blocks * 512 >= nbytes // 2:
        pytest.skip("this file system has no holes, or the toy is small")
    assert any("download it again" in p for p in problems(doctor.examine(str(toy)), "model"))


def test_broken_settings_are_problems(tmp_path, no_self_test):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "drives.json").write_text("{")
    (tmp_path / "states").write_text("a file")
    report = doctor.examine()
    assert "drives.json cannot be read" in problems(report, "settings")[0]
    assert "set FLASHMOE_CACHE" in problems(report, "cache")[0]
    assert len(problems(report, "settings")) == 1, "each problem is reported once"


def test_failing_section_does_not_hide_the_others(monkeypatch, no_self_test):
    def broken(_):
        raise RuntimeError("planted")

    monkeypatch.setattr(machine, "memory_facts", broken)
    report = doctor.examine()
    assert "RuntimeError: planted" in problems(report, "memory")[0]
    assert {"versions", "ops", "reading", "cpu"} <= report.sections.keys()
    assert not report.ok


def test_measured_drive_is_shown_as_measured(no_self_test):
    from flashmoe.streaming.drives import remember

    remember(find(DEMO), Drive("uncached", 3, 1 << 20))
    (drive, *_) = doctor.examine().sections["reading"]["drives"]
    assert (drive["io"], drive["depth"], drive["split"]) == ("uncached", 3, 1 << 20)
    assert drive["measured"]


def test_old_package_is_reported(monkeypatch):
    assert machine.unmet() == []
    monkeypatch.setattr(machine, "_version", lambda name: "0.1")
    assert any("numba>=0.61 is needed, but 0.1 is installed" in text for text in machine.unmet())


def test_name_of_the_user_is_replaced(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/ada")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    anonymous = machine.anonymous(
        {"a": ["/Users/ada/m", "/Users/adam/m"], "b": "x=/mnt/ada/m;/Users/ada", "c": 3}
    )
    assert anonymous == {"a": ["~/m", "/Users/adam/m"], "b": "x=/mnt/USER/m;~", "c": 3}
