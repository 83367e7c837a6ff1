"""Checks config.json, as hostile input: the sizes of the model, and its quantisation, which the
tensors must agree with."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .safetensors_header import AGAIN, Tensor, is_file, is_int, show

# What comes before "layers.N" in the tensor names of each family, as mlx-lm writes them.
FAMILIES = {
    "qwen3_5_moe": "language_model.model.",
    "qwen3_next": "model.",
    "qwen3_moe": "model.",
}
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOATS = ("BF16", "F16", "F32")
# Sizes that each supported model has, with a bound that no real model comes near.
FIELDS = {
    "num_hidden_layers": 2**12,
    "hidden_size": 2**18,
    "moe_intermediate_size": 2**18,
    "num_experts": 2**16,
    "num_experts_per_tok": 2**16,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**31,
}
# Those of the families with linear attention and a shared expert.
LINEAR_FIELDS = {
    "full_attention_interval": 2**12,
    "linear_num_key_heads": 2**14,
    "linear_num_value_heads": 2**14,
    "linear_key_head_dim": 2**14,
    "linear_value_head_dim": 2**14,
    "linear_conv_kernel_dim": 2**10,
    "shared_expert_intermediate_size": 2**18,
}
# What mlx-lm takes for an absent field, but for those where it takes 0, which no model has.
DEFAULTS = {
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
    },
    "qwen3_next": {"full_attention_interval": 4},
    "qwen3_moe": {},
}


@dataclass(frozen=True)
class Quantization:
    """Affine quantisation: each run of `group_size` weights of a row has one scale and bias."""

    bits: int
    group_size: int


def check_text_config(config: dict, path: Path) -> dict:
    """The part of config.json that describes the language model, with its sizes checked, and with
    mlx-lm's defaults for the absent ones. `path` is the checkpoint directory.

    Raises CheckpointError."""
    where = path / "config.json"
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"{where} asks to run its own code, model_file {show(config['model_file'])}, which is "
            "never done: use a checkpoint that mlx-lm supports by itself"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {show(model_type)}; supported are {', '.join(FAMILIES)}"
        )
    text_config = config.get("text_config", config) if model_type == "qwen3_5_moe" else config
    if not isinstance(text_config, dict):
        raise CheckpointError(f"{where} has text_config {show(text_config)}: it must be an object")
    text_config = {**DEFAULTS[model_type], **text_config}
    fields = FIELDS if model_type == "qwen3_moe" else FIELDS | LINEAR_FIELDS
    if model_type != "qwen3_5_moe":
        fields = fields | {"decoder_sparse_step": 2**12}
        dense = text_config.get("mlp_only_layers")
        if not isinstance(dense, list) or not all(is_int(n, 0, 2**12) for n in dense):
            raise CheckpointError(
                f"{where} has mlp_only_layers {show(dense)}: it must be a list of layer numbers"
            )
    _check_sizes(text_config, fields, where)
    if model_type == "qwen3_5_moe" and text_config.get("head_dim") is None:
        heads = text_config["num_attention_heads"]
        text_config["head_dim"] = text_config["hidden_size"] // heads
    _check_sizes(text_config, {"head_dim": 2**14}, where)
    pairs = [("num_experts_per_tok", "num_experts")]
    if model_type != "qwen3_moe":
        # mlx-lm takes the mask from the first layer of full attention: there must be one.
        pairs.append(("full_attention_interval", "num_hidden_layers"))
    for part, whole in pairs:
        if text_config[part] > text_config[whole]:
            raise CheckpointError(
                f"{where} has {part} {text_config[part]}, more than {whole} {text_config[whole]}; "
                "download config.json again"
            )
    return text_config


def _check_sizes(text_config: dict, limits: dict[str, int], where: Path) -> None:
    for name, limit in limits.items():
        if not is_int(text_config.get(name), 1, limit):
            raise CheckpointError(
                f"{where} has {name} {show(text_config.get(name))}: a whole number in 1..{limit} "
                "is needed; download config.json again"
            )


def check_quantization(config: dict, text_config: dict, path: Path) -> dict | None:
    """config["quantization"], checked: defaults bits and group_size, and overrides by path.

    None if the model is not quantised. Raises CheckpointError."""
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
        raise CheckpointError(f"{where} has quantization {show(quantization)}: no object")
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


def check_packed(path: str, found: dict[str, Tensor | None], config: dict | None) -> None:
    """Refuses what is no affine quantisation that `config`, from check_quantization, allows.

    found: the "weight", "scales" and "biases" of the module at `path`; one of them shows that it is
    quantised. Raises CheckpointError if one is absent, or not of its dtype."""
    if found["scales"] and found["scales"].dtype == "U8":
        raise CheckpointError(
            f"{show(path)} has U8 scales, so its mode is mxfp4, mxfp8 or nvfp4, and only affine is "
            "supported: convert the original weights with mlx_lm.convert -q --q-mode affine"
        )
    if config is None or config.get(path) is False:
        raise CheckpointError(
            f"{show(path)} is quantised, but config.json says that it is not: "
            "download config.json again, or convert the original weights again"
        )
    for part, tensor in found.items():
        if tensor is None:
            raise CheckpointError(f"tensor {show(f'{path}.{part}')} is missing: {AGAIN}")
    dtypes = {part: tensor.dtype for part, tensor in found.items()}
    if dtypes["weight"] != "U32" or not dtypes["scales"] == dtypes["biases"] in FLOATS:
        raise CheckpointError(
            f"{show(path)} has dtypes {dtypes}, needed is a U32 weight, and scales and biases of "
            f"one dtype of {', '.join(FLOATS)}: convert the original weights again"
        )


def inferred_quantization(path: str, found: dict[str, Tensor], inner: int) -> Quantization:
    """The quantisation of a path that config.json does not name: from the shapes, as in mlx-lm.

    found: "weight" and "scales" of rows of `inner` weights. Raises CheckpointError."""
    weight, scales = (found[part].shape for part in ("weight", "scales"))
    words, groups = ((shape or (0,))[-1] for shape in (weight, scales))
    for bits in BITS:
        for group_size in GROUP_SIZES:
            if (words * 32, groups * group_size) == (inner * bits, inner):
                return Quantization(bits, group_size)
    raise CheckpointError(
        f"{path} has a weight of shape {weight} and scales of shape {scales}: for the rows of "
        f"{inner} weights that config.json gives, that is no quantisation to {BITS} bits in groups "
        f"of {GROUP_SIZES}; config.json and the weights are of two checkpoints"
    )
