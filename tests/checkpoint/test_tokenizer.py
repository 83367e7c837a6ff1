"""Tests that each token of a tokenizer has a row in the model, and that damaged files are named."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_edits import edit_json
from toys import write_chat_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.errors import CheckpointError

ROWS = 8192


@pytest.fixture(scope="module")
def chat_toy(tmp_path_factory) -> Path:
    """A toy whose vocabulary has a token for each of its rows."""
    return write_chat_toy(tmp_path_factory.mktemp("chat") / "toy", family="qwen3_moe", layers=1)


@pytest.fixture
def toy(chat_toy, tmp_path) -> Path:
    return Path(shutil.copytree(chat_toy, tmp_path / "toy"))


def read(toy: Path):
    return read_tokenizer(Checkpoint.open(toy))


def refusal(toy: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(toy)
    assert str(toy) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def leaf(content: dict) -> str:
    """Return a token that is merged into no other."""
    merged = {part for merge in content["model"]["merges"] for part in merge}
    return next(t for t in content["model"]["vocab"] if len(t) > 3 and t not in merged)


def rewrite(toy: Path, edit) -> None:
    edit_json(toy / "tokenizer.json", edit)


def test_vocabulary_that_fills_the_rows_is_read(toy):
    tokenizer = read(toy)
    assert max(tokenizer.get_vocab().values()) == ROWS - 1
    assert tokenizer.decode(tokenizer.encode("Hello, 7 wörlds!")) == "Hello, 7 wörlds!"


@pytest.mark.parametrize("token", [ROWS, 100_000, 2**32 - 1])
def test_token_of_the_vocabulary_above_the_rows_is_refused(toy, token):
    rewrite(toy, lambda c: c["model"]["vocab"].update({leaf(c): token}))
    message = refusal(toy)
    assert f"tokenizer.json has token {token}, " in message
    assert f"rows for {ROWS} tokens (vocab_size)" in message


def test_added_token_above_the_rows_is_refused(toy):
    def add(content):
        like = content["added_tokens"][0]
        content["added_tokens"].append({**like, "id": 8192, "content": "<new>"})

    rewrite(toy, add)
    assert "has token 8192, '<new>'" in refusal(toy)


@pytest.mark.parametrize("field", ["eos_token", "pad_token", "bos_token", "unk_token"])
def test_special_token_that_the_vocabulary_lacks_is_refused(toy, field):
    """transformers adds it, above the last row."""
    edit_json(toy / "tokenizer_config.json", lambda c: c.update({field: "<new>"}))
    assert "has token 8192, '<new>'" in refusal(toy)


def test_rows_fewer_than_tokens_are_refused(chat_toy, tmp_path):
    toy = write_chat_toy(tmp_path / "toy", family="qwen3_moe", layers=1, vocab_size=8000)
    assert "has rows for 8000 tokens" in refusal(toy)


def test_rows_beyond_the_vocabulary_are_padding(tmp_path):
    """Real models have some hundred of them."""
    toy = write_chat_toy(tmp_path / "toy", family="qwen3_moe", layers=1, vocab_size=8320)
    detokenizer = read(toy).detokenizer
    for token in (8192, 8319):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert isinstance(detokenizer.text, str)


@pytest.mark.parametrize("token", [ROWS, 2**32 - 1])
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_template_of_special_tokens_above_the_rows_is_refused(toy, kind, token):
    def frame(content):
        start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [start, a] if kind == "single" else [a],
            "pair": [start, a, b] if kind == "pair" else [a, b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}},
        }

    rewrite(toy, frame)
    assert f"has token {token}" in refusal(toy)


def test_two_tokens_of_one_id_are_refused(toy):
    """The grammar's copy of such a vocabulary cannot be made."""
    rewrite(toy, lambda c: c["model"]["vocab"].update({leaf(c): 5}))
    assert "the id 5" in refusal(toy)


def test_id_that_no_token_has_is_text_of_no_letters(tmp_path):
    """A model may answer with it."""
    toy = write_chat_toy(tmp_path / "toy", family="qwen3_moe", layers=1, vocab_size=8320)
    content = json.loads((toy / "tokenizer.json").read_text())
    text = leaf(content)
    hole = content["model"]["vocab"][text]
    rewrite(toy, lambda c: c["model"]["vocab"].update({text: 8300}))
    tokenizer = read(toy)
    detokenizer = tokenizer.detokenizer
    for token in (*tokenizer.encode("so"), hole, *tokenizer.encode(" far"), 8300, 8250):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == f"so far{text.replace('Ġ', ' ')}"


def test_letters_that_prompts_would_lose_are_refused(toy):
    def drop(content):
        model = content["model"]
        model["vocab"] = {f"{t}~" if "q" in t else t: i for t, i in model["vocab"].items()}
        model["merges"] = [m for m in model["merges"] if not any("q" in part for part in m)]

    rewrite(toy, drop)
    assert "has no token for 'q'" in refusal(toy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"null"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 1.5}, "merges": []}}'),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"eos_token": 5}'),
        ("tokenizer_config.json", b'{"tokenizer_class": ["x"]}'),
        # transformers asks for the id of this token while it looks for the id of this token.
        ("tokenizer_config.json", b'{"unk_token": "", "eos_token": "<|im_end|>"}'),
        ("tokenizer_config.json", b'{"tool_parser_type": "no such parser"}'),
    ],
)
def test_damaged_files_of_the_tokenizer_are_refused(toy, name, content):
    (toy / name).write_bytes(content)
    assert "has no tokenizer that can be read" in refusal(toy)


def test_missing_tokenizer_is_refused(toy):
    (toy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(toy)


def test_end_tokens_of_the_checkpoint_reach_the_tokenizer(toy):
    own = read(toy).eos_token_ids
    (toy / "generation_config.json").write_text('{"eos_token_id": [0, 8191]}')
    assert read(toy).eos_token_ids == own | {0, 8191}
