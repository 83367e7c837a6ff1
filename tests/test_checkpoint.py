"""checkpoint.py, model_config.py and safetensors_index.py on real toys, and on damaged ones."""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.switch_layers import SwitchLinear

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint import PROJECTIONS, Checkpoint, Quantization
from flashmoe.errors import CheckpointError, ReadError
from flashmoe.footprint import RUNTIME_NBYTES, lasting_nbytes
from flashmoe.model_config import (
    BITS,
    FIELDS,
    GROUP_SIZES,
    LINEAR_FIELDS,
    check_text_config,
)
from flashmoe.reader import Reader, ReadRequest
from toys import FAMILIES, write_toy

INDEX = "model.safetensors.index.json"
SWITCH = "language_model.model.layers.0.mlp.switch_mlp"


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    write_toy(root / "one", layers=4)
    write_toy(root / "three", layers=4, shards=3)
    write_toy(root / "plain", layers=4, bits=None)
    write_toy(root / "next", "qwen3_next", layers=4, dense_layer=True)
    return root


@pytest.fixture
def one(originals, tmp_path):
    """A whole checkpoint in one file, to damage."""
    return Path(shutil.copytree(originals / "one", tmp_path / "one"))


@pytest.fixture
def three(originals, tmp_path):
    """The same in three shards with an index."""
    return Path(shutil.copytree(originals / "three", tmp_path / "three"))


def refuses(directory, *texts):
    """The directory does not open, and the message holds all texts."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    for text in texts:
        assert text in str(caught.value)


def edit_json(file, edit):
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def edit_weights(directory, edit):
    file = directory / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights)


def write_safetensors(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(start, stop, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


# What opens, and what is found in it.


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
def test_expert_bytes_are_not_those_that_mlx_loads(tmp_path, family, kind):
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
def test_layers_or_figures_are_wrong(tmp_path, family):
    dense = family != "qwen3_5_moe"
    toy = write_toy(tmp_path, family, dense_layer=dense, num_experts=9, top_k=4, tie=True)
    checkpoint = Checkpoint.open(str(toy))
    assert list(checkpoint.expert_layers) == ([0, 2, 3] if dense else [0, 1, 2, 3])
    assert (checkpoint.model_type, checkpoint.num_layers) == (family, 4)
    assert (checkpoint.num_experts, checkpoint.top_k, checkpoint.max_context) == (9, 4, 512)
    layer = checkpoint.expert_layers[3]
    order = [(p, part) for p in PROJECTIONS for part in ("weight", "scales", "biases")]
    assert [(p.projection, p.part) for p in layer.parts] == order
    assert layer.quantization == dict.fromkeys(PROJECTIONS, Quantization(4, 32))
    # 3 matrices of 64 x 96: 4 bits each, and 2 bf16 for each 32.
    assert layer.expert_nbytes == 3 * 64 * 96 * (4 / 8 + 4 / 32)
    assert checkpoint.expert_nbytes == len(checkpoint.expert_layers) * 9 * layer.expert_nbytes
    total = sum(t.nbytes for t in checkpoint.tensors.values())
    assert checkpoint.dense_nbytes == total - checkpoint.expert_nbytes
    assert not any("switch_mlp" in t.name for t in checkpoint.dense)


def test_decoder_sparse_step_is_ignored(tmp_path):
    toy = write_toy(tmp_path, "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    assert list(Checkpoint.open(toy).expert_layers) == [1]


def test_config_without_text_config_is_refused(one):
    def flatten(config):
        config |= config.pop("text_config") | {"model_type": "qwen3_5_moe"}

    edit_json(one / "config.json", flatten)
    assert Checkpoint.open(one).num_experts == 7


def test_override_by_path_is_ignored(tmp_path):
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
        refuses(toy, f"{name}.weight", "(7, 64, 24)", "(7, 64, 12)", "quantization")
    override({"bits": 8, "group_size": 64})
    refuses(toy, "rows of 96 weights, not a multiple of the group size 64")
    override({"bits": 8, "group_size": 32})
    layers = Checkpoint.open(toy).expert_layers
    assert layers[0].quantization["down_proj"] == Quantization(8, 32)
    assert layers[0].expert_nbytes > layers[1].expert_nbytes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unnamed_quantisation_is_not_that_of_mlx_lm(tmp_path, bits, group_size):
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
    assert layer.quantization == dict.fromkeys(PROJECTIONS, Quantization(bits, group_size))
    found = {
        p.part: mx.zeros((7, *p.shape), {"U32": mx.uint32}.get(p.dtype, mx.bfloat16))
        for p in layer.parts
        if p.projection == "up_proj"
    }
    weights = {f"up_proj.{part}": array for part, array in found.items()}
    inferred = mlx_lm.utils.infer_quant_config("up_proj", SwitchLinear(128, 128, 7), weights)
    assert inferred == {"bits": bits, "group_size": group_size, "mode": "affine"}


def test_plain_projection_among_quantised_ones_is_refused(one):
    name = f"{SWITCH}.up_proj"

    def plain(weights):
        for part in ("weight", "scales", "biases"):
            weights.pop(f"{name}.{part}")
        weights[f"{name}.weight"] = mx.zeros((7, 96, 64), mx.float16)

    edit_weights(one, plain)
    assert Checkpoint.open(one).expert_layers[0].quantization["up_proj"] is None
    assert len(Checkpoint.open(one).expert_layers[0].parts) == 7
    edit_json(one / "config.json", lambda c: c["quantization"].update({name: True}))
    refuses(one, f"{name}.scales' is missing")


def test_vision_or_mtp_tensors_count_as_dense(one):
    names = ("vision_tower.x.weight", "language_model.mtp.layers.0.mlp.switch_mlp.up_proj.weight")
    before = Checkpoint.open(one).dense_nbytes
    edit_weights(one, lambda w: w.update({n: mx.zeros((3, 5)) for n in names}))
    assert Checkpoint.open(one).dense_nbytes == before


def test_linked_shards_are_refused(three, tmp_path):
    """The Hugging Face cache holds links to blobs."""
    shard = next(three.glob("*-00002-of-*"))
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    assert shard in Checkpoint.open(three).files


def test_opening_the_demo_model_changes():
    checkpoint = Checkpoint.open(find(DEMO))
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (8, 64, 10)
    assert (checkpoint.max_context, len(checkpoint.expert_layers)) == (4096, 8)
    assert (checkpoint.expert_nbytes, checkpoint.dense_nbytes) == (21_233_664, 8_425_088)


def test_opening_pulls_in_mlx():
    code = (
        "import sys, flashmoe.checkpoint; sys.exit(any(m.startswith('mlx') for m in sys.modules))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


# Paths.


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "x" * 5000, "\x1b[31m"])
def test_missing_directory_passes(tmp_path, name):
    refuses(tmp_path / name, "there is no directory")


def test_file_passes_as_directory(one):
    refuses(one / "config.json", "is not a directory", "the directory that holds config.json")


def test_hub_name_is_not_explained():
    name = "mlx-community/Qwen3-30B-A3B-4bit"
    refuses(name, f"flashmoe download hub:{name}")


# config.json.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, it holds [1]"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"a":' + b"[" * 200_000, "is not valid JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", "is not valid JSON"),
    ],
    ids=["cut", "array", "bytes", "twice", "deep", "digits"],
)
def test_corrupt_config_passes(one, text, message):
    (one / "config.json").write_bytes(text)
    refuses(one, str(one / "config.json"), message)


def test_missing_config_passes(one):
    (one / "config.json").unlink()
    refuses(one, "config.json is missing")


def test_config_that_is_a_pipe_hangs(one):
    (one / "config.json").unlink()
    os.mkfifo(one / "config.json")
    refuses(one, "no regular file")


def test_oversized_config_is_read(one):
    os.truncate(one / "config.json", 100_000_001)
    refuses(one, "longer than 100000000 bytes")


SIZES = [*FIELDS, *LINEAR_FIELDS, "head_dim"]


@pytest.mark.parametrize("value", [None, 0, -4, True, 64.0, "64", [64], 2**40])
@pytest.mark.parametrize("field", SIZES)
def test_ill_typed_field_passes(originals, tmp_path, field, value):
    for toy in ("one", "next"):
        if (toy, field, value) == ("one", "head_dim", None):
            continue  # mlx-lm takes a default for it
        config = json.loads((originals / toy / "config.json").read_text())
        config.get("text_config", config)[field] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        refuses(tmp_path, f"has {field} {value!r}", "a whole number in 1..")


@pytest.mark.parametrize("field", SIZES)
def test_missing_field_passes_or_a_default_is_not_that_of_mlx_lm(originals, tmp_path, field):
    classes = {"one": qwen3_5.TextModelArgs, "next": qwen3_next.ModelArgs}
    for toy, args_class in classes.items():
        config = json.loads((originals / toy / "config.json").read_text())
        del config.get("text_config", config)[field]
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            default = getattr(args_class.from_dict(config.get("text_config", config)), field)
        except TypeError:  # mlx-lm has none
            default = 0
        if default == 0:
            refuses(tmp_path, f"has {field} None", "a whole number in 1..")
        else:
            assert check_text_config(config, tmp_path)[field] == default


def test_fewer_layers_than_one_interval_pass(one):
    edit_json(one / "config.json", lambda c: c["text_config"].update(full_attention_interval=5))
    refuses(one, "full_attention_interval 5, more than num_hidden_layers 4")


def test_null_head_dim_is_refused(one):
    edit_json(one / "config.json", lambda c: c["text_config"].update(head_dim=None))
    assert Checkpoint.open(one).text_config["head_dim"] == 64 // 2
    edit_json(one / "config.json", lambda c: c["text_config"].update(num_attention_heads=65))
    refuses(one, "has head_dim 0")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "llama"}, "'llama'; supported are qwen3_5_moe, qwen3_next, qwen3_moe"),
        ({"model_type": ["qwen3_moe"]}, "supported are"),
        ({"model_file": "evil.py"}, "model_file 'evil.py', which is never done"),
        ({"text_config": [1]}, "text_config [1]: it must be an object"),
        ({"quantization": 4}, "quantization 4"),
        ({"quantization": {"bits": 4}}, "group_size None"),
        ({"quantization": {"bits": 7, "group_size": 32}}, "bits 7, not one of (2, 3, 4, 5, 6, 8)"),
        ({"quantization": {"bits": True, "group_size": 32}}, "bits True"),
        ({"quantization": {"bits": 4, "group_size": 16}}, "group_size 16"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": ["x"]}}, "mode ['x']"),
        ({"quantization": {"bits": 4, "group_size": 32, "a.b": 3}}, "quantization['a.b'] is 3"),
        ({"quantization": {"bits": 4, "group_size": 32, "a": {"bits": 4}}}, "group_size None"),
        ({"quantization": {"bits": 4, "group_size": 32, f"{SWITCH}.up_proj": False}}, "is not"),
        ({"quantization": None, "quantization_config": {"quant_method": "awq"}}, "method 'awq'"),
        ({"quantization": None, "quantization_config": {"quant_method": "fp8"}}, "method 'fp8'"),
        ({"quantization": None, "quantization_config": "gptq"}, "method 'gptq'"),
        ({"quantization": None, "quantization_config": None}, "config.json says that it is not"),
    ],
)
def test_unsupported_config_passes(one, edit, message):
    edit_json(one / "config.json", lambda c: c.update(edit))
    refuses(one, message)


def test_code_named_by_auto_map_runs(one):
    (one / "evil.py").write_text("raise SystemExit('it ran')")
    edit_json(one / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))
    Checkpoint.open(one)
    assert "evil" not in sys.modules


def test_modelopt_export_passes(originals, tmp_path):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    (toy / "hf_quant_config.json").write_text("{}")
    refuses(toy, "'modelopt'", "mlx_lm.convert")


def test_top_k_above_experts_passes(one):
    edit_json(one / "config.json", lambda c: c["text_config"].update(num_experts_per_tok=8))
    refuses(one, "num_experts_per_tok 8, more than num_experts 7")


@pytest.mark.parametrize("value", [None, 1, [True], [-1], ["0"]])
def test_bad_mlp_only_layers_passes(originals, tmp_path, value):
    toy = Path(shutil.copytree(originals / "next", tmp_path / "next"))
    edit_json(toy / "config.json", lambda c: c.update(mlp_only_layers=value))
    refuses(toy, f"mlp_only_layers {value}")


def test_model_without_expert_layers_passes(originals, tmp_path):
    toy = Path(shutil.copytree(originals / "next", tmp_path / "next"))
    edit_json(toy / "config.json", lambda c: c.update(decoder_sparse_step=5))
    refuses(toy, "leaves no layer with experts")


# The index and the shards.


def test_no_safetensors_passes(one):
    (one / "model.safetensors").unlink()
    refuses(one, "holds no model*.safetensors")


def test_missing_shard_passes(three):
    shard = next(three.glob("*-00002-of-*"))
    shard.unlink()
    refuses(three, shard.name, "the download is incomplete")


def test_dangling_link_is_skipped(three):
    (three / INDEX).unlink()
    shard = next(three.glob("*-00002-of-*"))
    shard.unlink()
    shard.symlink_to("nowhere")
    refuses(three, shard.name, "missing or no regular file")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "\\x.safetensors"]
    + ["model.bin", "a\0.safetensors", "\x1b[31m.safetensors", "\ud800.safetensors", 7, None],
)
def test_shard_outside_the_directory_is_opened(three, shard):
    edit_json(three / INDEX, lambda i: i["weight_map"].update(x=shard))
    refuses(three, "tensor 'x' in", "a shard must be a model*.safetensors")


def test_index_without_weight_map_passes(three):
    edit_json(three / INDEX, lambda i: i.pop("weight_map"))
    refuses(three, "must have an object weight_map")


def test_empty_weight_map_passes(three):
    edit_json(three / INDEX, lambda i: i["weight_map"].clear())
    refuses(three, "places it in None")


def test_index_that_names_an_absent_tensor_passes(three):
    shard = next(three.glob("*-00002-of-*")).name
    edit_json(three / INDEX, lambda i: i["weight_map"].update(ghost=shard))
    refuses(three, "places tensor 'ghost' in", shard)


def test_index_that_omits_a_tensor_passes(three):
    name = f"{SWITCH}.up_proj.weight"
    edit_json(three / INDEX, lambda i: i["weight_map"].pop(name))
    refuses(three, f"tensor '{name}' is in", "places it in None")


def test_tensor_in_two_shards_passes(three):
    (three / INDEX).unlink()
    shard = next(three.glob("*-00002-of-*"))
    shutil.copy(shard, three / "model-00009-of-00003.safetensors")
    refuses(three, "is in both", shard.name, "model-00009-of-00003.safetensors")


# Headers.


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
def test_impossible_header_length_is_read(one, content, message):
    (one / "model.safetensors").write_bytes(content)
    refuses(one, message, "the download is incomplete")


def test_header_over_100_mb_is_read(one):
    with open(one / "model.safetensors", "wb") as f:
        f.write((100_000_001).to_bytes(8, "little"))
        f.truncate(200_000_000)
    refuses(one, "gives its header 100000001 bytes", "the limit is 100000000")


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
def test_bad_header_passes(one, header, message):
    write_safetensors(one / "model.safetensors", header, b"8 bytes.")
    refuses(one, message)


def test_truncated_expert_is_not_named(three):
    checkpoint = Checkpoint.open(three)
    layer = checkpoint.expert_layers[2]
    part = layer.parts[0]
    start, stop = part.range(5)
    os.truncate(part.file, start + 3)
    refuses(
        three,
        f"expert 5 of layer 2 needs bytes {start}..{stop} of {part.file.name}, which has "
        f"{start + 3}: the download is incomplete; download it again",
    )


def test_truncated_dense_tensor_is_not_named(one):
    lost = next(t for t in Checkpoint.open(one).dense if t.nbytes > 100)
    os.truncate(one / "model.safetensors", lost.stop - 1)
    refuses(one, f"tensor '{lost.name}' needs bytes {lost.start}..{lost.stop}", "incomplete")


# Experts.


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_missing_expert_tensor_passes(one, projection, part):
    name = f"{SWITCH}.{projection}.{part}"
    edit_weights(one, lambda w: w.pop(name))
    refuses(one, f"tensor '{name}' is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.0.up_proj.weight",
    ],
)
def test_raw_hugging_face_checkpoint_passes(one, name):
    write_safetensors(one / "model.safetensors", {name: tensor(0, 4)}, b"four")
    refuses(one, f"'{name}'", "not in MLX format", f"mlx_lm.convert --hf-path {one}", "-q")


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
        ("up_proj.scales", mx.zeros((7, 96, 2), mx.uint8), "mxfp4, mxfp8 or nvfp4"),
        ("up_proj.global_scale", mx.zeros((7,)), "holds"),
        ("up_proj.bias", mx.zeros((7, 96)), "has no use for"),
    ],
)
def test_expert_tensor_of_the_wrong_form_passes(one, name, array, message):
    edit_weights(one, lambda w: w.update({f"{SWITCH}.{name}": array}))
    refuses(one, f"{SWITCH}.up_proj" if "up" in name else SWITCH, message)


@pytest.mark.parametrize("dtype", [mx.int32, mx.int8])
def test_plain_expert_of_the_wrong_dtype_passes(originals, tmp_path, dtype):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    name = f"{SWITCH}.up_proj.weight"
    edit_weights(toy, lambda w: w.update({name: mx.zeros((7, 96, 64), dtype)}))
    refuses(toy, f"{SWITCH}.up_proj", "needed is one of BF16, F16, F32")


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32)])
def test_other_quantisation_mode_passes(tmp_path, mode, bits, group):
    toy = write_toy(tmp_path, "qwen3_moe", bits=bits, group_size=group, mode=mode)
    refuses(toy, f"mode '{mode}'", "only affine is supported")
    edit_json(toy / "config.json", lambda c: c["quantization"].update(mode="affine"))
    refuses(toy, "U8 scales", "only affine is supported")


def test_experts_of_a_layer_too_many_pass(one):
    three = {"num_hidden_layers": 3, "full_attention_interval": 3}
    edit_json(one / "config.json", lambda c: c["text_config"].update(three))
    refuses(one, "layers.3.mlp.switch_mlp", "3 layers has no use for")


# What is quantised of the dense tensors.

QUERY = "language_model.model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize("part", ["weight", "biases"])
def test_missing_dense_tensor_passes(one, part):
    edit_weights(one, lambda w: w.pop(f"{QUERY}.{part}"))
    refuses(one, f"tensor '{QUERY}.{part}' is missing")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"weight": (8, mx.int32)}, "'weight': 'I32'"),
        ({"scales": (2, mx.float16)}, "'scales': 'F16', 'biases': 'BF16'"),
        ({"scales": (2, mx.int16), "biases": (2, mx.int16)}, "needed is a U32 weight, and scales"),
        ({"biases": (1, mx.bfloat16)}, "scales of shape (128, 2) and biases of shape (128, 1)"),
        ({"scales": (2, mx.uint8)}, "U8 scales, so its mode is mxfp4, mxfp8 or nvfp4"),
    ],
    ids=["weight", "scales", "both", "shape", "mode"],
)
def test_dense_tensor_of_the_wrong_form_passes(one, edits, message):
    new = {f"{QUERY}.{part}": mx.zeros((128, n), dtype) for part, (n, dtype) in edits.items()}
    edit_weights(one, lambda w: w.update(new))
    refuses(one, f"'{QUERY}'", message)


@pytest.mark.parametrize("quantization", [None, {"bits": 4, "group_size": 32, QUERY: False}])
def test_dense_scales_that_config_denies_pass(originals, tmp_path, quantization):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    parts = {"weight": mx.zeros((128, 8), mx.uint32), "scales": mx.zeros((128, 2), mx.float16)}
    parts["biases"] = parts["scales"]
    edit_weights(toy, lambda w: w.update({f"{QUERY}.{k}": v for k, v in parts.items()}))
    edit_json(toy / "config.json", lambda c: c.update(quantization=quantization))
    refuses(toy, f"'{QUERY}' is quantised, but config.json says that it is not")


# Files that change.


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_shard_replaced_after_opening_is_read(three, number):
    checkpoint = Checkpoint.open(three)
    assert set(checkpoint.identities) == set(checkpoint.files)
    part = checkpoint.expert_layers[0].parts[0]
    same = part.file.with_name("new")
    content = bytearray(part.file.read_bytes())
    content[part.start] ^= number
    same.write_bytes(content)
    shutil.copystat(part.file, same)
    same.rename(part.file)
    with Reader(1, checkpoint.identities) as reader:
        buffer = bytearray(part.nbytes)
        pending = reader.submit([ReadRequest(part.file, part.start, buffer, 0, 0)])
        with pytest.raises(ReadError, match="was deleted or replaced since the model was loaded"):
            pending.wait()


# Any bytes at all.

NAMES = st.sampled_from(["a", f"{SWITCH}.up_proj.weight", "__metadata__", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "U32", "BF16", "C64"]) | JSON,
        "shape": st.lists(st.integers(0, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    },
)
HEADERS = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda v: json.dumps(v).encode()),
    st.dictionaries(NAMES, ENTRY | JSON).map(lambda v: json.dumps(v).encode()),
)


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_hostile_bytes_raise_something_else(one, header, length, data):
    length = len(header) if length is None else length
    (one / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    with pytest.raises(CheckpointError):
        Checkpoint.open(one)


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_flipped_byte_raises_something_else(originals, one, at, byte):
    content = bytearray((originals / "one" / "model.safetensors").read_bytes())
    content[at] = byte
    (one / "model.safetensors").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        Checkpoint.open(one)


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(field=st.text(max_size=5) | st.sampled_from(["quantization", "text_config"]), value=JSON)
def test_hostile_config_raises_something_else(originals, one, field, value):
    config = json.loads((originals / "one" / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**config, field: value}))
    opens_to_a_size_or_is_refused(one)


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    toy=st.sampled_from(["one", "next"]),
    edits=st.dictionaries(
        st.sampled_from([*SIZES, "mlp_only_layers", "decoder_sparse_step"]),
        st.integers(-1, 9) | st.integers() | st.just("missing") | JSON,
        max_size=3,
    ),
)
def test_hostile_sizes_raise_something_else(originals, one, toy, edits):
    config = json.loads((originals / toy / "config.json").read_text())
    text_config = config.get("text_config", config)
    text_config.update(edits)
    for field in [k for k, v in edits.items() if v == "missing"]:
        del text_config[field]
    shutil.copy(originals / toy / "model.safetensors", one)
    (one / "config.json").write_text(json.dumps(config))
    opens_to_a_size_or_is_refused(one)


def opens_to_a_size_or_is_refused(directory):
    with contextlib.suppress(CheckpointError):
        checkpoint = Checkpoint.open(directory)
        for on_gpu in (False, True):
            assert lasting_nbytes(checkpoint, on_gpu=on_gpu) >= RUNTIME_NBYTES


def test_opening_reads_more_than_headers(tmp_path):
    """A sparse file of 64 GB opens at once, or not at all."""
    toy = write_toy(tmp_path, bits=None)
    checkpoint = Checkpoint.open(toy)
    header = {t.name: {"dtype": t.dtype, "shape": t.shape} for t in checkpoint.tensors.values()}
    header["vision_tower.big"] = {"dtype": "U8", "shape": [32 * 2**20, 2**11]}
    end = 0
    for t in header.values():
        size = int(np.prod(t["shape"])) * {"U8": 1, "BF16": 2}[t["dtype"]]
        t["data_offsets"] = [end, end + size]
        end += size
    write_safetensors(toy / "model.safetensors", header)
    os.truncate(toy / "model.safetensors", (toy / "model.safetensors").stat().st_size + end)
    began = time.perf_counter()
    assert Checkpoint.open(toy).expert_nbytes == checkpoint.expert_nbytes
    assert time.perf_counter() - began < 1
