"""Check config.json, as hostile input: the sizes of the model, and its quantisation.

The tensors must agree with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import DOWNLOAD_AGAIN, is_file, is_int, show
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
from .safetensors_header import Tensor

#: The supported model types, and what comes before "layers.N" in the names of their tensors, as
#: mlx-lm writes them.
TENSOR_PREFIXES = {
    "qwen3_5_moe": "language_model.model.",
    "qwen3_next": "model.",
    "qwen3_moe": "model.",
}
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOATS = ("BF16", "F16", "F32")
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


@dataclass(frozen=True)
class Quantization:
    """Affine quantisation: every `group_size` weights of a row share one scale and one bias."""

    bits: int
    group_size: int


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
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TENSOR_PREFIXES:
        raise CheckpointError(
            f"{where} has model_type {show(model_type)}; supported are {', '.join(TENSOR_PREFIXES)}"
        )
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


def parse_quantization(config: dict, text_config: dict, path: Path) -> dict[str, Any] | None:
    """Return config["quantization"], checked, or None if the model is not quantised.

    It holds the default bits and group_size, and overrides by the path of a module: an object with
    bits and group_size, False for a module that is not quantised, True for the defaults.

    Raises:
        CheckpointError: the model is quantised in a way that is not supported.
    """
    where = path / "config.json"
    quantization = config.get("quantization")
    if quantization is None:
        other = config.get("quantization_config") or text_config.get("quantization_config")
        if other is None and is_file(path / "hf_quant_config.json"):
            other = {"quant_method": "modelopt"}
        if other:
            method = other.get("quant_method") if isinstance(other, dict) else other
            raise CheckpointError(
                f"{path} is quantised by the method {show(method)}, which is not supported: "
                "convert the original weights with mlx_lm.convert -q"
            )
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{where} has quantization {show(quantization)}: it must be an object"
        )
    entries = [("quantization", quantization)]
    for name, value in quantization.items():
        if name not in ("bits", "group_size", "mode") and not isinstance(value, bool):
            entries.append((f"quantization[{show(name)}]", value))
    for name, entry in entries:
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where}: {name} is {show(entry)}: an object or bool is needed")
        if entry.get("mode", "affine") != "affine":
            raise CheckpointError(
                f"{where}: {name} has mode {show(entry['mode'])}, only affine is supported: "
                "convert the original weights with mlx_lm.convert -q --q-mode affine"
            )
        for key, allowed in (("bits", BITS), ("group_size", GROUP_SIZES)):
            if not is_int(entry.get(key), 1, 128) or entry[key] not in allowed:
                raise CheckpointError(
                    f"{where}: {name} has {key} {show(entry.get(key))}, not one of {allowed}: "
                    "convert the original weights again with mlx_lm.convert -q"
                )
    return quantization


def check_affine(
    path: str, tensors: Mapping[str, Tensor | None], quantization: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Check that a quantised module has the three tensors of affine quantisation.

    Args:
        path: the module.
        tensors: its "weight", "scales" and "biases", None for an absent one.
        quantization: from `parse_quantization`; it must allow that the module is quantised.

    Returns:
        `tensors`, of which none is absent.

    Raises:
        CheckpointError: a tensor is absent or has a wrong dtype, the mode is not affine, or
            config.json says that the module is not quantised.
    """
    scales = tensors["scales"]
    if scales and scales.dtype == "U8":
        raise CheckpointError(
            f"{show(path)} has U8 scales, so its mode is mxfp4, mxfp8 or nvfp4, and only affine is "
            "supported: convert the original weights with mlx_lm.convert -q --q-mode affine"
        )
    if quantization is None or quantization.get(path) is False:
        raise CheckpointError(
            f"{show(path)} is quantised, but config.json says that it is not: "
            "download config.json again, or convert the original weights again"
        )
    present: dict[str, Tensor] = {}
    for part, tensor in tensors.items():
        if tensor is None:
            raise CheckpointError(f"tensor {show(f'{path}.{part}')} is missing: {DOWNLOAD_AGAIN}")
        present[part] = tensor
    dtypes = {part: tensor.dtype for part, tensor in present.items()}
    if dtypes["weight"] != "U32" or not dtypes["scales"] == dtypes["biases"] in FLOATS:
        raise CheckpointError(
            f"{show(path)} has dtypes {dtypes}, needed is a U32 weight, and scales and biases of "
            f"one dtype of {', '.join(FLOATS)}: convert the original weights again"
        )
    return present


def infer_quantization(path: str, tensors: Mapping[str, Tensor], inner: int) -> Quantization:
    """Return the quantisation of a module that config.json does not name, as mlx-lm infers it.

    Args:
        path: the module.
        tensors: its "weight" and "scales".
        inner: the number of weights in a row.

    Raises:
        CheckpointError: no supported quantisation has tensors of these shapes.
    """
    weight, scales = (tensors[part].shape for part in ("weight", "scales"))
    words, groups = ((shape or (0,))[-1] for shape in (weight, scales))
    for bits in BITS:
        for group_size in GROUP_SIZES:
            if (words * 32, groups * group_size) == (inner * bits, inner):
                return Quantization(bits, group_size)
    raise CheckpointError(
        f"{path} has a weight of shape {weight} and scales of shape {scales}: for the rows of "
        f"{inner} weights that config.json gives, that is no quantisation to {BITS} bits in groups "
        f"of {GROUP_SIZES}; config.json and the weights are from two checkpoints"
    )
