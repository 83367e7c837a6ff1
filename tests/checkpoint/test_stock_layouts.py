"""Test that checkpoints of converters are opened as stock mlx-lm loads them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_edits import INDEX, SWITCH, assert_refused, edit_json, edit_weights
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.loading import load_streaming

MTP = {"mtp.fc.weight": mx.ones((4, 4)), "language_model.mtp.norm.weight": mx.ones((4,))}


def tensors_of(path):
    return {n: (t.file.name, t.start) for n, t in Checkpoint.open(path).tensors.items()}


def logits_of(path):
    return np.array(load_streaming(Checkpoint.open(path), slots=7)(mx.array([[5, 9, 3, 7]])))


def test_index_may_name_tensors_that_are_not_loaded(sharded_dir):
    """Multi-token prediction is in a file of its own; the vision tower was left out."""
    before = tensors_of(sharded_dir)
    away = {name: "mtp.safetensors" for name in MTP} | {"vision_tower.x": "model-00009.safetensors"}
    edit_json(sharded_dir / INDEX, lambda i: i["weight_map"].update(away))
    assert tensors_of(sharded_dir) == before
    mx.save_safetensors(str(sharded_dir / "mtp.safetensors"), MTP)
    assert tensors_of(sharded_dir) == before


def test_shard_that_is_not_loaded_need_not_be_in_the_index(sharded_dir):
    before = Checkpoint.open(sharded_dir)
    mx.save_safetensors(str(sharded_dir / "model-mtp.safetensors"), MTP)
    after = Checkpoint.open(sharded_dir)
    assert after.dense == before.dense
    assert after.expert_layers == before.expert_layers
    mx.save_safetensors(str(sharded_dir / "model-more.safetensors"), {"lm_head.x": mx.ones(1)})
    assert_refused(sharded_dir, "tensor 'lm_head.x' is in model-more.safetensors")


@pytest.mark.parametrize("root", ["model.language_model.", "model."])
def test_names_of_the_original_weights_are_those_of_mlx_lm(tmp_path, root):
    path = write_toy(tmp_path / "toy")
    expected = logits_of(path)
    old = "language_model.model."

    def rename(weights):
        for name in list(weights):
            if name.startswith(old):
                weights[root + name.removeprefix(old)] = weights.pop(name)

    edit_weights(path, rename)
    assert (logits_of(path) == expected).all()
    weights = mx.load(str(path / "model.safetensors"))
    name = f"{SWITCH}.up_proj.weight"
    double = {name: weights[name.replace(old, root)]}
    mx.save_safetensors(str(path / "model-2.safetensors"), double)
    assert_refused(path, f"holds '{name}' under two names")


@pytest.mark.parametrize("more", [{"quant_method": "mlx"}, {"version": 2}, {"format": None}])
def test_name_of_a_method_beside_the_bits_has_no_effect(checkpoint_dir, more):
    before = Checkpoint.open(checkpoint_dir).expert_layers
    edit_json(checkpoint_dir / "config.json", lambda c: c["quantization"].update(more))
    assert Checkpoint.open(checkpoint_dir).expert_layers == before


def test_override_without_a_group_size_has_that_of_mlx_lm(tmp_path):
    """Its groups of 64 are what mlx-lm takes, whatever the other modules have."""
    path = write_toy(tmp_path / "toy")
    overrides = {
        name: entry
        for name, entry in json.loads((path / "config.json").read_text())["quantization"].items()
        if isinstance(entry, dict)
    }
    assert {entry["group_size"] for entry in overrides.values()} == {64}
    before = Checkpoint.open(path)
    expected = logits_of(path)

    def shorten(config):
        for name in overrides:
            config["quantization"][name] = {"bits": overrides[name]["bits"]}

    edit_json(path / "config.json", shorten)
    assert Checkpoint.open(path).dense == before.dense
    assert (logits_of(path) == expected).all()
