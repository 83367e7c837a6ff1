"""Test what a model without blocks of flashmoe's own refuses, keeps, and does early."""

import shutil

import mlx.core as mx
import pytest
from checkpoint_edits import edit_json, edit_weights
from moe_types import write_moe

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.cluster.lead import Cluster
from flashmoe.errors import CheckpointError, SettingError
from flashmoe.models.generic_moe import SharedExpert
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import logits
from flashmoe.ops.reference.experts import BACKEND as REFERENCE


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_moe(tmp_path_factory.mktemp("toy") / "glm", "glm4_moe", bits=4)


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def load(directory, **settings):
    return load_streaming(
        Checkpoint.open(directory), slots=4, prompt_cache=0, backend=REFERENCE, **settings
    )


def refusal(directory) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def test_dense_tensor_of_another_shape_is_an_error_of_the_checkpoint(directory):
    edit_weights(
        directory,
        lambda w: w.update({"model.norm.weight": mx.ones(63)}),
    )
    assert "norm.weight" in refusal(directory)


def test_scales_that_leave_no_group_are_refused_before_mlx_divides(directory):
    name = "model.layers.0.self_attn.o_proj.scales"
    edit_weights(directory, lambda w: w.update({name: mx.ones((64, 512), mx.bfloat16)}))
    assert "o_proj" in refusal(directory)


def test_integers_in_the_place_of_weights_are_refused(directory):
    edit_weights(directory, lambda w: w.update({"model.norm.weight": mx.ones(64, mx.int32)}))
    assert "has dtype" in refusal(directory)


def test_missing_dense_tensor_is_refused(directory):
    edit_weights(directory, lambda w: w.pop("model.norm.weight"))
    assert "model.norm.weight" in refusal(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 0), ("head_dim", 31), ("n_group", 3), ("num_attention_heads", 3)],
)
def test_sizes_that_do_not_fit_together_are_found_when_it_is_loaded(directory, field, value):
    edit_json(directory / "config.json", lambda c: c.update({field: value}))
    assert "glm4_moe" in refusal(directory)


def test_experts_that_the_model_has_no_module_for_are_refused(directory):
    edit_json(directory / "config.json", lambda c: c.update(first_k_dense_replace=2))
    assert "has experts model.layers.1.mlp.switch_mlp" in refusal(directory)


def test_vocabulary_that_is_not_that_of_the_rows_is_refused(tmp_path):
    directory = write_moe(tmp_path / "toy", "gemma4")
    edit_json(directory / "config.json", lambda c: c["text_config"].update(vocab_size=2**20))
    assert "vocab_size" in refusal(directory)


def test_cluster_is_refused(original):
    with pytest.raises(SettingError, match="a cluster runs qwen3_5_moe"):
        Cluster(Checkpoint.open(original), "1:1", "float32")


def test_module_of_experts_keeps_its_other_children(tmp_path):
    """muse_spark has a norm there that its block reads."""
    directory = write_moe(tmp_path / "toy", "mixtral")
    model = load(directory)
    experts = model.model.layers[0].block_sparse_moe.switch_mlp
    assert "activation" in experts
    assert not {"gate_proj", "up_proj", "down_proj"} & set(experts)
    model.close()


def test_shared_expert_is_computed_once_and_handed_out_once(directory, monkeypatch):
    model = load(directory)
    block = model.model.layers[1].mlp
    assert isinstance(block.shared_experts, SharedExpert)
    calls = []
    kind = type(block.shared_experts.gate_proj)
    called = kind.__call__
    gate = block.shared_experts.gate_proj

    def counted(self, x):
        if self is gate:
            calls.append(x.shape)
        return called(self, x)

    monkeypatch.setattr(kind, "__call__", counted)
    logits(model, [1, 2, 3], 3, 2)
    assert calls == [(1, 3, 64), (1, 1, 64), (1, 1, 64)]
    model.close()


def test_head_sees_the_last_row_of_a_prompt_alone(directory):
    model = load(directory)
    rows = []
    kind = type(model.lm_head)
    called = kind.__call__
    kind.__call__ = lambda self, x: rows.append(called(self, x).shape) or called(self, x)
    try:
        from mlx_lm.models.cache import make_prompt_cache

        assert model.next_logits([1, 2, 3], make_prompt_cache(model)).shape == (1, 160)
    finally:
        kind.__call__ = called
    assert rows == [(1, 1, 160)]
    model.close()
