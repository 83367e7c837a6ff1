"""Test that numbers of config.json of model types without a table of their own are checked."""

import json
import math
import shutil

import pytest
from checkpoint_edits import assert_refused, edit_json, edit_weights
from moe_types import write_moe

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.safetensors_header import Tensor
from flashmoe.checkpoint.stacked_experts import find_stacked_experts


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("types")
    return {name: write_moe(root / name, name, bits=4) for name in ("gpt_oss", "kimi_vl")}


@pytest.fixture(params=["gpt_oss", "kimi_vl"])
def directory(request, originals, tmp_path):
    return shutil.copytree(originals[request.param], tmp_path / "checkpoint")


def edit_text(directory, field, value):
    edit_json(directory / "config.json", lambda c: c.get("text_config", c).update({field: value}))


@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, "64", True, {}])
@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_experts_per_tok",
        "max_position_embeddings",
    ],
)
def test_sizes_that_cannot_be_are_refused(directory, field, value):
    edit_text(directory, field, value)
    assert_refused(directory, "config.json", field, repr(value)[:20])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 1.0),
        ("rope_theta", float("inf")),
        ("rope_theta", -1.0),
        ("routed_scaling_factor", float("inf")),
        ("sliding_window", 2**33),
        ("head_dim", -4),
        ("rope_scaling", {"type": "yarn", "factor": 0}),
        ("rope_scaling", {"type": "yarn", "factor": float("nan")}),
        ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": 1}),
        ("partial_rotary_factor", 0),
        ("some_field", [1.0, [float("-inf")]]),
    ],
)
def test_numbers_that_make_nan_or_end_the_process_are_refused(directory, field, value):
    edit_text(directory, field, value)
    assert_refused(directory, "config.json", field)


def test_flags_are_true_or_false(originals, tmp_path):
    directory = write_moe(tmp_path / "toy", "mixtral")
    edit_text(directory, "tie_word_embeddings", "no")
    assert_refused(directory, "tie_word_embeddings 'no': true or false is needed")


def test_fields_of_other_towers_may_hold_anything(originals, tmp_path):
    directory = shutil.copytree(originals["kimi_vl"], tmp_path / "checkpoint")
    edit_json(
        directory / "config.json",
        lambda c: c.update(vision_config={"hidden_size": -1}, image_token_index=2**60),
    )
    assert Checkpoint.open(directory).num_layers == 3


def test_infinity_in_the_limit_of_time_steps_is_accepted(originals, tmp_path):
    directory = shutil.copytree(originals["gpt_oss"], tmp_path / "checkpoint")
    edit_text(directory, "time_step_limit", [0.0, float("inf")])
    Checkpoint.open(directory)


@pytest.mark.parametrize("name", ["olmo", "llama", "../models/gpt_oss", "switch_layers", "x" * 999])
def test_types_without_experts_are_refused_with_the_list_of_those_that_run(
    originals, tmp_path, name
):
    directory = shutil.copytree(originals["gpt_oss"], tmp_path / "checkpoint")
    edit_json(directory / "config.json", lambda c: c.update(model_type=name))
    assert_refused(directory, "no Mixture-of-Experts model of mlx-lm", "gpt_oss", "mixtral")


def test_type_that_mlx_lm_runs_by_another_one_opens(tmp_path):
    directory = write_moe(tmp_path / "toy", "minimax")
    edit_json(directory / "config.json", lambda c: c.update(model_type="minimax_m2"))
    assert Checkpoint.open(directory).model_type == "minimax_m2"


def drop(name):
    return lambda w: w.pop(name)


PREFIX = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (drop(f"{PREFIX}.up_proj.weight"), "up_proj.weight' is missing"),
        (drop(f"{PREFIX}.up_proj.scales"), "up_proj"),
        (
            lambda w: w.update({f"{PREFIX}.up_proj.bias": w[f"{PREFIX}.up_proj.bias"][:, :9]}),
            "has shape (8, 9)",
        ),
        (
            lambda w: w.update({f"{PREFIX}.down_proj.weight": w[f"{PREFIX}.down_proj.weight"][:7]}),
            "has shape (8,",
        ),
        (lambda w: [w.pop(k) for k in list(w) if ".experts." in k], "no stacked experts"),
    ],
)
def test_experts_that_disagree_are_refused(originals, tmp_path, edit, text):
    directory = shutil.copytree(originals["gpt_oss"], tmp_path / "checkpoint")
    edit_weights(directory, edit)
    assert_refused(directory, text)


def test_layers_are_found_by_tensors_whatever_the_modules_are_called(tmp_path):
    directory = write_moe(tmp_path / "toy", "phixtral")
    checkpoint = Checkpoint.open(directory)
    layer = checkpoint.expert_layers[1]
    assert layer.prefix == "transformer.h.1.moe.switch_mlp"
    assert layer.projections == ("fc1", "fc2")
    assert {part.part for part in layer.parts} == {"weight", "bias"}
    assert checkpoint.num_experts == 8
    assert not any("switch_mlp" in tensor.name for tensor in checkpoint.dense)
    assert json.loads((directory / "config.json").read_text())["model_dim"] == 64
    assert checkpoint.text_config["hidden_size"] == 64


def test_second_module_of_experts_in_a_layer_gets_a_number_after_the_layers(tmp_path):
    def stack(name, shape):
        return Tensor(name, "F32", shape, tmp_path / "model.safetensors", 0, 4 * math.prod(shape))

    tensors = {}
    for layer in range(2):
        for block in ("mlp", "moe"):
            for name, shape in (("fc1", (4, 8, 16)), ("fc2", (4, 16, 8))):
                full = f"model.layers.{layer}.{block}.experts.{name}.weight"
                tensors[full] = stack(full, shape)
    attention = "model.layers.0.self_attn.gate_proj.weight"
    tensors[attention] = stack(attention, (8, 16))
    found = find_stacked_experts({"num_hidden_layers": 2}, None, tensors, tmp_path)
    assert {n: (x.layer, x.prefix.split(".")[3]) for n, x in found.items()} == {
        0: (0, "mlp"),
        2: (0, "moe"),
        1: (1, "mlp"),
        3: (1, "moe"),
    }
