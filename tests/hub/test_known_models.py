"""Test the models that are known by name, and how their checkpoints are looked up on this disk."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import run
from hub_server import COMMIT
from toys import write_toy

from flashmoe import catalog
from flashmoe.catalog import CATALOGUE
from flashmoe.cli import cli
from flashmoe.errors import CheckpointError
from flashmoe.hub import registry
from flashmoe.hub.known_models import parse_hub_name

pytestmark = pytest.mark.usefixtures("own_directories")


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "Toy-4bit", bits=8)


def test_known_models_have_every_field():
    for name, published in CATALOGUE.items():
        assert registry.is_valid_name(name)
        assert parse_hub_name(f"hub:{published.repo}") is not None
        assert published.nbytes > 10**9
        assert published.repo.endswith(f"-{published.bits}bit")
        assert published.licence == "apache-2.0"
        assert (published.experts is None) == (published.evidence is None)
        assert published.experts is None or published.experts < published.trained_k
        assert published.source
        assert published.verified in ("no", "layout")  # none was compared with the hub yet
    repos = [p.repo for p in CATALOGUE.values() if p.experts is None]
    assert len(set(repos)) == len(repos)


def test_missing_hub_model_names_the_download_command():
    with pytest.raises(CheckpointError, match="To get it, run: flashmoe download hub:a/b@v1$"):
        catalog.find("hub:a/b@v1")
    done = CliRunner().invoke(cli, ["run", "hub:a/b", "hi"])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("Error: ")
    assert "hub:a/b is not on this disk" in line
    assert "flashmoe download hub:a/b" in line


def test_hub_name_with_a_revision_finds_only_that_revision(toy):
    registry.add("x", toy, repo="a/b", revision=COMMIT)
    assert catalog.find("hub:a/b") == catalog.find(f"hub:a/b@{COMMIT[:8]}") == toy
    with pytest.raises(CheckpointError, match="is not on this disk"):
        catalog.find("hub:a/b@fedcba98")


def test_known_model_is_found_where_it_was_downloaded(tmp_path, toy):
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
        model = catalog.model(name)
        assert (model.path, model.experts) == (cached / "snapshots" / "abc", experts)
        assert model.source == "downloaded"
    assert catalog.model("qwen3-30b").path is None


def test_registered_name_replaces_the_known_model(toy):
    run("register", toy, "--name", "qwen3-30b")
    names = [m.name for m in catalog.models()]
    assert names.count("qwen3-30b") == 1
    assert catalog.find("qwen3-30b") == toy


def test_preset_is_found_under_the_name_of_its_model(toy):
    run("register", toy, "--name", "qwen3.5-397b")
    preset = catalog.model("qwen3.5-397b-flash")
    assert (preset.path, preset.experts, preset.source) == (toy, 4, "downloaded")
