"""Tests of each row of the tables in `limits` and `rotation`: what is accepted, what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
from checkpoint_edits import assert_refused, edit_json
from toys import FAMILIES, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.config import parse_text_config
from flashmoe.errors import CheckpointError

#: Values that are no number in any range.
NO_NUMBERS = [None, "1", True, [1.0], {"__float__": "NaN"}, math.nan, math.inf, -math.inf, 10**400]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Path]:
    """A toy of each family, whose files tests only read; two have a layer without experts."""
    directory = tmp_path_factory.mktemp("toys")
    return {
        family: write_toy(directory / family, family, dense_layer=family != "qwen3_5_moe")
        for family in FAMILIES
    }


def text_config(config: dict) -> dict:
    return config.get("text_config", config)


def parse(toy: Path, **changes) -> dict:
    """Return the checked sizes of a toy after changes to the fields of its language model."""
    config = json.loads((toy / "config.json").read_text())
    text_config(config).update(changes)
    return parse_text_config(config, toy)


def refusal(toy: Path, **changes) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(toy, **changes)
    assert str(toy / "config.json") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1e-320, -1e-6, 1.0])
def test_epsilon_of_norms_must_be_a_small_number(toys, family, value):
    assert "has rms_norm_eps" in refusal(toys[family], rms_norm_eps=value)


@pytest.mark.parametrize("value", [1e-6, 1e-5, 1e-12, 0.1])
def test_real_epsilons_are_accepted(toys, value):
    assert parse(toys["qwen3_moe"], rms_norm_eps=value)["rms_norm_eps"] == value


@pytest.mark.parametrize("name", ["tie_word_embeddings", "norm_topk_prob", "attention_bias"])
@pytest.mark.parametrize("value", [None, 0, 1, "false", [], {}])
def test_flags_must_be_true_or_false(toys, name, value):
    for toy in toys.values():
        assert f"has {name} {value!r}: true or false" in refusal(toy, **{name: value})


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
@pytest.mark.parametrize("name", ["intermediate_size", "decoder_sparse_step"])
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "3", True, 2**40])
def test_sizes_of_models_with_dense_layers_are_checked(toys, family, name, value):
    assert f"has {name} {value!r}: a whole number" in refusal(toys[family], **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "a multiple of num_key_value_heads"),
        ({"linear_num_value_heads": 5}, "a multiple of linear_num_key_heads 2"),
        ({"linear_key_head_dim": 48}, "has linear_key_head_dim 48: a multiple of 32"),
        ({"linear_conv_kernel_dim": 1}, "has linear_conv_kernel_dim 1: a whole number in 2.."),
        ({"head_dim": 0}, "has head_dim 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(toys, changes, message):
    for family in ("qwen3_5_moe", "qwen3_next"):
        assert message in refusal(toys[family], **changes)


def test_fields_that_a_family_does_not_read_may_hold_anything(toys):
    unread = {"full_attention_interval": "x", "linear_num_key_heads": -1, "vision_config": [None]}
    unread |= {"layer_types": 5, "use_sliding_window": math.nan, "partial_rotary_factor": "x"}
    assert parse(toys["qwen3_moe"], **unread)["num_experts"] == 7


# Rotation


def rotated(toy: Path, **changes) -> dict:
    """Return the changes to a language model that give its rotation these values."""
    if "5" not in toy.name:
        return changes
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
    scaling = changes.pop("rope_scaling", {})
    return {"rope_parameters": rope | changes | scaling}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1, -10000.0, 1e16])
def test_base_of_the_rotation_must_be_a_number(toys, family, value):
    toy = toys[family]
    assert "has rope_theta" in refusal(toy, **rotated(toy, rope_theta=value))


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -0.25, 1.5])
def test_share_of_a_head_that_is_rotated_must_be_a_number(toys, family, value):
    toy = toys[family]
    message = refusal(toy, **rotated(toy, partial_rotary_factor=value))
    assert "has partial_rotary_factor" in message


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize(("share", "values"), [(0.1, 3), (0.01, 0), (0.16, 5)])
def test_an_even_number_of_values_must_be_rotated(toys, family, share, values):
    toy = toys[family]
    message = refusal(toy, **rotated(toy, partial_rotary_factor=share))
    assert f"head_dim 32 and partial_rotary_factor {share}, so {values} values" in message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["x", 5, [1], True])
def test_description_of_the_rotation_must_be_an_object(toys, family, value):
    field = "rope_parameters" if family == "qwen3_5_moe" else "rope_scaling"
    assert f"{field} {value!r}: an object or null" in refusal(toys[family], **{field: value})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {"type": "longrope", "original_max_position_embeddings": 64}


def pairs(toy: Path) -> int:
    return 16 if toy.name == "qwen3_moe" else 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "unknown"}, "has type 'unknown'; supported are default"),
        ({"rope_type": ["yarn"]}, "has type ['yarn']; supported are"),
        ({"type": "linear"}, "of type linear has no factor"),
        ({"type": "linear", "factor": 0}, "factor 0: a number in 1.."),
        ({"type": "dynamic", "factor": "4"}, "factor '4'"),
        ({"type": "dynamic", "factor": None}, "factor None"),
        ({"type": "llama3", "factor": math.nan}, "factor nan"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 0}, "low_freq_factor 0"),
        ({"type": "llama3", "factor": 2, "high_freq_factor": 1}, "the first must be less"),
        ({"type": "yarn"}, "of type yarn has no factor"),
        ({**YARN, "factor": math.inf}, "factor inf"),
        ({**YARN, "original_max_position_embeddings": 0}, "_embeddings 0: a whole number in 2.."),
        ({**YARN, "original_max_position_embeddings": 64.5}, "_embeddings 64.5"),
        ({**YARN, "beta_fast": 0}, "beta_fast 0"),
        ({**YARN, "beta_slow": "x"}, "beta_slow 'x'"),
        ({**YARN, "mscale": math.nan}, "mscale nan"),
        ({**YARN, "mscale_all_dim": -1}, "mscale_all_dim -1"),
        ({"type": "longrope"}, "has no original_max_position_embeddings"),
        ({**LONG, "short_factor": 1.0, "long_factor": 1.0}, "short_factor 1.0: a list of"),
        ({**LONG, "short_factor": [1.0], "long_factor": [1.0]}, "short_factor [1.0]: a list of"),
        ({"type": "mrope"}, "of type mrope has no mrope_section"),
        ({"type": "mrope", "mrope_section": [1, 2]}, "mrope_section [1, 2]: three whole numbers"),
        ({"type": "default", "mrope_section": [1, 2, "x"]}, "mrope_section [1, 2, 'x']"),
        ({"type": "proportional", "factor": 1e300}, "factor 1e+300"),
    ],
)
def test_impossible_scaling_of_the_rotation_is_refused(toys, family, scaling, message):
    toy = toys[family]
    assert message in refusal(toy, **rotated(toy, rope_scaling=scaling))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_impossible_factor_of_a_list_is_refused(toys, family):
    toy = toys[family]
    factors = [1.0] * pairs(toy)
    bad = {**LONG, "short_factor": factors, "long_factor": [*factors[1:], math.nan]}
    assert "long_factor nan" in refusal(toy, **rotated(toy, rope_scaling=bad))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True},
        {"rope_type": "default", "factor": "not read"},
        {"type": "linear", "factor": 8},
        {"type": "dynamic", "factor": 2.0},
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {**YARN, "attention_factor": None, "beta_fast": 32, "beta_slow": 1},
        {**LONG, "short_factor": 1.0, "long_factor": 1.0},
        {"type": "proportional", "factor": 1.0},
        {"type": "mrope", "mrope_section": [1, 2, 1]},
    ],
    ids=lambda s: s.get("type", "rope_type"),
)
def test_scalings_of_real_models_are_accepted(toys, family, scaling):
    toy = toys[family]
    if scaling.get("type") == "longrope":
        factors = [1.0] * pairs(toy)
        scaling = scaling | {"short_factor": factors, "long_factor": factors}
    assert parse(toy, **rotated(toy, rope_scaling=scaling))["num_experts"] == 7


def test_rotation_of_qwen3_5_may_be_in_fields_of_its_own(toys):
    own = {"rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert parse(toys["qwen3_5_moe"], **own)
    assert "has rope_theta 0" in refusal(toys["qwen3_5_moe"], **(own | {"rope_theta": 0}))


# End tokens

BAD_ENDS = ["x", [None], {"a": 1}, -1, [-1], [1.5], True, 160, [5, 160], 2**70, math.nan]


@pytest.mark.parametrize("value", BAD_ENDS)
@pytest.mark.parametrize("place", ["config.json", "text_config", "generation_config.json"])
def test_end_tokens_that_the_model_does_not_have_are_refused(toys, tmp_path, place, value):
    toy = Path(shutil.copytree(toys["qwen3_5_moe"], tmp_path / "toy"))
    if place == "generation_config.json":
        (toy / place).write_text(json.dumps({"eos_token_id": value}))
    else:
        edit_json(
            toy / "config.json",
            lambda c: (c["text_config"] if place == "text_config" else c).update(
                eos_token_id=value
            ),
        )
    file = "config.json" if place == "text_config" else place
    assert_refused(toy, str(toy / file), "has eos_token_id", "a whole number in 0..159")


def test_end_tokens_of_generation_config_come_before_those_of_config(toys, tmp_path):
    toy = Path(shutil.copytree(toys["qwen3_moe"], tmp_path / "toy"))
    assert Checkpoint.open(toy).generation.end_tokens == []
    edit_json(toy / "config.json", lambda c: c.update(eos_token_id=7))
    assert Checkpoint.open(toy).generation.end_tokens == [7]
    (toy / "generation_config.json").write_text('{"eos_token_id": [0, 159]}')
    assert Checkpoint.open(toy).generation.end_tokens == [0, 159]
    (toy / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Checkpoint.open(toy).generation.end_tokens == [7]
