"""Test the registry of models, also when its file is broken or cannot be written."""

import json
import logging
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
