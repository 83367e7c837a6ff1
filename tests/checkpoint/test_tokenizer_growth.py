"""Tests that a tokenizer cannot make texts or tokens that fill the memory."""

import base64
import shutil

import pytest
from checkpoint_edits import edit_json
from moe_types import write_moe
from toys import copy_tokenizer

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.errors import CheckpointError


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(text):
    """A table that leads to one text; its trie is of no use."""
    trie = bytes(1024)
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + text + b"\0").decode()


DOUBLED = replace({"String": "a"}, "aa")
TOO_LONG = {
    "one Replace": ("normalizer", replace({"String": "a"}, "a" * 10**5)),
    "a pattern": ("normalizer", replace({"Regex": "x*"}, "b" * 2000)),
    "many that double": ("normalizer", {"type": "Sequence", "normalizers": [DOUBLED] * 12}),
    "a prefix": ("normalizer", {"type": "Prepend", "prepend": "_" * 10**5}),
    "nested": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLED] * 11}]},
    ),
    "a decoder": ("decoder", replace({"String": "a"}, "a" * 10**5)),
    "decoders": ("decoder", {"type": "Sequence", "decoders": [DOUBLED] * 20}),
    "a table of characters": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a" * 5000)},
    ),
    "the text 200 times": (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 200,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        },
    ),
}


@pytest.fixture(scope="module")
def chat_toy(tmp_path_factory):
    """Of a type for which transformers takes the normalizer from the file."""
    toy = write_moe(tmp_path_factory.mktemp("chat") / "toy", "mixtral", vocab_size=8192)
    copy_tokenizer(toy)
    return toy


@pytest.fixture
def toy(chat_toy, tmp_path):
    return shutil.copytree(chat_toy, tmp_path / "toy")


def read(toy):
    return read_tokenizer(Checkpoint.open(toy))


@pytest.mark.parametrize("case", TOO_LONG)
def test_text_out_of_proportion_is_refused(toy, case):
    part, value = TOO_LONG[case]
    edit_json(toy / "tokenizer.json", lambda document: document.update({part: value}))
    with pytest.raises(CheckpointError, match=f"tokenizer.json has {part}") as refused:
        read(toy)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                replace({"String": " "}, "\u2581"),
                {"type": "NFKC"},
            ],
        },
    ],
)
def test_normalizers_of_real_tokenizers_are_read(toy, normalizer):
    edit_json(toy / "tokenizer.json", lambda document: document.update(normalizer=normalizer))
    assert read(toy).encode("abc")


@pytest.mark.parametrize("decoder", ["ByteLevel", "WordPiece"])
def test_token_out_of_proportion_is_refused(toy, decoder):
    """mlx-lm has a table of all texts for some decoders only."""

    def lengthen(document):
        document["added_tokens"][-1]["content"] = "x" * 5000
        if decoder != "ByteLevel":
            document["decoder"] = {"type": decoder, "prefix": "##", "cleanup": False}

    edit_json(toy / "tokenizer.json", lengthen)
    with pytest.raises(CheckpointError, match="of 5000 characters: at most 4096"):
        read(toy)
