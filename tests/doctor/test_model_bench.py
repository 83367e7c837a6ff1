"""Tests `flashmoe bench model`, the speed of a model on this machine."""

import json

from click.testing import CliRunner
from toys import write_chat_toy

from flashmoe.cli import cli
from flashmoe.doctor.model_bench import COLUMNS, Speed


def bench(*words):
    return CliRunner().invoke(cli, ["bench", "model", *map(str, words)])


def test_figures_of_a_model_are_measured(tmp_path):
    path = write_chat_toy(tmp_path / "toy")
    options = ["--slots", "5", "--tokens", "5", "--answers", "2", "--json"]
    done = bench(path, *options)
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["model"]["type"] == "qwen3_5_moe"
    assert figures["peak"] > 0
    assert figures["answers"] == 2
    cold, warm, long = figures["cold"], figures["warm"], figures["long_prompt"]
    assert cold["hit_rate"] < 1
    assert cold["gb_per_s"] > 0
    assert min(cold["tokens_per_second"], warm["tokens_per_second"]) > 0
    assert long["prompt_tokens"] > 10 * warm["prompt_tokens"]


def test_row_has_a_cell_for_each_column(tmp_path):
    path = write_chat_toy(tmp_path / "toy")
    options = ["--slots", "5", "--tokens", "3", "--answers", "1"]
    lines = bench(path, *options).stdout.splitlines()
    assert lines[-3] == COLUMNS
    assert len({line.count("|") for line in lines[-3:]}) == 1


def test_speeds_that_cannot_be_measured_are_refused():
    done = bench("flashmoe-demo", "--tokens", "1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "tokens=1 and answers=3 must be at least 2 and 1" in done.stderr


def test_median_is_of_each_figure():
    speeds = [Speed(1, 9, 5, 0, 1), Speed(2, 8, 6, 1, 1), Speed(3, 1, 1, 0.5, 1)]
    assert Speed.median_of(speeds) == Speed(2, 8, 5, 0.5, 1)
