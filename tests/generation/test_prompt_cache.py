"""Test how prompt cache entries are kept, stored and restored without changing an answer."""

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache, save_prompt_cache
from moe_types import write_moe
from toys import FAMILIES, write_toy

from flashmoe.chat.template import Prompt
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.generation.prompt import PromptReader, state_identity
from flashmoe.generation.prompt_cache import (
    PromptCache,
    PromptStore,
    entry_name,
    entry_nbytes,
)
from flashmoe.locks import locked_partial
from flashmoe.memory.footprint import CHUNK_TOKENS
from flashmoe.models.layerwise import chunks_within, run_pass
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import same


def state(size: int, value: float = 1.0) -> list:
    """Return the caches of a two-layer model that hold `size` float32 numbers and a few more."""
    recurrent, keys = ArraysCache(size=2), KVCache()
    recurrent[0], recurrent[1] = mx.full((1, size), value), mx.zeros((1, 3))
    keys.update_and_fetch(mx.full((1, 1, 5, 8), value), mx.zeros((1, 1, 5, 8)))
    mx.eval(recurrent.state, keys.state)
    return [recurrent, keys]


def empty() -> list:
    return [ArraysCache(size=2), KVCache()]


def arrays(cache: list) -> list[np.ndarray]:
    return [np.array(a) for a in (cache[0][0], cache[0][1], *cache[1].keys_and_values())]


def equal(a: list, b: list) -> bool:
    pairs = zip(arrays(a), arrays(b), strict=True)
    return all(x.shape == y.shape and (x == y).all() for x, y in pairs)


# In memory


def test_generation_does_not_change_a_cached_entry():
    prompts = PromptCache(10**9)
    prompts.put("a", state(100))
    first = prompts.get("a")
    first[0][0] = mx.zeros((1, 100))
    first[1].update_and_fetch(mx.ones((1, 1, 300, 8)), mx.ones((1, 1, 300, 8)))
    mx.eval(first[1].state)
    assert equal(prompts.get("a"), state(100))
    second = prompts.get("a")
    second[1].keys[..., 0:1, :] = 7
    assert equal(prompts.get("a"), state(100))


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 900)), max_size=30),
    st.integers(0, 20000),
)
@settings(deadline=None, max_examples=60)
def test_oldest_entries_leave_when_the_budget_is_exceeded(steps, budget):
    prompts = PromptCache(budget)
    expected: dict[str, int] = {}  # oldest first
    for name, size in steps:
        if size % 3 == 0:
            entry = prompts.get(name)
            assert (entry is not None) == (name in expected)
            if entry is not None:
                expected[name] = expected.pop(name)
            continue
        cache = state(size)
        prompts.put(name, cache)
        expected.pop(name, None)
        if entry_nbytes(cache) <= budget:
            expected[name] = entry_nbytes(cache)
        while sum(expected.values()) > budget:
            expected.pop(next(iter(expected)))
        assert prompts.nbytes == sum(expected.values()) <= budget
        assert len(prompts) == len(expected)


def test_key_differs_by_model_and_tokens():
    names = {
        entry_name(identity, tokens)
        for identity in ("a", "b")
        for tokens in ([1], [1, 2], [12], [2, 1], [], [2**40])
    }
    assert len(names) == 12


# On disk


@pytest.fixture
def store(tmp_path):
    return PromptStore(tmp_path / "states", 10**6)


NAME = "0123456789abcdef0123456789abcdef01234567-5"
OTHER = NAME.replace("0", "f")


def test_stored_entry_is_restored_unchanged(store):
    store.put(NAME, state(100, 0.3))
    assert equal(store.get(NAME, empty()), state(100, 0.3))
    assert store.get(OTHER, empty()) is None
    (stored,) = store.entries()
    assert (stored.tokens, stored.nbytes) == (5, stored.path.stat().st_size)


def test_stored_files_are_private_to_the_user(store):
    store.put(NAME, state(100))
    (stored,) = store.entries()
    assert stored.path.stat().st_mode & 0o077 == 0
    assert store.directory.stat().st_mode & 0o077 == 0


def damage(path, how: str) -> None:
    raw = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(raw[:-50])
    elif how == "header":
        path.write_bytes(b"\xff" * 8 + raw[8:])
    elif how == "flipped":
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif how == "metadata":
        path.write_bytes(raw.replace(b"ArraysCache", b"KVCacheXXXX"))
    elif how == "other model":
        save_prompt_cache(str(path), [KVCache()], {})
    elif how == "unsigned":
        save_prompt_cache(str(path), state(100), {})
    elif how == "foreign":
        mx.save_safetensors(str(path), {"x": mx.zeros(3)})
    elif how == "class":
        # mlx-lm creates any class of its cache module that the file names.
        path.write_bytes(raw.replace(b"ArraysCache", b"CacheList\x20\x20"))


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "cut",
        "header",
        "flipped",
        "metadata",
        "unsigned",
        "foreign",
        "class",
        "other model",
    ],
)
def test_damaged_file_is_ignored_with_a_warning(store, caplog, how):
    store.put(NAME, state(100))
    (stored,) = store.entries()
    damage(stored.path, how)
    with caplog.at_level(logging.WARNING, "flashmoe"):
        assert store.get(NAME, empty()) is None
    assert str(stored.path) in caplog.text
    assert "is ignored" in caplog.text


def test_damage_of_any_byte_changes_no_restored_entry(tmp_path):
    """With any one byte damaged, the file is refused or still holds the same entry."""
    store = PromptStore(tmp_path)
    store.put(NAME, state(20, 0.7))
    (stored,) = store.entries()
    raw = stored.path.read_bytes()
    random.seed(0)
    for at in random.sample(range(len(raw)), 150):
        stored.path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        entry = store.get(NAME, empty())
        assert entry is None or equal(entry, state(20, 0.7)), f"byte {at} of {len(raw)}"


def test_oldest_files_are_removed_beyond_the_limit(tmp_path):
    store = PromptStore(tmp_path, 110_000)
    names = [NAME[:38] + f"{i}a-{i}" for i in range(6)]
    for i, name in enumerate(names):
        store.put(name, state(2000))  # some 25 kB each
        os.utime(tmp_path / f"{name}.safetensors", (1000 + i, 1000 + i))
    assert [s.tokens for s in store.entries()] == [2, 3, 4, 5]
    store.get(names[2], empty())
    store.put(OTHER, state(2000))
    assert {s.tokens for s in store.entries()} == {2, 4, 5}
    assert sum(s.nbytes for s in store.entries()) <= 110_000


def test_entry_larger_than_the_limit_is_not_stored(tmp_path):
    store = PromptStore(tmp_path, 110_000)
    store.put(NAME, state(100))
    store.put(OTHER, state(30_000))
    assert [s.path.stem for s in store.entries()] == [NAME]


def test_foreign_files_are_left_alone(store):
    store.put(NAME, state(100))
    foreign = [store.directory / n for n in ("notes.safetensors", ".notes-abcdefgh.safetensors")]
    for file in foreign:
        file.write_text("mine")
    store.trim()
    assert store.clear() > 0
    assert [file.read_text() for file in foreign] == ["mine", "mine"]
    assert store.entries() == []


def test_partial_file_is_removed_unless_it_is_being_written(store):
    store.put(NAME, state(100))
    left = store.directory / f".{NAME}-abcdefgh.safetensors"
    left.write_text("left by a process that was killed")
    with locked_partial(store.directory / f"{OTHER}.safetensors") as written:
        PromptStore(store.directory)  # the next start
        assert not left.exists()
        assert written.exists()
    PromptStore(store.directory)
    assert [path.stem for path in store.directory.iterdir()] == [NAME]


@pytest.mark.parametrize("unsafe", ["writable", "above", "foreign"])
def test_directory_that_others_may_write_is_not_used(tmp_path, caplog, unsafe):
    directory = tmp_path / "above" / "states"
    PromptStore(directory).put(NAME, state(100))
    if unsafe == "writable":
        directory.chmod(0o777)
    elif unsafe == "above":
        directory.parent.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(directory, 12345, 12345)
    else:
        pytest.skip("only root can give a directory away")
    store = PromptStore(directory)
    assert "set FLASHMOE_CACHE to another directory" in caplog.text
    assert store.get(NAME, empty()) is None
    store.put(OTHER, state(100))
    assert [entry.path.stem for entry in store.entries()] == [NAME]


def test_unwritable_directory_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = PromptStore(tmp_path / "file" / "states")
    store.put(NAME, state(100))
    assert "could not be written" in caplog.text
    assert store.get(NAME, empty()) is None
    assert store.entries() == []
    assert store.clear() == 0


def test_writer_that_dies_leaves_no_entry(store):
    code = (
        "import sys, os; sys.path[:0] = sys.argv[2:]\n"
        "from test_prompt_cache import *\n"
        "import mlx_lm.models.cache as c\n"
        "def half(file, *a):\n"
        "    open(file, 'wb').write(b'x' * 100); os._exit(9)\n"
        "c.save_prompt_cache = half\n"
        "PromptStore(__import__('pathlib').Path(sys.argv[1])).put(NAME, state(100))\n"
    )
    here = Path(__file__).parent
    store.directory.mkdir()
    places = map(str, (store.directory, here, here.parent / "helpers"))
    done = subprocess.run([sys.executable, "-c", code, *places], timeout=300)
    assert done.returncode == 9
    assert store.entries() == []
    assert len(list(store.directory.iterdir())) == 1
    store.put(NAME, state(100))
    assert equal(store.get(NAME, empty()), state(100))
    assert [path.stem for path in store.directory.iterdir()] == [NAME], "its partial file is gone"


# In a model


def prompt_of(count: int, cuts: tuple[int, ...], seed: int = 0) -> Prompt:
    tokens = random.Random(seed).choices(range(160), k=count)
    return Prompt(tokens, cuts, False)


def prefill(reader, model, prompt, emit, *, keep):
    """Prefill a whole prompt pass by pass, as a batch of this prompt alone does."""
    reading = reader.start(prompt, emit, experts=model.experts, keep=keep)
    while reading.left:
        limit = model.elastic_slots.fit_prefill(reading.tokens, [reading.context], model.experts)
        model.hooks.layer_entered = reading.reporter.layer_entered
        chunks = reading.left[: chunks_within(reading.left, limit)]
        reading.record(run_pass(model, chunks))
    return reading


def answer_logits(model, reading, steps: int = 5) -> list[np.ndarray]:
    """Return the logits of each step of a greedy answer."""
    steps_logits, logits = [], reading.logits
    for _ in range(steps):
        steps_logits.append(np.array(logits.astype(mx.float32)))
        logits = model.next_logits([int(steps_logits[-1].argmax())], reading.cache)
    return steps_logits


LONG = CHUNK_TOKENS + 150


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_entry_gives_the_same_bits_as_a_whole_prefill(tmp_path, family):
    """Restore from memory, from disk in another model, and from an entry that was restored."""
    path = write_toy(tmp_path / "toy", family, num_experts=9, max_position_embeddings=4096)
    checkpoint = Checkpoint.open(path)
    cuts = (70, 75, LONG, LONG + 30)
    whole = prompt_of(LONG + 36, cuts)
    ends = (78, LONG + 4, LONG + 36)
    turns = [Prompt(whole.tokens[:n], tuple(c for c in cuts if c < n), False) for n in ends]
    silent = []

    model = load_streaming(checkpoint, slots=5)
    reader = PromptReader(model, PromptCache(0), None)
    expected = []
    for turn in turns:
        expected.append(
            answer_logits(model, prefill(reader, model, turn, silent.append, keep=False))
        )

    store = PromptStore(tmp_path / "states")
    reader = PromptReader(model, PromptCache(10**9), store)
    cached = []
    for turn, logits in zip(turns, expected, strict=True):
        reading = prefill(reader, model, turn, silent.append, keep=True)
        cached.append(reading.cached)
        assert same(answer_logits(model, reading), logits)
        reader.store(reading)
    assert cached == [0, 75, LONG]
    model.close()

    model = load_streaming(checkpoint, slots=9)
    reader = PromptReader(model, PromptCache(10**9), store)
    for turn, logits in zip(turns, expected, strict=True):
        reading = prefill(reader, model, turn, silent.append, keep=True)
        assert reading.cached == turn.cuts[-1]
        assert same(answer_logits(model, reading), logits)
    model.close()


@pytest.mark.parametrize(
    ("name", "found"),
    [("qwen3_moe", 80), ("deepseek_v32", 80), ("qwen3_next", 40), ("gpt_oss", 40)],
)
def test_prompt_that_leaves_a_kept_one_continues_where_both_are_split(tmp_path, name, found):
    """Keys and values are trimmed; recurrent states and windows serve what begins with them."""
    model = load_streaming(Checkpoint.open(write_moe(tmp_path / "toy", name)), slots=5)
    whole, silent = prompt_of(130, (40, 80, 120)), []
    other = Prompt([*whole.tokens[:90], *prompt_of(30, (), seed=1).tokens], (40, 80, 100), False)
    reader = PromptReader(model, PromptCache(0), None)
    expected = answer_logits(model, prefill(reader, model, other, silent.append, keep=False))
    reader = PromptReader(model, PromptCache(10**9), None)
    prefill(reader, model, whole, silent.append, keep=True)
    reading = prefill(reader, model, other, silent.append, keep=True)
    assert reading.cached == found
    assert same(answer_logits(model, reading), expected)
    elsewhere = Prompt(whole.tokens[:95], (35, 70, 90), False)  # it is split in another way
    assert prefill(reader, model, elsewhere, silent.append, keep=True).cached == 0
    model.close()


def identity(checkpoint, experts=3, activations="float32"):
    return state_identity(checkpoint, experts, backend="cpu", activations=activations)


def test_identity_differs_by_settings_and_checkpoint_files(tmp_path):
    path = write_toy(tmp_path / "toy", top_k=3)
    checkpoint = Checkpoint.open(path)
    assert identity(checkpoint) == identity(Checkpoint.open(path))
    assert identity(checkpoint) != identity(checkpoint, experts=2)
    assert identity(checkpoint) != identity(checkpoint, activations="int8")
    other = Checkpoint.open(write_toy(tmp_path / "other", top_k=3, seed=1))
    assert identity(checkpoint) != identity(other)
    os.utime(path / "model.safetensors", (1, 1))
    assert identity(checkpoint) != identity(Checkpoint.open(path))


def test_progress_adds_up_to_the_whole_prompt(tmp_path):
    path = write_toy(tmp_path / "toy", max_position_embeddings=4096)
    model = load_streaming(Checkpoint.open(path), slots=7)
    model.elastic_slots.fit_prefill = lambda *args: CHUNK_TOKENS + 1
    reader = PromptReader(model, PromptCache(10**9), None)
    events = []
    prefill(reader, model, prompt_of(LONG + 40, (LONG,)), events.append, keep=True)
    whole = [e for e in events if e.layer == e.layers]
    assert [e.done for e in whole] == [CHUNK_TOKENS, LONG + 40]
    assert {(e.total, e.layers) for e in events} == {(LONG + 40, 4)}
    events.clear()
    prefill(reader, model, prompt_of(LONG + 40, (LONG,)), events.append, keep=True)
    assert [e.done for e in events] == [40]
    model.close()
