"""Tests that each dense tensor has the shape and dtype that config.json gives it."""

import itertools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_edits import assert_refused, edit_json, edit_weights
from toys import FAMILIES, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.dense_tensors import matrices, vectors

ROOT = "language_model."
FLOATS = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Path]:
    """A toy of each family, whose files tests only read; two have a layer without experts."""
    directory = tmp_path_factory.mktemp("toys")
    return {
        family: write_toy(directory / family, family, dense_layer=family != "qwen3_5_moe")
        for family in FAMILIES
    }


@pytest.mark.parametrize(
    "kind",
    [{}, {"bits": None}, {"tie": True}, {"bits": 8, "group_size": 64}, {"dtype": "float32"}],
    ids=lambda kind: ",".join(kind) or "plain",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_mlx_lm(tmp_path, family, kind):
    wide = {"moe_intermediate_size": 128} if "group_size" in kind else {}
    toy = write_toy(tmp_path, family, **kind, **wide, attention_bias=family != "qwen3_moe")
    checkpoint = Checkpoint.open(toy)
    root = ROOT if family == "qwen3_5_moe" else ""
    parts = ("weight",) if kind.get("bits", 4) is None else ("weight", "scales", "biases")
    c = checkpoint.text_config
    names = {f"{m}.{part}" for (m, _), part in itertools.product(matrices(family, c), parts)}
    names |= {name for name, _ in vectors(family, c)}
    # mlx-lm leaves matrices that do not fit a group as they are.
    held = {t.name.removeprefix(root) for t in checkpoint.dense}
    assert held == {n for n in names if n in held or not n.endswith((".scales", ".biases"))}


def test_no_dense_layer_of_three_values_reaches_mlx(toys, tmp_path):
    """This size made mlx-lm infer groups of 0 weights, which ended the process with SIGFPE."""
    for family in ("qwen3_moe", "qwen3_next"):
        toy = Path(shutil.copytree(toys[family], tmp_path / family))
        edit_json(toy / "config.json", lambda c: c.update(intermediate_size=3))
        assert_refused(toy, "mlp.gate_proj.weight' has shape", "but config.json needs (3, ")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_size_must_agree_with_the_tensors(toys, tmp_path, family):
    """A size that no tensor contradicts would be a size that is not checked."""
    toy = Path(shutil.copytree(toys[family], tmp_path / "toy"))
    config = json.loads((toy / "config.json").read_text())
    names = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["num_experts", "moe_intermediate_size"]
    if family == "qwen3_moe":
        names += ["intermediate_size"]
    else:
        names += ["linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"]
        names += ["linear_value_head_dim", "linear_conv_kernel_dim"]
        names += ["shared_expert_intermediate_size"]
    for name in names:
        changed = json.loads(json.dumps(config))
        text = changed.get("text_config", changed)
        text[name] *= 2
        # With as many query heads as key heads the sizes are still possible.
        text["num_attention_heads"] = max(text["num_attention_heads"], text["num_key_value_heads"])
        (toy / "config.json").write_text(json.dumps(changed))
        assert_refused(toy, "but config.json needs")


@pytest.mark.parametrize("dtype", [mx.int16, mx.uint16, mx.int8, mx.uint32, mx.int32])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.3.self_attn.q_norm.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_integers_are_no_weights(originals, tmp_path, name, dtype):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "toy"))
    edit_weights(toy, lambda w: w.update({ROOT + name: mx.zeros(w[ROOT + name].shape, dtype)}))
    assert_refused(toy, f"'{ROOT}{name}' has dtype", "needed is one of BF16, F16, F32")


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_weights(originals, tmp_path, dtype):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "toy"))
    name = f"{ROOT}model.layers.0.linear_attn.A_log"
    edit_weights(toy, lambda w: w.update({name: w[name].astype(dtype)}))
    assert Checkpoint.open(toy).tensors[name].dtype == FLOATS[dtype]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.self_attn.k_proj.weight"])
def test_missing_tensor_is_refused(originals, tmp_path, name):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "toy"))
    edit_weights(toy, lambda w: w.pop(ROOT + name))
    assert_refused(toy, f"tensor '{ROOT}{name}' is missing")


def test_quantised_matrix_must_fit_its_groups(checkpoint_dir):
    name = f"{ROOT}model.layers.3.self_attn.o_proj"
    parts = {"weight": ((64, 8), mx.uint32), "scales": ((64, 1), mx.bfloat16)}
    parts["biases"] = parts["scales"]
    edit_weights(
        checkpoint_dir,
        lambda w: w.update({f"{name}.{k}": mx.zeros(*v) for k, v in parts.items()}),
    )
    # 8 words are 64 values of 4 bits in one group of 64.
    Checkpoint.open(checkpoint_dir)

    def named(bits, group_size):
        edit_json(
            checkpoint_dir / "config.json",
            lambda c: c["quantization"].update({name: {"bits": bits, "group_size": group_size}}),
        )

    named(4, 64)
    Checkpoint.open(checkpoint_dir)
    named(4, 128)
    assert_refused(checkpoint_dir, f"'{name}' has rows of 64 weights, not a multiple of the group")
    named(8, 64)
    assert_refused(checkpoint_dir, f"'{name}.weight' has shape (64, 8)", "needs (64, 16)")


def test_scales_without_a_column_are_refused(checkpoint_dir):
    """mlx-lm divided by their number."""
    name = f"{ROOT}model.layers.3.self_attn.o_proj"
    empty = mx.zeros((64, 0), mx.bfloat16)
    edit_weights(
        checkpoint_dir, lambda w: w.update({f"{name}.scales": empty, f"{name}.biases": empty})
    )
    assert_refused(checkpoint_dir, f"{name} has a weight of shape", "scales of shape (64, 0)")


def test_one_tensor_under_two_names_is_refused(checkpoint_dir):
    name = "model.norm.weight"
    edit_weights(checkpoint_dir, lambda w: w.update({name: w[ROOT + name]}))
    assert_refused(checkpoint_dir, f"'{ROOT}{name}'", f"'{name}'", "which are one tensor")


def test_convolution_may_have_the_axes_of_the_original_weights(originals, tmp_path):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "toy"))
    names = [f"{ROOT}model.layers.{layer}.linear_attn.conv1d.weight" for layer in range(3)]
    edit_weights(toy, lambda w: w.update({n: mx.contiguous(w[n].swapaxes(1, 2)) for n in names}))
    assert Checkpoint.open(toy).tensors[names[0]].shape[1] == 1
