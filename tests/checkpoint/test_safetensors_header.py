"""Tests that damaged shards, headers and tensors of a checkpoint are refused with a reason."""

import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_edits import (
    INDEX,
    SWITCH,
    assert_refused,
    edit_json,
    edit_weights,
    tensor,
    write_safetensors,
)
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.expert_layers import GLU
from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.errors import ReadError
from flashmoe.streaming.reader import Reader, ReadRequest

# The index and the shards


def test_directory_without_safetensors_is_refused(checkpoint_dir):
    (checkpoint_dir / "model.safetensors").unlink()
    assert_refused(checkpoint_dir, "holds no model*.safetensors")


def test_missing_shard_is_reported_as_an_incomplete_download(sharded_dir):
    shard = next(sharded_dir.glob("*-00002-of-*"))
    shard.unlink()
    assert_refused(sharded_dir, shard.name, "the download is incomplete")


def test_dangling_shard_link_is_refused(sharded_dir):
    (sharded_dir / INDEX).unlink()
    shard = next(sharded_dir.glob("*-00002-of-*"))
    shard.unlink()
    shard.symlink_to("nowhere")
    assert_refused(sharded_dir, shard.name, "missing or not a regular file")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "\\x.safetensors"]
    + ["model.bin", "a\0.safetensors", "\x1b[31m.safetensors", "\ud800.safetensors", 7, None],
)
def test_shard_outside_the_directory_is_refused(sharded_dir, shard):
    edit_json(sharded_dir / INDEX, lambda i: i["weight_map"].update(x=shard))
    assert_refused(sharded_dir, "tensor 'x' in", "a shard must be a model*.safetensors")


def test_index_without_weight_map_is_refused(sharded_dir):
    edit_json(sharded_dir / INDEX, lambda i: i.pop("weight_map"))
    assert_refused(sharded_dir, "must have an object weight_map")


def test_empty_weight_map_is_refused(sharded_dir):
    edit_json(sharded_dir / INDEX, lambda i: i["weight_map"].clear())
    assert_refused(sharded_dir, "places it in None")


def test_index_that_names_an_absent_tensor_is_refused(sharded_dir):
    shard = next(sharded_dir.glob("*-00002-of-*")).name
    edit_json(sharded_dir / INDEX, lambda i: i["weight_map"].update(ghost=shard))
    assert_refused(sharded_dir, "places tensor 'ghost' in", shard)


def test_index_that_omits_a_tensor_is_refused(sharded_dir):
    name = f"{SWITCH}.up_proj.weight"
    edit_json(sharded_dir / INDEX, lambda i: i["weight_map"].pop(name))
    assert_refused(sharded_dir, f"tensor '{name}' is in", "places it in None")


def test_tensor_in_two_shards_is_refused(sharded_dir):
    (sharded_dir / INDEX).unlink()
    shard = next(sharded_dir.glob("*-00002-of-*"))
    shutil.copy(shard, sharded_dir / "model-00009-of-00003.safetensors")
    assert_refused(sharded_dir, "is in both", shard.name, "model-00009-of-00003.safetensors")


# Headers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "gives its header 0 bytes; the file has 0"),
        (b"\x02\0\0", "the file has 3"),
        ((1).to_bytes(8, "little") + b" " * 9, "gives its header 1 bytes"),
        ((12).to_bytes(8, "little") + b"{}", "gives its header 12 bytes; the file has 10"),
        (b"\xff" * 8 + b"{}", "gives its header 18446744073709551615 bytes"),
    ],
)
def test_impossible_header_length_is_refused(checkpoint_dir, content, message):
    (checkpoint_dir / "model.safetensors").write_bytes(content)
    assert_refused(checkpoint_dir, message, "the download is incomplete")


def test_header_over_100_mb_is_refused(checkpoint_dir):
    with open(checkpoint_dir / "model.safetensors", "wb") as f:
        f.write((100_000_001).to_bytes(8, "little"))
        f.truncate(200_000_000)
    assert_refused(checkpoint_dir, "gives its header 100000001 bytes", "the limit is 100000000")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": \xff}', "is not UTF-8"),
        (b"{'a'}", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"[" * 200_000, "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "holds the key 'a' twice"),
        ({"a": 1}, "must be described by an object, not 1"),
        ({"a": {"b": {"c": 1}}}, "unknown dtype None"),
        ({"a": tensor(0, 4, dtype="U7")}, "unknown dtype 'U7'"),
        ({"a": tensor(0, 4, dtype=["U8"])}, "unknown dtype ['U8']"),
        ({"a": tensor(0, 4, shape=[-2, -2])}, "has shape [-2, -2]"),
        ({"a": tensor(0, 4, shape=[True, 4])}, "has shape [True, 4]"),
        ({"a": tensor(0, 4, shape=[4.0])}, "has shape [4.0]"),
        ({"a": tensor(0, 4, shape="4")}, "has shape '4'"),
        ({"a": tensor(0, 4, shape=[2**31, 2**31])}, "has shape"),
        ({"a": tensor(0, 4, shape=[1] * 100_000)}, "has shape [1, 1, 1, 1, 1, 1, ...]"),
        ({"a": tensor(0, 4, shape=[3])}, "U8 [3], needs 3 bytes"),
        ({"a": tensor(0, 4, dtype="F32")}, "F32 [4], needs 16 bytes"),
        ({"a": tensor(4, 0, shape=[4])}, "needs 4 bytes, but data_offsets [4, 0] hold -4"),
        ({"a": tensor(-4, 0)}, "data_offsets [-4, 0]"),
        ({"a": {**tensor(0, 1), "data_offsets": [False, True]}}, "data_offsets [False, True]"),
        ({"a": {**tensor(0, 1), "data_offsets": [0, 1, 2]}}, "data_offsets [0, 1, 2]"),
        ({"a": {**tensor(0, 1), "data_offsets": 3}}, "data_offsets 3"),
        ({"a": tensor(0, 4), "b": tensor(2, 8)}, "overlaps tensor 'a'"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, "overlaps tensor 'a'"),
        ({"a": tensor(0, 3), "b": tensor(5, 8)}, "leaves 2 unowned bytes after tensor 'a'"),
        ({"a": tensor(1, 8)}, "leaves 1 unowned bytes after the header"),
        ({"a": tensor(0, 7)}, "its last tensor ends at"),
        ({"a": tensor(0, 4), "b": tensor(4, 9)}, "tensor 'b' needs bytes"),
        ({"\x1b]0;\ud800": 1}, r"tensor '\x1b]0;\ud800' must"),
    ],
)
def test_bad_header_is_refused(checkpoint_dir, header, message):
    write_safetensors(checkpoint_dir / "model.safetensors", header, b"8 bytes.")
    assert_refused(checkpoint_dir, message)


def test_error_of_a_truncated_shard_names_the_expert(sharded_dir):
    checkpoint = Checkpoint.open(sharded_dir)
    layer = checkpoint.expert_layers[2]
    part = layer.parts[0]
    start, stop = part.range(5)
    os.truncate(part.file, start + 3)
    assert_refused(
        sharded_dir,
        f"expert 5 of layer 2 needs bytes {start}..{stop} of {part.file.name}, which has "
        f"{start + 3}: the download is incomplete; download it again",
    )


def test_error_of_a_truncated_shard_names_the_dense_tensor(checkpoint_dir):
    lost = next(t for t in Checkpoint.open(checkpoint_dir).dense if t.nbytes > 100)
    os.truncate(checkpoint_dir / "model.safetensors", lost.stop - 1)
    assert_refused(
        checkpoint_dir, f"tensor '{lost.name}' needs bytes {lost.start}..{lost.stop}", "incomplete"
    )


# Experts


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
@pytest.mark.parametrize("projection", GLU)
def test_missing_expert_tensor_is_refused(checkpoint_dir, projection, part):
    name = f"{SWITCH}.{projection}.{part}"
    edit_weights(checkpoint_dir, lambda w: w.pop(name))
    assert_refused(checkpoint_dir, f"tensor '{name}' is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.0.up_proj.weight",
    ],
)
def test_unconverted_hugging_face_checkpoint_is_refused(checkpoint_dir, name):
    write_safetensors(checkpoint_dir / "model.safetensors", {name: tensor(0, 4)}, b"four")
    assert_refused(
        checkpoint_dir,
        f"'{name}'",
        "not in MLX format",
        f"mlx_lm.convert --hf-path {checkpoint_dir}",
        "-q",
    )


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("up_proj.weight", mx.zeros((6, 96, 8), mx.uint32), "disagrees with num_experts 7"),
        ("up_proj.scales", mx.zeros((8, 96, 2), mx.bfloat16), "disagrees with num_experts 7"),
        ("up_proj.weight", mx.zeros((7, 95, 8), mx.uint32), "needs (7, 96, 8) (4-bit, group 32)"),
        ("down_proj.weight", mx.zeros((7, 96, 8), mx.uint32), "rows of 96 weights"),
        ("up_proj.biases", mx.zeros((7, 96, 1), mx.bfloat16), "needs (7, 96, 2)"),
        ("up_proj.weight", mx.array(0, mx.uint32), "a weight of shape ()"),
        ("up_proj.scales", mx.zeros((7, 96, 4), mx.bfloat16), "scales of shape (7, 96, 4)"),
        ("up_proj.weight", mx.zeros((7, 96, 14), mx.uint32), "no quantisation to (2, 3, 4, 5, 6"),
        ("up_proj.weight", mx.zeros((7, 96, 8), mx.int32), "'weight': 'I32'"),
        ("up_proj.scales", mx.zeros((7, 96, 2), mx.float16), "'scales': 'F16', 'biases': 'BF16'"),
        ("up_proj.biases", mx.zeros((7, 96, 2), mx.int16), "'biases': 'I16'"),
        (
            "up_proj.scales",
            mx.zeros((7, 96, 2), mx.uint8),
            "for mxfp4 is a U32 weight, U8 scales, and no",
        ),
        ("up_proj.global_scale", mx.zeros((7,)), "holds"),
        ("up_proj.bias", mx.zeros((7, 96)), "has no use for"),
    ],
)
def test_expert_tensor_of_wrong_shape_or_dtype_is_refused(checkpoint_dir, name, array, message):
    edit_weights(checkpoint_dir, lambda w: w.update({f"{SWITCH}.{name}": array}))
    assert_refused(checkpoint_dir, f"{SWITCH}.up_proj" if "up" in name else SWITCH, message)


@pytest.mark.parametrize("dtype", [mx.int32, mx.int8])
def test_unquantised_expert_of_wrong_dtype_is_refused(originals, tmp_path, dtype):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    name = f"{SWITCH}.up_proj.weight"
    edit_weights(toy, lambda w: w.update({name: mx.zeros((7, 96, 64), dtype)}))
    assert_refused(toy, f"{SWITCH}.up_proj", "needed is one of BF16, F16, F32")


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_module_of_another_mode_than_config_names_is_refused(tmp_path, mode):
    q = FLOAT_MODES[mode]
    toy = write_toy(tmp_path, "qwen3_moe", bits=q.bits, group_size=q.group_size, mode=mode)
    assert Checkpoint.open(toy).expert_layers[0].quantization["up_proj"] == q
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    affine = {"bits": q.bits, "group_size": 32, "mode": "affine"}
    edit_json(toy / "config.json", lambda c: c["quantization"].update({name: affine}))
    assert_refused(toy, f"{name}.biases' is missing")


@pytest.mark.parametrize(
    ("array", "message"),
    [(mx.zeros((7,), mx.bfloat16), "dtype BF16, needed is F32"), (mx.zeros((8,)), "num_experts 7")],
)
def test_global_scale_of_wrong_shape_or_dtype_is_refused(tmp_path, array, message):
    toy = write_toy(tmp_path, "qwen3_moe", bits=4, group_size=16, mode="nvfp4")
    name = "model.layers.0.mlp.switch_mlp.up_proj.global_scale"
    edit_weights(toy, lambda w: w.update({name: array}))
    assert_refused(toy, name, message)


def test_experts_of_a_surplus_layer_are_refused(checkpoint_dir):
    fewer = {"num_hidden_layers": 3, "full_attention_interval": 3}
    edit_json(checkpoint_dir / "config.json", lambda c: c["text_config"].update(fewer))
    assert_refused(checkpoint_dir, "layers.3.mlp.switch_mlp", "3 layers has no use for")


# Quantised dense tensors

QUERY = "language_model.model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize("part", ["weight", "biases"])
def test_missing_part_of_a_quantised_dense_tensor_is_refused(checkpoint_dir, part):
    edit_weights(checkpoint_dir, lambda w: w.pop(f"{QUERY}.{part}"))
    assert_refused(checkpoint_dir, f"tensor '{QUERY}.{part}' is missing")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"weight": (8, mx.int32)}, "'weight': 'I32'"),
        ({"scales": (2, mx.float16)}, "'scales': 'F16', 'biases': 'BF16'"),
        ({"scales": (2, mx.int16), "biases": (2, mx.int16)}, "affine is a U32 weight, scales and"),
        ({"biases": (1, mx.bfloat16)}, "has shape (128, 1), but config.json needs (128, 2)"),
        ({"scales": (2, mx.uint8)}, "for mxfp4 is a U32 weight, U8 scales, and no biases"),
    ],
    ids=["weight", "scales", "both", "shape", "mode"],
)
def test_dense_tensor_of_wrong_shape_or_dtype_is_refused(checkpoint_dir, edits, message):
    new = {f"{QUERY}.{part}": mx.zeros((128, n), dtype) for part, (n, dtype) in edits.items()}
    edit_weights(checkpoint_dir, lambda w: w.update(new))
    assert_refused(checkpoint_dir, f"'{QUERY}", message)


@pytest.mark.parametrize("quantization", [None, {"bits": 4, "group_size": 32, QUERY: False}])
def test_quantised_dense_tensor_that_config_denies_is_refused(originals, tmp_path, quantization):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    parts = {"weight": mx.zeros((128, 8), mx.uint32), "scales": mx.zeros((128, 2), mx.float16)}
    parts["biases"] = parts["scales"]
    edit_weights(toy, lambda w: w.update({f"{QUERY}.{k}": v for k, v in parts.items()}))
    edit_json(toy / "config.json", lambda c: c.update(quantization=quantization))
    assert_refused(toy, f"'{QUERY}' is quantised, but config.json says that it is not")


# Files that change


@pytest.mark.parametrize("number", [1, 2, 3])
def test_shard_replaced_after_opening_is_not_read(sharded_dir, number):
    checkpoint = Checkpoint.open(sharded_dir)
    assert set(checkpoint.identities) == set(checkpoint.files)
    part = checkpoint.expert_layers[0].parts[0]
    replacement = part.file.with_name("new")
    content = bytearray(part.file.read_bytes())
    content[part.start] ^= number
    replacement.write_bytes(content)
    shutil.copystat(part.file, replacement)
    replacement.rename(part.file)
    with Reader(1, checkpoint.identities) as reader:
        buffer = bytearray(part.nbytes)
        pending = reader.submit([ReadRequest(part.file, part.start, buffer, 0, 0)])
        with pytest.raises(ReadError, match="was deleted or replaced since the model was loaded"):
            pending.wait()
