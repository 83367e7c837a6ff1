"""Checks config.json, as hostile input: the sizes of the model and its quantisation."""

from pathlib import Path

from .errors import CheckpointError
from .safetensors_index import is_file, is_int, show

# What comes before "layers.N" in the tensor names of each family, as mlx-lm writes them.
FAMILIES = {
    "qwen3_5_moe": "language_model.model.",
    "qwen3_next": "model.",
    "qwen3_moe": "model.",
}
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Fields that each supported model needs, with a bound that no real model comes near.
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


def check_text_config(config: dict, path: Path) -> dict:
    """The part of config.json that describes the language model, with its sizes checked. `path` is
    the checkpoint directory. Raises CheckpointError."""
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
    fields = dict(FIELDS)
    if model_type != "qwen3_5_moe":
        fields["decoder_sparse_step"] = 2**12
        dense = text_config.get("mlp_only_layers")
        if not isinstance(dense, list) or not all(is_int(n, 0, 2**12) for n in dense):
            raise CheckpointError(
                f"{where} has mlp_only_layers {show(dense)}: it must be a list of layer numbers"
            )
    for name, limit in fields.items():
        if not is_int(text_config.get(name), 1, limit):
            raise CheckpointError(
                f"{where} has {name} {show(text_config.get(name))}: a whole number in 1..{limit} "
                "is needed; download config.json again"
            )
    top_k, num_experts = text_config["num_experts_per_tok"], text_config["num_experts"]
    if top_k > num_experts:
        raise CheckpointError(
            f"{where} has num_experts_per_tok {top_k}, more than num_experts {num_experts}; "
            "download config.json again"
        )
    return text_config


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
