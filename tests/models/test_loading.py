"""Tests that whatever mlx-lm raises while it builds a model is an error of the checkpoint."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_edits import edit_json, edit_weights
from toys import FAMILIES, write_chat_toy, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import CheckpointError
from flashmoe.models.loading import load, load_streaming
from flashmoe.models.resident import logits


def refusal(toy: Path) -> str:
    checkpoint = Checkpoint.open(toy)
    with pytest.raises(CheckpointError) as caught:
        load_streaming(checkpoint, slots=7)
    assert str(toy) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_tensor_that_the_model_has_no_use_for_is_an_error_of_the_checkpoint(checkpoint_dir):
    edit_weights(checkpoint_dir, lambda w: w.update({"x" * 5000: mx.zeros(3)}))
    assert "mlx-lm cannot load the qwen3_5_moe" in refusal(checkpoint_dir)


@pytest.mark.parametrize(
    "override",
    [
        {"bits": 4, "group_size": 32, "unknown": 1},
        {"bits": 4, "group_size": 32, "quantize_input": True},
    ],
)
@pytest.mark.parametrize("module", ["model.norm", "model.layers.3.self_attn.o_proj"])
def test_quantisation_that_mlx_does_not_have_is_an_error_of_the_checkpoint(
    checkpoint_dir, module, override
):
    edit_json(
        checkpoint_dir / "config.json",
        lambda c: c["quantization"].update({f"language_model.{module}": override}),
    )
    assert "mlx-lm cannot load" in refusal(checkpoint_dir)


SCALINGS = [
    {"type": "linear", "factor": 8},
    {"type": "dynamic", "factor": 2.0},
    {"type": "llama3", "factor": 8.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"type": "longrope", "original_max_position_embeddings": 64, "long_factor": [2.0] * 4}
    | {"short_factor": [1.0] * 4},
    {"type": "proportional", "factor": 2.0},
    {"type": "mrope", "mrope_section": [1, 2, 1]},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["type"])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
def test_scalings_that_are_accepted_give_finite_logits(tmp_path, family, scaling):
    """What passes the checks of config.json must not fail at the first token."""
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, **scaling}
    field = {"rope_parameters": rope} if family == "qwen3_5_moe" else {"rope_scaling": scaling}
    toy = write_toy(tmp_path / "toy", family, **field)
    model = load_streaming(Checkpoint.open(toy), slots=7)
    try:
        assert all(mx.isfinite(mx.array(x)).all() for x in logits(model, [1, 2, 159], 2, 1))
    finally:
        model.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_at_the_ends_of_their_ranges_give_finite_logits(tmp_path, family):
    rope = {"rope_theta": 1e15, "partial_rotary_factor": 1}
    own = {"rope_parameters": rope} if family == "qwen3_5_moe" else rope
    toy = write_toy(tmp_path / "toy", family, rms_norm_eps=1e-12, **own)
    model = load_streaming(Checkpoint.open(toy), slots=7)
    try:
        assert all(mx.isfinite(mx.array(x)).all() for x in logits(model, [0, 159], 2, 1))
    finally:
        model.close()


def test_load_refuses_a_tokenizer_with_more_tokens_than_rows(tmp_path):
    toy = write_chat_toy(tmp_path / "toy", family="qwen3_moe", layers=1, vocab_size=8000)
    with pytest.raises(CheckpointError, match="rows for 8000 tokens"):
        load(toy, slots=7)
    shutil.rmtree(toy)
