"""Test what is measured of this machine for a plan."""

import math

import command_line
import pytest
from moe_types import write_moe
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.plan import speed_probe


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    for name in ("STEPS_SECONDS", "DISK_SECONDS"):
        monkeypatch.setattr(speed_probe, name, 0.1)
    monkeypatch.setattr(speed_probe, "SCRATCH_NBYTES", 1 << 25)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_next", "qwen3_moe"])
def test_speeds_of_the_families_are_measured(tmp_path, name):
    costs = speed_probe.measure_compute(Checkpoint.open(write_toy(tmp_path / "m", name)), 3)
    assert 0 <= costs.layer_seconds < 1
    assert 0 < costs.weights_gb_s < 1000
    assert costs.disk_gb_s == math.inf


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "bailing_moe"])
def test_models_of_other_types_are_planned(tmp_path, name):
    """The router of bailing_moe cannot choose a single expert, which the others are measured at."""
    path = write_moe(tmp_path / "m", name, bits=4)
    assert "runs\tyes" in command_line.run("plan", path, "--prompt", 20)


def test_scratch_file_is_removed(tmp_path):
    checkpoint = Checkpoint.open(write_toy(tmp_path / "m"))
    probe = speed_probe.measure_disk(checkpoint, misses=2, pause=0.001, scratch=tmp_path)
    assert probe.gb_per_s > 0
    assert "scratch file" in probe.what
    assert not list(tmp_path.glob(".flashmoe*"))
    with pytest.raises(SettingError, match="cannot write a scratch file"):
        speed_probe.measure_disk(checkpoint, misses=2, pause=0.001, scratch=tmp_path / "none")
