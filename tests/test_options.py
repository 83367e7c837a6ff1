"""Test that options are checked where they are given, and are the same for every interface."""

from pathlib import Path

import pytest

import flashmoe
from flashmoe.errors import SettingError
from flashmoe.options import ACTIVATIONS, IO_MODES, EngineOptions, LoadOptions, with_settings

NOWHERE = Path("no checkpoint is opened")


@pytest.mark.parametrize("take", [flashmoe.Engine, flashmoe.load])
def test_misspelt_option_fails_at_once(take):
    with pytest.raises(TypeError, match=r"unknown option 'memroy': options are memory, "):
        take(NOWHERE, memroy="8GB")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "lots"),
        ("memory", True),
        ("slots", 0),
        ("slots", 2.0),
        ("experts", -1),
        ("experts", True),
        ("context", 0),
        ("depth", 0),
        ("depth", 10**5),
        ("io", "fast"),
        ("activations", "int4"),
        ("prompt_cache", "-1"),
    ],
)
def test_impossible_value_names_its_option(name, value):
    named = repr(value) if name in ("memory", "prompt_cache") else f"{name}={value!r}"
    with pytest.raises(SettingError) as e:
        LoadOptions(**{name: value})
    assert named in str(e.value)


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("prompt_store", "x"), ("slots", "3")])
def test_engine_refuses_impossible_values_before_a_request(name, value):
    with pytest.raises(SettingError):
        flashmoe.Engine(NOWHERE, **{name: value})


def test_memory_and_slots_exclude_each_other():
    with pytest.raises(SettingError, match="not both"):
        LoadOptions(memory="8GB", slots=4)
    with pytest.raises(SettingError, match="not both"):
        with_settings(LoadOptions(memory="8GB"), {"slots": 4})


def test_settings_replace_fields_of_options():
    options = with_settings(EngineOptions(memory="8GB", batch=2), {"batch": 3})
    assert (options.memory_nbytes, options.batch) == (8 * 10**9, 3)
    assert options == EngineOptions(memory="8GB", batch=3)


def test_zero_and_none_of_a_prompt_cache_differ():
    assert LoadOptions().prompt_cache_nbytes == 0
    assert EngineOptions().prompt_cache_nbytes is None
    assert EngineOptions(prompt_cache="1MB").prompt_cache_nbytes == 10**6
    assert EngineOptions(prompt_store=0).prompt_store_nbytes == 0


def test_choices_are_those_that_the_code_has():
    from flashmoe.ops.cpu.experts import CpuBackend
    from flashmoe.streaming import io_modes

    assert set(IO_MODES) == set(io_modes.IO_MODES)
    assert CpuBackend.activations == ACTIVATIONS
