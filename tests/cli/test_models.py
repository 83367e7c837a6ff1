"""Test the commands that list, register, remove and describe models, and the cache commands."""

import json
from pathlib import Path

import pytest
from command_line import run
from toys import write_toy

from flashmoe import catalog
from flashmoe.catalog import CATALOGUE, DEMO
from flashmoe.hub import registry

pytestmark = pytest.mark.usefixtures("own_directories")


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "Toy-4bit", bits=8)


def here() -> list[str]:
    """Return the names of the models on this disk."""
    return [m.name for m in catalog.models() if m.path is not None]


def run_json(*args):
    return json.loads(run(*args, "--json"))


def test_list_shows_every_model(toy):
    run("register", toy, "--alias", "t", "--alias", "u")
    listed = {m["name"]: m for m in run_json("list")}
    assert list(listed)[:2] == [DEMO, "Toy-4bit"]
    assert set(listed) == {DEMO, "Toy-4bit", *CATALOGUE}
    assert listed[DEMO]["bits"] == 4
    assert listed[DEMO]["K"] == 10
    assert listed["Toy-4bit"] == {
        "name": "Toy-4bit",
        "source": "registered",
        "where": str(toy),
        "size": listed["Toy-4bit"]["size"],
        "bytes": (toy / "model.safetensors").stat().st_size,
        "bits": 8.0,
        "K": 3,
    }
    flash = listed["qwen3.5-397b-flash"]
    assert (flash["K"], flash["size"], flash["where"]) == (4, "about 224 GB", "not on this disk")
    header, *rows = run("list").splitlines()
    assert header.split("\t") == ["name", "size", "bits", "K", "where"]
    assert len(rows) == len(listed)
    assert rows[1].split("\t") == ["Toy-4bit", listed["Toy-4bit"]["size"], "8", "3", str(toy)]


def test_register_refuses_what_cannot_be_used(tmp_path, toy):
    assert "there is no directory" in run("register", tmp_path / "nothing", code=1)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in run("register", tmp_path / "empty", code=1)
    assert "cannot be a name" in run("register", toy, "--name", "a b", code=1)
    assert "cannot be a name" in run("register", toy, "--alias", "-x", code=1)
    run("register", toy, "--alias", "t")
    assert "is taken by Toy-4bit" in run("register", toy, "--name", "t", code=1)
    assert "is taken by Toy-4bit" in run("register", toy, "--name", "z", "--alias", "t", code=1)
    assert [m.name for m in registry.models()] == ["Toy-4bit"]


def test_register_again_replaces_the_entry(toy):
    run("register", toy, "--name", "x", "--alias", "old")
    assert run("register", toy, "--name", "x", "--alias", "new").startswith("x: ")
    assert registry.models()[0].aliases == ("new",)
    assert catalog.find("new") == toy
    assert run_json("register", toy, "--name", "x")["name"] == "x"


def test_remove_deletes_the_name_and_not_the_files(toy):
    run("register", toy, "--alias", "t")
    assert str(toy) in run("remove", "t")
    assert (toy / "model.safetensors").exists()
    assert DEMO in here()
    assert "Toy-4bit" not in here()
    assert "'t' is not registered; registered are: none" in run("remove", "t", code=1)
    run("register", toy)
    assert run_json("remove", "Toy-4bit") == {"name": "Toy-4bit", "path": str(toy)}


def test_moved_checkpoint_is_reported(toy):
    run("register", toy, "--name", "x")
    toy.rename(toy.parent / "elsewhere")
    assert "is not there any more" in run("info", "x", code=1)
    listed = {m["name"]: m for m in run_json("list")}["x"]
    assert "there is no directory" in listed["error"]


def test_info_describes_a_checkpoint(toy):
    run("register", toy, "--name", "x", "--alias", "y")
    shown = run_json("info", "y")
    assert (shown["name"], shown["aliases"], shown["family"]) == ("x", ["y"], "qwen3_5_moe")
    assert (shown["layers"], shown["experts"], shown["trained K"]) == (4, 7, 3)
    assert shown["expert bytes"] == 4 * 7 * shown["bytes of one expert"]
    assert shown["bytes of a token's experts"] == 4 * 3 * shown["bytes of one expert"]
    assert shown["chat template"] is False
    text = run("info", DEMO)
    assert "family\tqwen3_5_moe" in text
    assert "chat template\tyes" in text
    assert "is not on this disk: it is about 70 GB" in run("info", "qwen3.5-122b", code=1)
    assert "is no model name" in run("info", "nobody", code=1)


def test_chat_template_is_printed_as_in_the_file(toy):
    expected = (catalog.find(DEMO) / "chat_template.jinja").read_text()
    assert run("chat-template", DEMO) == expected + "\n"
    assert run_json("chat-template", DEMO)["template"] == expected
    assert "has no chat template" in run("chat-template", toy, code=1)
    (toy / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert run("chat-template", toy) == "{{ messages }}\n"


def test_cache_is_shown_and_cleared(tmp_path):
    assert run_json("cache", "show")["states"] == 0
    run("run", DEMO, "hello", "--max-tokens", "2", "--slots", "12")
    shown = run_json("cache", "show")
    assert shown["path"] == str(tmp_path / "states")
    assert shown["states"] == 1
    assert shown["bytes"] == sum(f.stat().st_size for f in (tmp_path / "states").iterdir())
    assert shown["longest"] > 3
    assert "entries\t1" in run("cache")
    assert "freed in" in run("cache", "clear")
    assert run_json("cache", "clear")["freed"] == 0
    assert list((tmp_path / "states").iterdir()) == []
