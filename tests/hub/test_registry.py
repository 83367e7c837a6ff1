"""Test the registry of models, also when its file is broken or cannot be written."""

import json
import logging
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from toys import write_toy

from flashmoe import catalog
from flashmoe.catalog import DEMO
from flashmoe.errors import RegistryError
from flashmoe.hub import registry

pytestmark = pytest.mark.usefixtures("own_directories")


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "Toy-4bit", bits=8)


def here() -> list[str]:
    """Return the names of the models on this disk."""
    return [m.name for m in catalog.models() if m.path is not None]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": 3}', "\x00", '{"models": {"x": 3}}'])
def test_broken_registry_is_ignored_with_a_warning(text, caplog):
    registry.file().parent.mkdir(parents=True)
    registry.file().write_text(text)
    with caplog.at_level(logging.WARNING, "flashmoe"):
        assert here() == [DEMO]
    assert str(registry.file()) in caplog.text
    assert DEMO in run("list")


def test_broken_registry_is_not_overwritten(toy):
    registry.file().parent.mkdir(parents=True)
    registry.file().write_text("{")
    with pytest.raises(RegistryError, match="fix it, or remove it"):
        registry.add("x", toy)
    assert registry.file().read_text() == "{"


def test_invalid_entries_do_not_hide_the_others(toy):
    registry.add("good", toy)
    content = json.loads(registry.file().read_text())
    content["models"] |= {"a b": {"path": "/x"}, "no-path": {}, "-": {"path": "/x"}, "l": []}
    registry.file().write_text(json.dumps(content))
    assert [m.name for m in registry.models()] == ["good"]


def test_unwritable_registry_is_an_error_of_register(tmp_path, toy, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "file" / "config"))
    assert here() == [DEMO]
    assert "cannot be" in run("register", toy, code=1)


def test_entries_of_processes_that_register_at_once_are_all_kept(tmp_path, toy):
    command = [Path(sys.executable).parent / "flashmoe", "register", toy, "--name"]
    started = [subprocess.Popen([*command, f"toy-{i}"]) for i in range(8)]
    assert [process.wait(300) for process in started] == [0] * 8
    assert [model.name for model in registry.models()] == [f"toy-{i}" for i in range(8)]
    removed = [subprocess.Popen([command[0], "remove", f"toy-{i}"]) for i in range(7)]
    assert [process.wait(300) for process in removed] == [0] * 7
    assert [model.name for model in registry.models()] == ["toy-7"]
    assert {path.name for path in registry.file().parent.iterdir()} == {
        "models.json",
        "models.lock",
    }


def test_name_that_two_processes_want_goes_to_one(tmp_path, toy):
    command = [Path(sys.executable).parent / "flashmoe", "register", toy, "--alias", "t", "--name"]
    started = [subprocess.Popen([*command, f"toy-{i}"], stderr=subprocess.PIPE) for i in range(4)]
    errors = [process.communicate(timeout=300)[1].decode() for process in started]
    assert len(registry.models()) == 1
    assert sum("'t' is taken by toy-" in error for error in errors) == 3


def test_partial_file_of_a_killed_process_is_removed_at_the_next_start(toy):
    registry.add("x", toy)
    left = registry.file().with_name(".models-abcdefgh.json")
    left.write_text("{")
    assert DEMO in run("list")
    assert not left.exists()


def test_user_without_a_home_directory_has_no_registered_models(tmp_path, monkeypatch, caplog):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "FLASHMOE_CONFIG", "FLASHMOE_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert here() == [DEMO]
    assert caplog.text == ""
    said = run("register", catalog.find(DEMO), "--name", "x", code=1)
    assert "has no home directory: set HOME, or FLASHMOE_CONFIG" in said
    assert "FLASHMOE_CACHE" in run("cache", "show", code=1)
