"""Tests of generation_config.json: what sets how tokens are sampled, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
from checkpoint_edits import assert_refused

from flashmoe.checkpoint.checkpoint import Checkpoint


@pytest.fixture
def toy(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "one", tmp_path / "toy"))


def write(toy: Path, **fields) -> None:
    (toy / "generation_config.json").write_text(json.dumps(fields))


def sampling(toy: Path) -> dict:
    return Checkpoint.open(toy).generation.sampling


def test_missing_file_sets_nothing(toy):
    assert sampling(toy) == {}


@pytest.mark.parametrize("do_sample", [True, None])
def test_values_are_defaults_of_sampling(toy, do_sample):
    values = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0}
    write(toy, **values, do_sample=do_sample, repetition_penalty=1.05, transformers_version="5.0")
    assert sampling(toy) == values


def test_greedy_model_samples_nothing(toy):
    write(toy, temperature=0.7, do_sample=False)
    assert sampling(toy) == {}


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p"])
def test_zero_is_legal_and_null_is_as_absent(toy, name):
    write(toy, **{name: 0})
    assert sampling(toy) == {name: 0}
    write(toy, **{name: None})
    assert sampling(toy) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", value) for value in (-1, 101, 1e309, math.nan, 1e-40, "x", True, [0.7])]
    + [("top_p", value) for value in (-0.1, 1.1, math.nan, "x", False, {})]
    + [("min_p", value) for value in (-0.1, 1.1, math.inf, "x", True, [])]
    + [("top_k", value) for value in (-1, 20.5, 2**31, math.inf, "20", True, [20])]
    + [("do_sample", value) for value in (0, 1, "false", [])],
)
def test_impossible_value_is_refused(toy, name, value):
    write(toy, **{name: value})
    assert_refused(toy, str(toy / "generation_config.json"), f"has {name} {value!r}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"a":' * 70 + "1" + "}" * 70, "nests more than 64 levels"),
        ("[1]", "must hold a JSON object"),
        ("{", "is not valid JSON"),
    ],
    ids=["deep", "levels", "array", "cut"],
)
def test_damaged_file_is_refused(toy, text, message):
    (toy / "generation_config.json").write_text(text)
    assert_refused(toy, str(toy / "generation_config.json"), message)
