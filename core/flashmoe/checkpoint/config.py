"""Check config.json, as hostile input: the sizes of the model. The tensors must agree with them.

Its quantisation is in `quantization`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import model_types
from .generic_config import parse_generic_config
from .json_files import show
from .limits import (
    DENSE_LAYER_SIZES,
    EPSILON,
    HEAD_DIM,
    LINEAR_SIZES,
    SIZES,
    check_flags,
    check_layer_list,
    check_number,
    check_relations,
    check_sizes,
)
from .rotation import check_rotation

#: The model types whose fields and tensors are all known here, and what comes before "layers.N" in
#: the names of their tensors, as mlx-lm writes them. Of others see `generic_config`.
TENSOR_PREFIXES = {
    "qwen3_5_moe": "language_model.model.",
    "qwen3_next": "model.",
    "qwen3_moe": "model.",
}
#: The values that mlx-lm uses for absent fields, without those that are 0, which no model has.
DEFAULTS: dict[str, dict[str, int | float]] = {
    "qwen3_5_moe": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 192,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "qwen3_next": {
        "full_attention_interval": 4,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "qwen3_moe": {"attention_bias": False},
}


def is_checked_type(config: dict) -> bool:
    """Return whether the fields and tensors of a config.json's model type are all known here."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in TENSOR_PREFIXES


def parse_text_config(config: dict, path: Path) -> dict[str, Any]:
    """Return the part of config.json that describes the language model, checked.

    Absent sizes get mlx-lm's defaults.

    Args:
        config: the content of config.json.
        path: the checkpoint directory, for errors.

    Raises:
        CheckpointError: the model type is not supported, a size is out of range, or the
            checkpoint wants its own code to be run.
    """
    where = path / "config.json"
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{where} asks to run its own code, model_file {show(config['model_file'])}, which is "
            "never done: use a checkpoint that mlx-lm supports by itself"
        )
    if not is_checked_type(config):
        resolved = model_types.resolve(config)
        if resolved is None:
            raise CheckpointError(
                f"{where} has model_type {show(config.get('model_type'))}, which is no "
                "Mixture-of-Experts model of mlx-lm; supported are "
                f"{', '.join(model_types.moe_types())}"
            )
        return parse_generic_config(config, resolved, where)
    model_type = config["model_type"]
    text_config = config.get("text_config", config) if model_type == "qwen3_5_moe" else config
    if not isinstance(text_config, dict):
        raise CheckpointError(f"{where} has text_config {show(text_config)}: it must be an object")
    text_config = {**DEFAULTS[model_type], **text_config}
    sizes = SIZES if model_type == "qwen3_moe" else SIZES | LINEAR_SIZES
    if model_type != "qwen3_5_moe":
        sizes = sizes | DENSE_LAYER_SIZES
        check_layer_list(text_config.get("mlp_only_layers"), where)
    check_sizes(text_config, sizes, where)
    if model_type == "qwen3_5_moe" and text_config.get("head_dim") is None:
        heads = text_config["num_attention_heads"]
        text_config["head_dim"] = text_config["hidden_size"] // heads
    check_sizes(text_config, HEAD_DIM, where)
    check_relations({name: text_config[name] for name in sizes}, where)
    check_flags(text_config, where)
    check_number("rms_norm_eps", text_config.get("rms_norm_eps"), EPSILON, where)
    check_rotation(model_type, text_config, where)
    return text_config
