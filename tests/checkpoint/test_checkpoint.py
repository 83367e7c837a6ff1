"""Tests that checkpoints open with the right layers, sizes and byte ranges, or are refused."""

import os
import sys

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from checkpoint_edits import SWITCH, assert_refused, edit_json, edit_weights
from mlx_lm.models.switch_layers import SwitchLinear
from toys import FAMILIES, write_toy

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.expert_layers import GLU
from flashmoe.checkpoint.quantization import BITS, GROUP_SIZES, Quantization


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"shards": 3, "bits": 3, "group_size": 64, "moe_intermediate_size": 128},
        {"shards": 2, "bits": None, "dtype": "float32", "num_experts": 5, "top_k": 5},
    ],
    ids=["one", "three-3bit", "two-plain"],
)
def test_expert_ranges_hold_the_bytes_that_mlx_loads(tmp_path, family, kind):
    toy = write_toy(tmp_path, family, **kind)
    checkpoint = Checkpoint.open(toy)
    weights = {}
    for file in checkpoint.files:
        weights |= mx.load(str(file))
    random = np.random.default_rng(0)
    assert list(checkpoint.expert_layers) == [0, 1, 2, 3]
    for layer in checkpoint.expert_layers.values():
        for part in layer.parts:
            expert = int(random.integers(layer.num_experts))
            start, stop = part.range(expert)
            array = weights[f"{layer.prefix}.{part.projection}.{part.part}"][expert]
            with open(part.file, "rb") as f:
                f.seek(start)
                assert f.read(stop - start) == bytes(memoryview(array).cast("B"))
            assert (part.shape, part.nbytes) == (array.shape, array.nbytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_reports_layers_and_sizes(tmp_path, family):
    dense = family != "qwen3_5_moe"
    toy = write_toy(tmp_path, family, dense_layer=dense, num_experts=9, top_k=4, tie=True)
    checkpoint = Checkpoint.open(str(toy))
    assert list(checkpoint.expert_layers) == ([0, 2, 3] if dense else [0, 1, 2, 3])
    assert (checkpoint.model_type, checkpoint.num_layers) == (family, 4)
    assert (checkpoint.num_experts, checkpoint.top_k, checkpoint.max_context) == (9, 4, 512)
    layer = checkpoint.expert_layers[3]
    order = [(p, part) for p in GLU for part in ("weight", "scales", "biases")]
    assert [(p.projection, p.part) for p in layer.parts] == order
    assert layer.quantization == dict.fromkeys(GLU, Quantization(4, 32))
    # 3 matrices of 64 x 96 weights: 4 bits for each, and 2 bf16 for each group of 32.
    assert layer.expert_nbytes == 3 * 64 * 96 * (4 / 8 + 4 / 32)
    assert checkpoint.expert_nbytes == len(checkpoint.expert_layers) * 9 * layer.expert_nbytes
    total = sum(t.nbytes for t in checkpoint.tensors.values())
    assert checkpoint.dense_nbytes == total - checkpoint.expert_nbytes
    assert not any("switch_mlp" in t.name for t in checkpoint.dense)


def test_decoder_sparse_step_selects_expert_layers(tmp_path):
    toy = write_toy(tmp_path, "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    assert list(Checkpoint.open(toy).expert_layers) == [1]


def test_flat_config_without_text_config_opens(checkpoint_dir):
    def flatten(config):
        config |= config.pop("text_config") | {"model_type": "qwen3_5_moe"}

    edit_json(checkpoint_dir / "config.json", flatten)
    assert Checkpoint.open(checkpoint_dir).num_experts == 7


def test_quantisation_override_of_one_module_is_used(tmp_path):
    toy = write_toy(tmp_path, bits=4)
    name = f"{SWITCH}.down_proj"

    def requantize(weights):
        weights.update({k: v for k, v in weights.items() if not k.startswith(name)})
        matrix = mx.random.normal((7, 64, 96)).astype(mx.bfloat16)
        for part, array in zip(
            ("weight", "scales", "biases"), mx.quantize(matrix, 32, 8), strict=True
        ):
            weights[f"{name}.{part}"] = array

    def override(entry):
        edit_json(toy / "config.json", lambda c: c["quantization"].update({name: entry}))

    edit_weights(toy, requantize)
    for wrong in (True, {"bits": 4, "group_size": 32}):
        override(wrong)
        assert_refused(toy, f"{name}.weight", "(7, 64, 24)", "(7, 64, 12)", "quantization")
    override({"bits": 8, "group_size": 64})
    assert_refused(toy, "rows of 96 weights, not a multiple of the group size 64")
    override({"bits": 8, "group_size": 32})
    layers = Checkpoint.open(toy).expert_layers
    assert layers[0].quantization["down_proj"] == Quantization(8, 32)
    assert layers[0].expert_nbytes > layers[1].expert_nbytes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_quantisation_is_inferred_from_shapes_as_in_mlx_lm(tmp_path, bits, group_size):
    toy = write_toy(
        tmp_path,
        "qwen3_moe",
        layers=1,
        bits=bits,
        group_size=group_size,
        hidden_size=128,
        moe_intermediate_size=128,
    )
    other = {"bits": 2 if bits == 6 else 6, "group_size": 32 if group_size == 64 else 64}
    edit_json(toy / "config.json", lambda c: c.update(quantization=other))
    layer = Checkpoint.open(toy).expert_layers[0]
    assert layer.quantization == dict.fromkeys(GLU, Quantization(bits, group_size))
    arrays = {
        p.part: mx.zeros((7, *p.shape), {"U32": mx.uint32}.get(p.dtype, mx.bfloat16))
        for p in layer.parts
        if p.projection == "up_proj"
    }
    weights = {f"up_proj.{part}": array for part, array in arrays.items()}
    inferred = mlx_lm.utils.infer_quant_config("up_proj", SwitchLinear(128, 128, 7), weights)
    assert inferred == {"bits": bits, "group_size": group_size, "mode": "affine"}


def test_one_projection_may_be_unquantised(checkpoint_dir):
    name = f"{SWITCH}.up_proj"

    def plain(weights):
        for part in ("weight", "scales", "biases"):
            weights.pop(f"{name}.{part}")
        weights[f"{name}.weight"] = mx.zeros((7, 96, 64), mx.float16)

    edit_weights(checkpoint_dir, plain)
    assert Checkpoint.open(checkpoint_dir).expert_layers[0].quantization["up_proj"] is None
    assert len(Checkpoint.open(checkpoint_dir).expert_layers[0].parts) == 7
    edit_json(checkpoint_dir / "config.json", lambda c: c["quantization"].update({name: True}))
    assert_refused(checkpoint_dir, f"{name}.scales' is missing")


def test_vision_and_mtp_tensors_do_not_count_as_dense(checkpoint_dir):
    names = ("vision_tower.x.weight", "language_model.mtp.layers.0.mlp.switch_mlp.up_proj.weight")
    before = Checkpoint.open(checkpoint_dir).dense_nbytes
    edit_weights(checkpoint_dir, lambda w: w.update({n: mx.zeros((3, 5)) for n in names}))
    assert Checkpoint.open(checkpoint_dir).dense_nbytes == before


def test_symlinked_shards_open(sharded_dir, tmp_path):
    """The shards in the Hugging Face cache are links to blobs."""
    shard = next(sharded_dir.glob("*-00002-of-*"))
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert shard in Checkpoint.open(sharded_dir).files


def test_files_identity_changes_with_shards_alone(checkpoint_dir):
    def identity():
        return Checkpoint.open(checkpoint_dir).files_identity

    first = identity()
    edit_json(checkpoint_dir / "config.json", lambda c: c.update(extra=1))
    assert identity() == first
    os.utime(checkpoint_dir / "model.safetensors", ns=(1, 1))
    assert identity() != first


def test_demo_model_has_its_known_sizes():
    checkpoint = Checkpoint.open(find(DEMO))
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (8, 64, 10)
    assert (checkpoint.max_context, len(checkpoint.expert_layers)) == (4096, 8)
    assert (checkpoint.expert_nbytes, checkpoint.dense_nbytes) == (21_233_664, 8_425_088)


def test_opening_a_checkpoint_does_not_import_mlx():
    code = (
        "import sys, flashmoe.checkpoint.checkpoint; "
        "sys.exit(any(m.startswith('mlx') for m in sys.modules))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "x" * 5000, "\x1b[31m"])
def test_missing_directory_is_refused(tmp_path, name):
    assert_refused(tmp_path / name, "there is no directory")


def test_file_instead_of_a_directory_is_refused(checkpoint_dir):
    assert_refused(
        checkpoint_dir / "config.json", "is not a directory", "the directory that holds config.json"
    )


def test_hub_name_is_answered_with_the_download_command():
    name = "mlx-community/Qwen3-30B-A3B-4bit"
    assert_refused(name, f"flashmoe download hub:{name}")
