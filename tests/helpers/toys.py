"""Writes toy checkpoints: random weights in mlx-lm's model classes, saved as mlx-lm saves them."""

import copy
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import quantize_model, save_config

from flashmoe.catalog import DEMO, find

FAMILIES = ("qwen3_5_moe", "qwen3_next", "qwen3_moe")

#: On a GPU a row of the router has more than one group of scales: for rows of one group, MLX 0.32.4
#: has a special product on Hopper, which gave NaN, and other results at each run.
HIDDEN = 128 if mx.default_device() == mx.gpu else 64


def toy_config(
    family: str,
    *,
    num_experts: int = 7,
    top_k: int = 3,
    hidden_size: int = HIDDEN,
    moe_intermediate_size: int = 96,
    layers: int = 4,
    dense_layer: bool = False,
    tie: bool = False,
    **overrides,
) -> dict:
    """Return the config.json of a toy. Overrides go to the fields of the language model."""
    text = {
        "model_type": family,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": moe_intermediate_size,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "vocab_size": 160,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
    }
    if family != "qwen3_moe":
        text |= {
            "shared_expert_intermediate_size": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
        }
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    if family == "qwen3_5_moe":
        if dense_layer:
            raise ValueError("all layers of qwen3_5_moe are MoE layers")
        text |= {"model_type": "qwen3_5_moe_text", "rope_parameters": {"type": "default", **rope}}
        return {"model_type": family, "text_config": text | overrides}
    sparse = {"decoder_sparse_step": 1, "mlp_only_layers": [1] if dense_layer else []}
    return text | rope | sparse | overrides


def write_toy(
    directory: Path,
    family: str = "qwen3_5_moe",
    *,
    bits: int | None = 4,
    group_size: int = 32,
    mode: str = "affine",
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    choose: Callable[[str], dict | None] = lambda path: None,
    **config,
) -> Path:
    """Write a toy checkpoint, which stock mlx-lm can load, and return its directory.

    Args:
        bits: bits of a quantised weight; None leaves the model unquantised.
        shards: the number of files. Neighbouring tensors are in different ones.
        choose: returns the quantisation of a module, by its path; None for that of the others.
        config: arguments of `toy_config`. hidden_size must be a multiple of 64, as in any Qwen MoE,
            since mlx-lm quantises routers in groups of 64.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = toy_config(family, **config)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    # The args classes change the dict that they get.
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(settings)))
    random = _weights(model, mx.random.key(seed), getattr(mx, dtype))
    model.update(tree_unflatten(random))
    if bits is not None:
        default = getattr(model, "quant_predicate", lambda path, module: True)
        model, settings = quantize_model(
            model,
            settings,
            group_size,
            bits,
            mode=mode,
            quant_predicate=lambda path, module: choose(path) or default(path, module),
        )
    weights = sorted(tree_flatten(model.parameters()))
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        name = name if shards > 1 else "model.safetensors"
        part = dict(weights[shard::shards])
        mx.save_safetensors(str(directory / name), part, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    save_config(settings, directory / "config.json")
    return directory


def write_chat_toy(directory: Path, **config) -> Path:
    """Write a toy with the demo's tokenizer and template.

    It answers nonsense, ten times as fast as the demo model.
    """
    config = {"vocab_size": 8192, "max_position_embeddings": 4096} | config
    write_toy(directory, **config)
    copy_tokenizer(directory)
    return directory


def copy_tokenizer(directory: Path) -> None:
    """Copy the demo's tokenizer and template into a checkpoint."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(find(DEMO) / file, directory)


def _weights(model, key: mx.array, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """Return weights that keep activations near 1 and let each token choose other experts."""
    weights = []
    for name, old in sorted(tree_flatten(model.parameters())):
        key, sub = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=sub)
        if name.endswith("A_log"):
            new = mx.abs(noise)
        elif "norm" in name or old.ndim == 1:
            new = 1 + 0.1 * noise
        elif name.endswith(("mlp.gate.weight", "lm_head.weight", "embed_tokens.weight")):
            new = 2 * noise * old.shape[-1] ** -0.5
        elif "conv1d" in name:
            new = noise * old.shape[1] ** -0.5
        else:
            new = noise * old.shape[-1] ** -0.5
        weights.append((name, new.astype(dtype)))
    return weights
