"""Tests which values of config.json are accepted, get a default or are refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from checkpoint_edits import SIZES, SWITCH, assert_refused, edit_json
from mlx_lm.models import qwen3_5, qwen3_next

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.config import parse_text_config


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
def test_corrupt_config_is_refused(checkpoint_dir, text, message):
    (checkpoint_dir / "config.json").write_bytes(text)
    assert_refused(checkpoint_dir, str(checkpoint_dir / "config.json"), message)


def test_missing_config_is_refused(checkpoint_dir):
    (checkpoint_dir / "config.json").unlink()
    assert_refused(checkpoint_dir, "config.json is missing")


def test_config_that_is_a_pipe_is_refused_at_once(checkpoint_dir):
    (checkpoint_dir / "config.json").unlink()
    os.mkfifo(checkpoint_dir / "config.json")
    assert_refused(checkpoint_dir, "not a regular file")


def test_oversized_config_is_refused(checkpoint_dir):
    os.truncate(checkpoint_dir / "config.json", 100_000_001)
    assert_refused(checkpoint_dir, "has 100000001 bytes, the limit is 10000000")


@pytest.mark.parametrize("value", [None, 0, -4, True, 64.0, "64", [64], 2**40])
@pytest.mark.parametrize("field", SIZES)
def test_size_field_of_wrong_type_or_range_is_refused(originals, tmp_path, field, value):
    for toy in ("one", "next"):
        if (toy, field, value) == ("one", "head_dim", None):
            continue  # mlx-lm has a default for a null head_dim
        config = json.loads((originals / toy / "config.json").read_text())
        config.get("text_config", config)[field] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_refused(tmp_path, f"has {field} {value!r}", "a whole number in ")


#: Numbers of heads that are multiples of mlx-lm's defaults for the others.
WHOLES = {"num_attention_heads": 8, "linear_num_value_heads": 64}


@pytest.mark.parametrize("field", SIZES)
def test_missing_size_field_gets_the_default_of_mlx_lm_or_is_refused(originals, tmp_path, field):
    classes = {"one": qwen3_5.TextModelArgs, "next": qwen3_next.ModelArgs}
    for toy, args_class in classes.items():
        config = json.loads((originals / toy / "config.json").read_text())
        text_config = config.get("text_config", config)
        del text_config[field]
        # So many that each number of heads divides them.
        text_config.update({k: v for k, v in WHOLES.items() if k != field})
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            default = getattr(args_class.from_dict(config.get("text_config", config)), field)
        except TypeError:  # mlx-lm has no default and requires the field
            default = 0
        if default == 0:
            assert_refused(tmp_path, f"has {field} None", "a whole number in ")
        else:
            assert parse_text_config(config, tmp_path)[field] == default


def test_attention_interval_above_the_number_of_layers_is_refused(checkpoint_dir):
    edit_json(
        checkpoint_dir / "config.json", lambda c: c["text_config"].update(full_attention_interval=5)
    )
    assert_refused(checkpoint_dir, "full_attention_interval 5, more than num_hidden_layers 4")


def test_null_head_dim_means_hidden_size_over_heads(checkpoint_dir):
    edit_json(checkpoint_dir / "config.json", lambda c: c["text_config"].update(head_dim=None))
    assert Checkpoint.open(checkpoint_dir).text_config["head_dim"] == 64 // 2
    edit_json(
        checkpoint_dir / "config.json", lambda c: c["text_config"].update(num_attention_heads=65)
    )
    assert_refused(checkpoint_dir, "has head_dim 0")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "llama"}, "has model_type 'llama'"),
        ({"model_type": ["qwen3_moe"]}, "supported are"),
        ({"model_file": "evil.py"}, "model_file 'evil.py', which is never done"),
        ({"text_config": [1]}, "text_config [1]: it must be an object"),
        ({"quantization": 4}, "quantization 4"),
        ({"quantization": {"bits": 4}}, "group_size None"),
        ({"quantization": {"bits": 7, "group_size": 32}}, "bits 7, not one of (2, 3, 4, 5, 6, 8)"),
        ({"quantization": {"bits": True, "group_size": 32}}, "bits True"),
        ({"quantization": {"bits": 4, "group_size": 16}}, "group_size 16"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp6"}}, "mode 'mxfp6', not one"),
        ({"quantization": {"bits": 8, "group_size": 32, "mode": "mxfp4"}}, "bits 8, not 4, which"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "nvfp4"}}, "group_size 32, not 16"),
        ({"quantization": {"bits": 8, "group_size": 64, "mode": "mxfp8"}}, "group_size 64, not 32"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": ["x"]}}, "mode ['x']"),
        ({"quantization": {"bits": 4, "group_size": 32, "a.b": 3}}, "quantization['a.b'] is 3"),
        ({"quantization": {"bits": 4, "group_size": 32, "a": {"bits": 9}}}, "bits 9"),
        ({"quantization": {"bits": 4, "group_size": 32, f"{SWITCH}.up_proj": False}}, "is not"),
        ({"quantization": None, "quantization_config": {"quant_method": "awq"}}, "method 'awq'"),
        ({"quantization": None, "quantization_config": {"quant_method": "fp8"}}, "method 'fp8'"),
        ({"quantization": None, "quantization_config": "gptq"}, "method 'gptq'"),
        ({"quantization": None, "quantization_config": None}, "config.json says that it is not"),
    ],
)
def test_unsupported_config_is_refused(checkpoint_dir, edit, message):
    edit_json(checkpoint_dir / "config.json", lambda c: c.update(edit))
    assert_refused(checkpoint_dir, message)


def test_code_named_by_auto_map_is_not_run(checkpoint_dir):
    (checkpoint_dir / "evil.py").write_text("raise SystemExit('it ran')")
    edit_json(
        checkpoint_dir / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"})
    )
    Checkpoint.open(checkpoint_dir)
    assert "evil" not in sys.modules


def test_modelopt_export_is_refused(originals, tmp_path):
    toy = Path(shutil.copytree(originals / "plain", tmp_path / "plain"))
    (toy / "hf_quant_config.json").write_text("{}")
    assert_refused(toy, "'modelopt'", "mlx_lm.convert")


def test_top_k_above_the_number_of_experts_is_refused(checkpoint_dir):
    edit_json(
        checkpoint_dir / "config.json", lambda c: c["text_config"].update(num_experts_per_tok=8)
    )
    assert_refused(checkpoint_dir, "num_experts_per_tok 8, more than num_experts 7")


@pytest.mark.parametrize("value", [None, 1, [True], [-1], ["0"]])
def test_bad_mlp_only_layers_are_refused(originals, tmp_path, value):
    toy = Path(shutil.copytree(originals / "next", tmp_path / "next"))
    edit_json(toy / "config.json", lambda c: c.update(mlp_only_layers=value))
    assert_refused(toy, f"mlp_only_layers {value}")


def test_model_without_expert_layers_is_refused(originals, tmp_path):
    toy = Path(shutil.copytree(originals / "next", tmp_path / "next"))
    edit_json(toy / "config.json", lambda c: c.update(decoder_sparse_step=5))
    assert_refused(toy, "leaves no layer with experts")
