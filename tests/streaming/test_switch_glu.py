"""Tests that failed reads and interrupted calls leave no wrong slot, and the checks of a load."""

import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from toys import HIDDEN, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import BudgetError, CheckpointError, ReadError, SettingError
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same


@pytest.fixture
def path(tmp_path):
    return write_toy(tmp_path / "toy", "qwen3_moe", num_experts=9, top_k=3)


def first_switch(model):
    return next(iter(model.blocks.values())).switch_mlp


def run(model, tokens):
    """Return the evaluated logits of a prompt."""
    out = model(mx.array([tokens]), cache=make_prompt_cache(model))
    mx.eval(out)
    return out


def test_deleted_file_raises_read_error(path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    run(model, [1, 2, 3])
    os.remove(path / "model.safetensors")
    with pytest.raises(ReadError, match=r"expert \d of layer \d needs bytes .*deleted") as error:
        run(model, list(range(40)))
    assert "load the model again" in str(error.value)


def test_truncated_file_raises_read_error(path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    with open(path / "model.safetensors", "r+b") as f:
        f.truncate(2000)
    with pytest.raises(ReadError, match="model.safetensors"):
        run(model, list(range(40)))


def test_expert_of_a_failed_read_is_not_resident(path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    switch = first_switch(model)
    saved = shutil.copy2(path / "model.safetensors", path.parent / "saved")
    os.remove(path / "model.safetensors")
    assert switch.load(4, set())
    with pytest.raises(ReadError, match="expert 4 of layer 0"):
        switch.wait_for(4)
    assert switch._table.lookup(4) is None
    assert not switch._loading
    assert saved.exists()


def test_call_after_an_abandoned_one_gives_the_same_bits(path):
    """The abandoned call is never finished. Later calls wait for its reads before they use them."""
    checkpoint = Checkpoint.open(path)
    resident = load_resident(path)
    tokens = list(range(30))
    expected = logits(resident, tokens, 7)
    model = load_streaming(checkpoint, slots=5)
    x = mx.random.normal((4, HIDDEN))
    for layer in model.blocks.values():
        layer.switch_mlp.start([(x, mx.array([[0, 1, 2]] * 4))])
    assert same(logits(model, tokens, 7), expected)


def test_failed_reads_of_an_abandoned_call_do_not_fail_the_next(path):
    """The next call raises only the errors of its own reads."""
    model = load_streaming(Checkpoint.open(path), slots=5)
    os.rename(path / "model.safetensors", path / "away")
    x = mx.ones((1, HIDDEN))
    first_switch(model).start([(x, mx.array([[0, 1, 2]]))])
    os.rename(path / "away", path / "model.safetensors")
    out = first_switch(model)(x, mx.array([[0, 1, 2]]))
    assert np.isfinite(np.array(out)).all()


@pytest.mark.parametrize("moment", ["allocate", "requests", "submit", "drop"])
def test_interrupt_at_any_moment_leaves_no_wrong_slot(path, moment, monkeypatch):
    """Ctrl-C may interrupt the main thread anywhere between the choice of a slot and its reads."""
    expected = logits(load_resident(path), list(range(30)), 7)
    model = load_streaming(Checkpoint.open(path), slots=5)
    switch = first_switch(model)
    owners = {"allocate": switch._table, "requests": switch._memory, "submit": switch._reader}
    owner = owners.get(moment, switch._table)
    original = getattr(owner, moment)

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, interrupted)
        if moment == "drop":
            os.rename(path / "model.safetensors", path / "away")
        with pytest.raises(KeyboardInterrupt):
            switch(mx.ones((1, HIDDEN)), mx.array([[0, 1, 2]]))
        if moment == "drop":
            os.rename(path / "away", path / "model.safetensors")
    assert same(logits(model, list(range(30)), 7), expected)


def test_prefill_can_be_cancelled(path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise TimeoutError

    model.hooks.check_cancelled = check
    with pytest.raises(TimeoutError):
        run(model, list(range(100)))
    model.hooks.check_cancelled = lambda: None
    tokens = list(range(30))
    assert same(logits(model, tokens, 7), logits(load_resident(path), tokens, 7))


def test_each_expert_is_read_once_in_a_prefill_chunk(path):
    checkpoint = Checkpoint.open(path)
    model = load_streaming(checkpoint, slots=5)
    run(model, list(range(100)))
    stats = model.stats
    layers = len(checkpoint.expert_layers)
    assert stats.needed == stats.loaded == 9 * layers, "100 tokens need each of the 9 experts once"
    assert stats.reads.bytes == checkpoint.expert_nbytes
    assert stats.hit_rate == 0


def test_resident_experts_are_not_read_again(path):
    model = load_streaming(Checkpoint.open(path), slots=9)
    run(model, list(range(50)))
    before = model.stats
    run(model, list(range(50)))
    assert (model.stats - before).reads.bytes == 0
    assert (model.stats - before).hit_rate == 1


def test_loading_reads_no_experts(path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    names = [n for n, _ in tree_flatten(model.parameters())]
    assert names
    assert not [n for n in names if "switch_mlp" in n]
    assert model.stats.reads.bytes == 0


@pytest.mark.parametrize("k", [0, -1, 4, True, 2.0, "2"])
def test_experts_outside_the_trained_number_are_refused(path, k):
    with pytest.raises(SettingError, match=r"experts=.*(between 1 and 3|must be 1 or more)"):
        load_streaming(Checkpoint.open(path), experts=k)


def test_experts_above_the_number_of_slots_are_refused(path):
    model = load_streaming(Checkpoint.open(path), slots=3, experts=1)
    with model.pruned_to(2):
        assert model.experts == 2
    assert model.experts == 1
    model = load_streaming(Checkpoint.open(path), slots=3, experts=1)
    model.plan = model.plan.__class__(**{**vars(model.plan), "slots_per_layer": 2})
    with pytest.raises(SettingError, match="experts=3 needs 3 slots"):
        model.experts = 3


def test_too_few_slots_are_refused(path):
    with pytest.raises(BudgetError, match="5"):
        load_streaming(Checkpoint.open(path), slots=4)


def test_too_small_a_budget_is_refused(path):
    with pytest.raises(BudgetError, match=r"memory 10.0 MB is too small: .*needs at least"):
        load_streaming(Checkpoint.open(path), memory="10MB")


def test_memory_and_slots_together_are_refused(path):
    with pytest.raises(SettingError, match="not both"):
        load_streaming(Checkpoint.open(path), memory="8GB", slots=5)


@pytest.mark.parametrize("depth", [0, -3])
def test_depth_below_one_is_refused(path, depth):
    with pytest.raises(SettingError, match="depth"):
        load_streaming(Checkpoint.open(path), depth=depth)


def test_stray_shard_is_refused(path):
    """mlx-lm loads every model*.safetensors, also those that the index does not name."""
    toy = write_toy(path.parent / "sharded", "qwen3_moe", num_experts=5, top_k=2, shards=2)
    shutil.copy2(path / "model.safetensors", toy / "model-old.safetensors")
    with pytest.raises(CheckpointError, match="model-old.safetensors"):
        load_streaming(Checkpoint.open(toy), slots=5)


def test_missing_dense_tensor_raises_checkpoint_error(path):
    weights = mx.load(str(path / "model.safetensors"))
    del weights["model.norm.weight"]
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        load_streaming(Checkpoint.open(path), slots=5)
