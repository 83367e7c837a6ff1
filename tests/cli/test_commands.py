"""The commands about models and the prompt cache, and the registry behind them."""

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from toys import write_toy

from flashmoe import catalog
from flashmoe.catalog import CATALOGUE, DEMO
from flashmoe.cli import cli
from flashmoe.errors import RegistryError
from flashmoe.hub import registry


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "Toy-4bit", bits=8)


def run(*args, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in args])
    assert done.exit_code == code, done.output
    return done.output


def here() -> list[str]:
    return [m.name for m in catalog.models() if m.path is not None]


def run_json(*args):
    return json.loads(run(*args, "--json"))


def test_list_misses_a_model(toy):
    run("register", toy, "--alias", "t", "--alias", "u")
    found = {m["name"]: m for m in run_json("list")}
    assert list(found)[:2] == [DEMO, "Toy-4bit"]
    assert set(found) == {DEMO, "Toy-4bit", *CATALOGUE}
    assert found[DEMO]["bits"] == 4
    assert found[DEMO]["K"] == 10
    assert found["Toy-4bit"] == {
        "name": "Toy-4bit",
        "source": "registered",
        "where": str(toy),
        "size": found["Toy-4bit"]["size"],
        "bytes": (toy / "model.safetensors").stat().st_size,
        "bits": 8.0,
        "K": 3,
    }
    flash = found["qwen3.5-397b-flash"]
    assert (flash["K"], flash["size"], flash["where"]) == (4, "about 224 GB", "not on this disk")
    header, *rows = run("list").splitlines()
    assert header.split("\t") == ["name", "size", "bits", "K", "where"]
    assert len(rows) == len(found)
    assert rows[1].split("\t") == ["Toy-4bit", found["Toy-4bit"]["size"], "8", "3", str(toy)]


def test_register_takes_what_cannot_be_used(tmp_path, toy):
    assert "there is no directory" in run("register", tmp_path / "nothing", code=1)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in run("register", tmp_path / "empty", code=1)
    assert "cannot be a name" in run("register", toy, "--name", "a b", code=1)
    assert "cannot be a name" in run("register", toy, "--alias", "-x", code=1)
    run("register", toy, "--alias", "t")
    assert "is taken by Toy-4bit" in run("register", toy, "--name", "t", code=1)
    assert "is taken by Toy-4bit" in run("register", toy, "--name", "z", "--alias", "t", code=1)
    assert [m.name for m in registry.models()] == ["Toy-4bit"]


def test_register_again_keeps_the_old(toy):
    run("register", toy, "--name", "x", "--alias", "old")
    assert run("register", toy, "--name", "x", "--alias", "new").startswith("x: ")
    assert registry.models()[0].aliases == ("new",)
    assert catalog.find("new") == toy
    assert run_json("register", toy, "--name", "x")["name"] == "x"


def test_remove_takes_the_files_or_leaves_the_name(toy):
    run("register", toy, "--alias", "t")
    assert str(toy) in run("remove", "t")
    assert (toy / "model.safetensors").exists()
    assert DEMO in here()
    assert "Toy-4bit" not in here()
    assert "'t' is not registered; registered are: none" in run("remove", "t", code=1)
    run("register", toy)
    assert run_json("remove", "Toy-4bit") == {"name": "Toy-4bit", "path": str(toy)}


def test_moved_checkpoint_is_a_traceback(toy):
    run("register", toy, "--name", "x")
    toy.rename(toy.parent / "elsewhere")
    assert "is not there any more" in run("info", "x", code=1)
    listed = {m["name"]: m for m in run_json("list")}["x"]
    assert "there is no directory" in listed["error"]


def test_info_is_wrong(toy):
    run("register", toy, "--name", "x", "--alias", "y")
    found = run_json("info", "y")
    assert (found["name"], found["aliases"], found["family"]) == ("x", ["y"], "qwen3_5_moe")
    assert (found["layers"], found["experts"], found["trained K"]) == (4, 7, 3)
    assert found["expert bytes"] == 4 * 7 * found["bytes of one expert"]
    assert found["bytes of a token's experts"] == 4 * 3 * found["bytes of one expert"]
    assert found["chat template"] is False
    text = run("info", DEMO)
    assert "family\tqwen3_5_moe" in text
    assert "chat template\tyes" in text
    assert "is not on this disk: it is about 70 GB" in run("info", "qwen3.5-122b", code=1)
    assert "is no model name" in run("info", "nobody", code=1)


def test_chat_template_differs_from_the_file(toy):
    expected = (catalog.find(DEMO) / "chat_template.jinja").read_text()
    assert run("chat-template", DEMO) == expected + "\n"
    assert run_json("chat-template", DEMO)["template"] == expected
    assert "has no chat template" in run("chat-template", toy, code=1)
    (toy / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert run("chat-template", toy) == "{{ messages }}\n"


def test_cache_is_not_shown_or_not_cleared(tmp_path):
    assert run_json("cache", "show")["states"] == 0
    run("run", DEMO, "hello", "--max-tokens", "2", "--slots", "12")
    found = run_json("cache", "show")
    assert found["path"] == str(tmp_path / "states")
    assert found["states"] == 1
    assert found["bytes"] == sum(f.stat().st_size for f in (tmp_path / "states").iterdir())
    assert found["longest"] > 3
    assert "entries\t1" in run("cache")
    assert "freed in" in run("cache", "clear")
    assert run_json("cache", "clear")["freed"] == 0
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"models": 3}', "\x00", '{"models": {"x": 3}}'])
def test_broken_registry_breaks_every_command(text, caplog):
    registry.file().parent.mkdir(parents=True)
    registry.file().write_text(text)
    with caplog.at_level(logging.WARNING, "flashmoe"):
        assert here() == [DEMO]
    assert str(registry.file()) in caplog.text
    assert DEMO in run("list")


def test_broken_registry_is_overwritten(toy):
    registry.file().parent.mkdir(parents=True)
    registry.file().write_text("{")
    with pytest.raises(RegistryError, match="fix it, or remove it"):
        registry.add("x", toy)
    assert registry.file().read_text() == "{"


def test_entry_that_cannot_be_hides_the_others(toy):
    registry.add("good", toy)
    found = json.loads(registry.file().read_text())
    found["models"] |= {"a b": {"path": "/x"}, "no-path": {}, "-": {"path": "/x"}, "l": []}
    registry.file().write_text(json.dumps(found))
    assert [m.name for m in registry.models()] == ["good"]


def test_registry_that_cannot_be_written_is_a_traceback(tmp_path, toy, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "file" / "config"))
    assert here() == [DEMO]
    assert "cannot be" in run("register", toy, code=1)


def test_catalogue_does_not_see_a_download(tmp_path, toy):
    assert catalog.model("qwen3-30b").path is None
    named = toy.rename(tmp_path / "Qwen3-30B-A3B-4bit")
    run("register", named, "--name", "mine")
    assert catalog.find("qwen3-30b") == catalog.find("mine") == named
    run("remove", "mine")
    cached = tmp_path / "hub" / "hub" / "models--mlx-community--Qwen3.5-397B-A17B-4bit"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    named.rename(cached / "snapshots" / "abc")
    for name, experts in (("qwen3.5-397b", None), ("qwen3.5-397b-flash", 4)):
        found = catalog.model(name)
        assert (found.path, found.experts) == (cached / "snapshots" / "abc", experts)
        assert found.source == "downloaded"
    assert catalog.model("qwen3-30b").path is None


def test_registered_name_of_the_catalogue_is_listed_twice(toy):
    run("register", toy, "--name", "qwen3-30b")
    names = [m.name for m in catalog.models()]
    assert names.count("qwen3-30b") == 1
    assert catalog.find("qwen3-30b") == toy
