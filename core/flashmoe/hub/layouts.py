"""Compute the tensors of published checkpoints: names, shapes, dtypes, shards, and config.json.

How mlx-lm and mlx-vlm convert a model is known, so what `flashmoe plan` needs of a checkpoint of
the catalogue can be computed without a network. The data is layouts.json. Where the bytes of the
published weights are known, they equal the computed ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.safetensors_header import INDEX_NAME
from ..checkpoint.safetensors_writer import (
    TensorSpec,
    encode_header,
    index_of,
    split_into_shards,
)
from ..locks import temporary_directory
from .known_models import CATALOGUE, Published, family_of

#: Weights that share a scale and a bias, in all checkpoints of layouts.json.
GROUP_SIZE = 64
#: MLX puts the data directly behind the header, at whatever byte that is.
HEADER_ALIGNMENT = 1


@dataclass(frozen=True)
class Layout:
    """What the files of a checkpoint hold, without the weights.

    Attributes:
        config: config.json.
        shards: the tensors of each file, by its name, in the order of mlx-lm's model.
    """

    config: dict[str, Any]
    shards: dict[str, list[TensorSpec]]

    @property
    def tensors(self) -> Iterator[TensorSpec]:
        """Yield all tensors."""
        for tensors in self.shards.values():
            yield from tensors

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors, which the index of the checkpoint calls total_size."""
        return sum(tensor.nbytes for tensor in self.tensors)


def compute_layout(published: Published, *, layers: int | None = None) -> Layout | None:
    """Return the layout of a checkpoint of the catalogue; None where it is not known.

    Args:
        layers: only so many layers. None: all.
    """
    name = _name(published)
    if name is None or published.bits is None:
        return None
    data = _data()
    how = data["checkpoints"][name]
    config = _config(data, family_of(name), published.bits, how["gate_bits"], layers)
    return Layout(config, split_into_shards(_tensors(config, how.get("a_log", "BF16"))))


@contextmanager
def open_computed_checkpoint(layout: Layout) -> Iterator[Checkpoint]:
    """Open a checkpoint of a layout, whose files are holes after their headers.

    The files exist until the context ends.
    """
    with temporary_directory("flashmoe-layout-") as directory:
        write_hollow(layout, directory)
        yield Checkpoint.open(directory)


def compare(layout: Layout, checkpoint: Checkpoint) -> str:
    """Say for people how the tensors of a checkpoint differ from those of its computed layout."""
    computed = {t.name: (t.dtype, t.shape) for t in layout.tensors}
    true = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    names = sorted(n for n in computed.keys() | true.keys() if computed.get(n) != true.get(n))
    if not names:
        return f"the hub's headers are as computed: {len(true)} tensors, {layout.nbytes} bytes"

    def text(tensors: dict[str, tuple[str, tuple[int, ...]]], name: str) -> str:
        return "missing" if name not in tensors else " ".join(map(str, tensors[name]))

    first = names[0]
    return (
        f"{len(names)} of {len(computed)} tensors are not as computed; {first}: "
        f"{text(true, first)}, computed {text(computed, first)}"
    )


def write_hollow(layout: Layout, directory: Path) -> None:
    """Write the files of a layout into a directory, with a hole in place of the weights."""
    (directory / "config.json").write_text(json.dumps(layout.config, indent=4))
    (directory / INDEX_NAME).write_text(json.dumps(index_of(layout.shards)))
    for name, tensors in layout.shards.items():
        with open(directory / name, "wb") as f:
            f.write(encode_header(tensors, HEADER_ALIGNMENT))
            f.truncate(f.tell() + sum(tensor.nbytes for tensor in tensors))


@cache
def _data() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "layouts.json").read_text())


def _name(published: Published) -> str | None:
    """Return the name of layouts.json for a repository, whose revision must be the usual one."""
    names = (name for name in _data()["checkpoints"] if CATALOGUE[name].repo == published.repo)
    return next(names, None) if published.revision is None else None


def _config(
    data: dict[str, Any], family: str, bits: int, gate_bits: int, layers: int | None
) -> dict[str, Any]:
    """Return config.json of a family, quantised."""
    sizes = data["families"][family]
    sizes = dict(data["families"][sizes["like"]] if "like" in sizes else sizes)
    config = json.loads(json.dumps(data["types"][sizes.pop("type")]))  # a deep copy
    text = config.get("text_config", config)
    text |= sizes
    if layers is not None:
        text["num_hidden_layers"] = layers
    if interval := text.get("full_attention_interval"):
        text["layer_types"] = [
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(text["num_hidden_layers"])
        ]
    if "vision_config" in config:
        config["vision_config"]["out_hidden_size"] = text["hidden_size"]
    quantization: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
    if gate_bits != bits:
        gates = ["gate"] + ["shared_expert_gate"] * ("shared_expert_intermediate_size" in text)
        for layer in range(text["num_hidden_layers"]):
            for gate in gates:
                path = f"{_prefix(config)}layers.{layer}.mlp.{gate}"
                quantization[path] = {"group_size": GROUP_SIZE, "bits": gate_bits}
    return config | {"quantization": quantization, "quantization_config": quantization}


def _prefix(config: dict[str, Any]) -> str:
    return "language_model.model." if "text_config" in config else "model."


def _tensors(config: dict[str, Any], a_log: str) -> Iterator[TensorSpec]:
    """Yield all tensors, in the order of the modules of mlx-lm's model."""
    text, prefix = config.get("text_config", config), _prefix(config)
    quantization, hidden = config["quantization"], text["hidden_size"]

    def packed(path: str, *shape: int) -> Iterator[TensorSpec]:
        *rows, width = shape
        bits = quantization.get(path, quantization)["bits"]
        yield TensorSpec(f"{path}.weight", "U32", (*rows, width * bits // 32))
        for part in ("scales", "biases"):
            yield TensorSpec(f"{path}.{part}", "BF16", (*rows, width // GROUP_SIZE))

    def plain(name: str, *shape: int, dtype: str = "BF16") -> Iterator[TensorSpec]:
        yield TensorSpec(name, dtype, shape)

    def linear_attention(at: str) -> Iterator[TensorSpec]:
        heads, size = text["linear_num_value_heads"], text["linear_value_head_dim"]
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = heads * size
        yield from plain(
            f"{at}.conv1d.weight", 2 * keys + values, text["linear_conv_kernel_dim"], 1
        )
        if config["model_type"] == "qwen3_next":
            yield from packed(f"{at}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
            yield from packed(f"{at}.in_proj_ba", 2 * heads, hidden)
        else:
            yield from packed(f"{at}.in_proj_qkv", 2 * keys + values, hidden)
            yield from packed(f"{at}.in_proj_z", values, hidden)
            yield from packed(f"{at}.in_proj_b", heads, hidden)
            yield from packed(f"{at}.in_proj_a", heads, hidden)
        yield from plain(f"{at}.dt_bias", heads)
        yield from plain(f"{at}.A_log", heads, dtype=a_log)
        yield from plain(f"{at}.norm.weight", size)
        yield from packed(f"{at}.out_proj", hidden, values)

    def attention(at: str) -> Iterator[TensorSpec]:
        heads, size = text["num_attention_heads"], text["head_dim"]
        keys = text["num_key_value_heads"] * size
        gated = 1 if config["model_type"] == "qwen3_moe" else 2  # with a gate beside each query
        yield from packed(f"{at}.q_proj", gated * heads * size, hidden)
        yield from packed(f"{at}.k_proj", keys, hidden)
        yield from packed(f"{at}.v_proj", keys, hidden)
        yield from packed(f"{at}.o_proj", hidden, heads * size)
        yield from plain(f"{at}.q_norm.weight", size)
        yield from plain(f"{at}.k_norm.weight", size)

    def experts(at: str) -> Iterator[TensorSpec]:
        count, inner = text["num_experts"], text["moe_intermediate_size"]
        yield from packed(f"{at}.gate", count, hidden)
        yield from packed(f"{at}.switch_mlp.gate_proj", count, inner, hidden)
        yield from packed(f"{at}.switch_mlp.up_proj", count, inner, hidden)
        yield from packed(f"{at}.switch_mlp.down_proj", count, hidden, inner)
        if shared := text.get("shared_expert_intermediate_size"):
            yield from packed(f"{at}.shared_expert.gate_proj", shared, hidden)
            yield from packed(f"{at}.shared_expert.down_proj", hidden, shared)
            yield from packed(f"{at}.shared_expert.up_proj", shared, hidden)
            yield from packed(f"{at}.shared_expert_gate", 1, hidden)

    if "vision_config" in config:
        yield from _image_encoder(config["vision_config"])
    yield from packed(f"{prefix}embed_tokens", text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}"
        if (layer + 1) % text.get("full_attention_interval", 1):
            yield from linear_attention(f"{at}.linear_attn")
        else:
            yield from attention(f"{at}.self_attn")
        yield from plain(f"{at}.input_layernorm.weight", hidden)
        yield from plain(f"{at}.post_attention_layernorm.weight", hidden)
        yield from experts(f"{at}.mlp")
    yield from plain(f"{prefix}norm.weight", hidden)
    yield from packed(f"{prefix.removesuffix('model.')}lm_head", text["vocab_size"], hidden)


def _image_encoder(vision: dict[str, Any]) -> Iterator[TensorSpec]:
    """Yield the tensors of the image encoder, which mlx-vlm keeps and flashmoe does not load."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    patch, channels = vision["patch_size"], vision["in_channels"]

    def module(name: str, *shape: int, biased: bool = True) -> Iterator[TensorSpec]:
        yield TensorSpec(f"vision_tower.{name}.weight", "BF16", shape)
        if biased:
            yield TensorSpec(f"vision_tower.{name}.bias", "BF16", shape[:1])

    yield from module(
        "patch_embed.proj", width, vision["temporal_patch_size"], patch, patch, channels
    )
    yield from module("pos_embed", vision["num_position_embeddings"], width, biased=False)
    for block in range(vision["depth"]):
        at = f"blocks.{block}"
        yield from module(f"{at}.norm1", width)
        yield from module(f"{at}.norm2", width)
        yield from module(f"{at}.attn.qkv", 3 * width, width)
        yield from module(f"{at}.attn.proj", width, width)
        yield from module(f"{at}.mlp.linear_fc1", inner, width)
        yield from module(f"{at}.mlp.linear_fc2", width, inner)
    yield from module("merger.norm", width)
    yield from module("merger.linear_fc1", merged, merged)
    yield from module("merger.linear_fc2", vision["out_hidden_size"], merged)
