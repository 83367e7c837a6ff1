"""Test the small checkpoints that stand for a model when this machine is measured."""

import pytest
from moe_types import write_moe
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.models.loading import load_streaming
from flashmoe.plan.reduced_checkpoint import reduced

KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next", "qwen3_moe"])
def test_a_few_layers_with_a_few_experts_are_left_of_each_family(tmp_path, family):
    dense = family != "qwen3_5_moe"
    path = write_toy(tmp_path / "m", family, layers=8, num_experts=9, dense_layer=dense)
    checkpoint = Checkpoint.open(path)
    with reduced(checkpoint, 3) as (small, k):
        assert (small.num_layers, small.num_experts, k) == (4, 5, 3)
        assert small.dense_nbytes < checkpoint.dense_nbytes
        load_streaming(small, slots=5).close()


@pytest.mark.parametrize(
    ("name", "bits", "mode", "fields", "left"),
    [
        # A global list of kinds, biases of experts, and more tokens than are needed.
        ("gpt_oss", 4, "mxfp4", {"layer_types": KINDS * 4, "vocab_size": 4096}, 4),
        # Groups of experts: fewer experts than groups would be left.
        ("deepseek_v3", 4, "affine", {"n_routed_experts": 32, "n_group": 8, "topk_group": 4}, 4),
        # The first layer with attention is the fifth.
        ("nemotron_h", None, "affine", {"hybrid_override_pattern": "MEME*EME"}, 5),
    ],
)
def test_a_few_layers_with_a_few_experts_are_left_of_other_types(
    tmp_path, name, bits, mode, fields, left
):
    path = write_moe(tmp_path / "m", name, bits=bits, mode=mode, num_hidden_layers=8, **fields)
    checkpoint = Checkpoint.open(path)
    with reduced(checkpoint, 2) as (small, k):
        assert (small.num_layers, small.num_experts, k) == (left, 4, 2)
        assert small.text_config["vocab_size"] <= 2048
        assert small.expert_bits == checkpoint.expert_bits
        load_streaming(small, slots=4).close()


def test_a_model_that_cannot_be_reduced_is_explained(tmp_path):
    """Half of its layers have no keys of their own, and none of those that would be left has."""
    fields = {"num_kv_shared_layers": 4, "layer_types": KINDS * 4, "num_hidden_layers": 8}
    checkpoint = Checkpoint.open(write_moe(tmp_path / "m", "gemma4_text", **fields))
    match = "no small gemma4_text .* with --machine"
    with pytest.raises(SettingError, match=match), reduced(checkpoint, 2):
        pass


def test_as_many_experts_are_left_as_fit_in_memory(tmp_path, monkeypatch):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512}
    path = write_toy(tmp_path / "m", num_experts=12, top_k=6, **sizes)
    checkpoint = Checkpoint.open(path)
    with reduced(checkpoint, 6) as (small, _):
        limit = 2 * small.dense_nbytes + 3.5 * small.expert_nbytes / small.num_experts
    monkeypatch.setattr("flashmoe.memory.system.available", lambda: int(2 * limit))
    with reduced(checkpoint, 6) as (small, k):
        assert k == 3
        assert small.num_experts == k
    monkeypatch.setattr("flashmoe.memory.system.available", lambda: 1_000_000)
    with pytest.raises(SettingError, match="--machine"), reduced(checkpoint, 6):
        pass
