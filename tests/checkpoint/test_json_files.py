"""Tests that only regular files of a bounded size and depth are read, and none of them hangs."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from checkpoint_edits import assert_refused
from toys import write_chat_toy

from flashmoe.checkpoint.capabilities import capabilities, chat_template
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.json_files import MAX_LEVELS, parse_object, show
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.errors import CheckpointError

#: The files that flashmoe, mlx-lm and transformers open by name.
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "hf_quant_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
]


@pytest.fixture(scope="module")
def chat_toy(tmp_path_factory) -> Path:
    return write_chat_toy(tmp_path_factory.mktemp("chat") / "toy", family="qwen3_moe", layers=1)


@pytest.fixture
def toy(chat_toy, tmp_path) -> Path:
    return Path(shutil.copytree(chat_toy, tmp_path / "toy"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # the path of a socket has some 100 bytes at most
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


@pytest.mark.parametrize("make", [fifo, device, directory, unix_socket])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_refused_at_once(toy, name, make):
    (toy / name).unlink(missing_ok=True)
    make(toy / name)
    assert_refused(toy, str(toy / name), "not a regular file")


def test_special_file_among_more_templates_is_refused(toy):
    (toy / "additional_chat_templates").mkdir()
    os.mkfifo(toy / "additional_chat_templates" / "tools.jinja")
    assert_refused(toy, "tools.jinja is not a regular file")


@pytest.mark.parametrize("make", [fifo, device, unix_socket])
def test_special_file_of_any_name_is_refused(toy, make):
    make(toy / "notes")
    assert_refused(toy, "notes is not a regular file")


def test_directories_of_other_names_and_links_that_lead_nowhere_are_left_alone(toy):
    (toy / "original").mkdir()
    (toy / "README.md").symlink_to("gone")
    assert Checkpoint.open(toy).num_experts == 7


def test_links_to_regular_files_open_as_in_the_cache_of_the_hub(toy, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in toy.iterdir():
        (linked / file.name).symlink_to(file)
    assert read_tokenizer(Checkpoint.open(linked)).encode("Hello")
    assert chat_template(linked) == (toy / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", 10_000_000),
        ("generation_config.json", 10_000_000),
        ("tokenizer_config.json", 10_000_000),
        ("chat_template.jinja", 1_000_000),
        ("tokenizer.json", 100_000_000),
        ("model.safetensors.index.json", 100_000_000),
        ("merges.txt", 100_000_000),
    ],
)
def test_file_above_its_limit_is_refused(toy, name, limit):
    with open(toy / name, "ab") as f:
        f.truncate(limit + 1)
    assert_refused(toy, str(toy / name), f"has {limit + 1} bytes, the limit is {limit}")


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_levels_of_json_are_bounded(pair):
    def nested(levels):
        return b'{"a":' + pair[0].encode() * levels + b"1" + pair[1].encode() * levels + b"}"

    assert parse_object(nested(MAX_LEVELS - 1), "x")
    for levels in (MAX_LEVELS, 500, 100_000):
        with pytest.raises(CheckpointError, match=r"x (nests more than 64 levels|is not valid)"):
            parse_object(nested(levels), "x")


def test_wide_json_is_no_deep_json():
    wide = {str(i): [i, {"a": []}] for i in range(10_000)}
    assert parse_object(json.dumps(wide).encode(), "x") == wide


def test_values_are_cut_in_errors():
    for value in ("x" * 10**6, ["y" * 10**6] * 10**3, {"z" * 10**6: 1}, 10**4000, [[[[[1]]]]]):
        assert len(show(value)) < 1000
    assert len(show("x" * 10**6)) == 120


# What reads files without opening the checkpoint


def test_template_that_is_a_pipe_is_refused_without_waiting(toy):
    (toy / "chat_template.jinja").unlink()
    os.mkfifo(toy / "chat_template.jinja")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not a regular file"):
        capabilities(toy)


def test_template_is_found_where_older_checkpoints_have_it(toy):
    text = (toy / "chat_template.jinja").read_text()
    (toy / "chat_template.jinja").unlink()
    assert chat_template(toy) is None
    (toy / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    assert chat_template(toy) == text
    (toy / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert chat_template(toy) == "other"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 1_000_001], ids=["bytes", "long"])
def test_damaged_template_is_refused(toy, content):
    (toy / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(toy / "chat_template.jinja"))):
        chat_template(toy)
