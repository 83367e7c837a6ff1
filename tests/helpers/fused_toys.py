"""Toy checkpoints for the GPU kernels, with one shape for each family to compile few kernels."""

import mlx.core as mx
import numpy as np
from toys import write_toy

TOYS = {
    "qwen3_5_moe": {
        "family": "qwen3_5_moe",
        "num_experts": 13,
        "top_k": 3,
        "layers": 2,
        "full_attention_interval": 2,
    },
    "qwen3_next": {
        "family": "qwen3_next",
        "num_experts": 9,
        "top_k": 4,
        "bits": 3,
        "layers": 3,
        "full_attention_interval": 2,
        "dense_layer": True,
    },
    "qwen3_moe": {
        "family": "qwen3_moe",
        "num_experts": 11,
        "top_k": 2,
        "bits": 6,
        "group_size": 64,
        "moe_intermediate_size": 64,
        "layers": 2,
        "dtype": "float16",
    },
    "bf16": {"family": "qwen3_moe", "num_experts": 7, "top_k": 3, "bits": None, "layers": 2},
}


def write(directory, name: str, **changes):
    """Write the toy checkpoint of this name into a folder of the directory, and return its path."""
    return write_toy(directory / name, **TOYS[name] | changes)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Return random token ids of a toy's vocabulary."""
    return np.random.default_rng(seed).integers(0, 160, count).tolist()


def activations(*shape: int, seed: int = 0) -> mx.array:
    """Return random activations in the dtype in which a bfloat16 model computes on this device."""
    x = mx.random.normal(shape, key=mx.random.key(seed))
    return x.astype(mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32)


def load_all_experts(model) -> None:
    """Run a prompt that needs every expert, so that all of them are in slots afterwards."""
    mx.eval(model(mx.array([random_tokens(200)])))
    assert all(block.switch_mlp.fully_resident for block in model.blocks.values())
