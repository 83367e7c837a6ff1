"""Write a synthetic checkpoint with the layer geometry of Qwen3.5-397B-A17B, for benchmarks.

    python benchmarks/synth.py OUT --layers 4 --experts 512
    python benchmarks/synth.py OUT --like qwen3.5-397b --sparse

The weights are random, but activations stay finite, and the routers spread tokens over all experts.
Speed depends on the geometry and not on the values of the weights, so a few such layers stand in
for the 209 GB model. The bytes are windows into one random tile: no two experts are equal, memory
stays near 100 MB, and the speed of the disk is the limit. The last line is JSON.

With `--like` it is a checkpoint of the catalogue in full: its names, shapes, shards, config.json,
tokenizer and template (`like.py`). With `--sparse` the experts are holes, which take no disk.
"""

import argparse
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import like
import numpy as np

from flashmoe.checkpoint.safetensors_header import INDEX_NAME, ITEM_BYTES
from flashmoe.checkpoint.safetensors_writer import encode_header, index_of, split_into_shards

HIDDEN, EXPERT, HEADS, KV_HEADS, HEAD_DIM = 4096, 1024, 32, 2, 256
KEY_HEADS, VALUE_HEADS, LINEAR_DIM, CONV, INTERVAL = 16, 64, 128, 4, 4
TILE_BYTES = 64 << 20
PIECE_BYTES = 16 << 20
STEP = 4099  # a prime: consecutive units start at different places of the tile, far apart


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint, and how its bytes are made.

    A unit is an expert, or a whole tensor that has no experts.

    Attributes:
        fill: "random" bytes, or (low, high, factor): BF16 numbers from low to high, times factor.
        first: number of the first unit of the tensor among all units, which selects its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: str | tuple[float, float, float]
    first: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * ITEM_BYTES[self.dtype]

    @property
    def units(self) -> int:
        return self.shape[0] if "switch_mlp" in self.name else 1


def plan(layers: int, experts: int, vocab: int, bits: int, group_size: int) -> Iterator[Tensor]:
    """Yield all tensors, in the order in which they are written."""
    unit = 0

    def plain(name: str, *shape: int, low: float = 1.0, high: float = 1.0) -> Iterator[Tensor]:
        nonlocal unit
        yield Tensor(name, "BF16", shape, (low, high, 1.0), unit)
        unit += 1

    def packed(
        name: str, *shape: int, bits: int = bits, group: int = group_size, std: float | None = None
    ) -> Iterator[Tensor]:
        nonlocal unit
        *rows, width = shape
        # The standard deviation of uniform integers is 2**bits / 12**0.5. Rows of norm 1 keep
        # activations near 1.
        scale = (std or width**-0.5) * 12**0.5 / 2**bits
        middle = -(2**bits - 1) / 2
        groups = (*rows, width // group)
        weight = Tensor(f"{name}.weight", "U32", (*rows, width * bits // 32), "random", unit)
        yield weight
        yield Tensor(f"{name}.scales", "BF16", groups, (0.75 * scale, 1.25 * scale, 1.0), unit)
        yield Tensor(f"{name}.biases", "BF16", groups, (0.75 * scale, 1.25 * scale, middle), unit)
        unit += weight.units

    yield from packed("language_model.model.embed_tokens", vocab, HIDDEN, std=1.0)
    for i in range(layers):
        at = f"language_model.model.layers.{i}"
        yield from plain(f"{at}.input_layernorm.weight", HIDDEN)
        yield from plain(f"{at}.post_attention_layernorm.weight", HIDDEN)
        if (i + 1) % INTERVAL:
            values = VALUE_HEADS * LINEAR_DIM
            qkv = 2 * KEY_HEADS * LINEAR_DIM + values
            yield from packed(f"{at}.linear_attn.in_proj_qkv", qkv, HIDDEN)
            yield from packed(f"{at}.linear_attn.in_proj_z", values, HIDDEN)
            yield from packed(f"{at}.linear_attn.in_proj_b", VALUE_HEADS, HIDDEN)
            yield from packed(f"{at}.linear_attn.in_proj_a", VALUE_HEADS, HIDDEN)
            yield from packed(f"{at}.linear_attn.out_proj", HIDDEN, values)
            yield from plain(f"{at}.linear_attn.conv1d.weight", qkv, CONV, 1, low=-0.8, high=0.8)
            yield from plain(f"{at}.linear_attn.A_log", VALUE_HEADS, low=0.0, high=2.7)
            yield from plain(f"{at}.linear_attn.dt_bias", VALUE_HEADS, low=-4.0, high=1.0)
            yield from plain(f"{at}.linear_attn.norm.weight", LINEAR_DIM)
        else:
            yield from packed(f"{at}.self_attn.q_proj", 2 * HEADS * HEAD_DIM, HIDDEN)
            yield from packed(f"{at}.self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN)
            yield from packed(f"{at}.self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN)
            yield from packed(f"{at}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
            yield from plain(f"{at}.self_attn.q_norm.weight", HEAD_DIM)
            yield from plain(f"{at}.self_attn.k_norm.weight", HEAD_DIM)
        yield from packed(f"{at}.mlp.gate", experts, HIDDEN, bits=8, group=64)
        yield from packed(f"{at}.mlp.shared_expert_gate", 1, HIDDEN, bits=8, group=64)
        yield from packed(f"{at}.mlp.shared_expert.gate_proj", EXPERT, HIDDEN)
        yield from packed(f"{at}.mlp.shared_expert.up_proj", EXPERT, HIDDEN)
        yield from packed(f"{at}.mlp.shared_expert.down_proj", HIDDEN, EXPERT)
        yield from packed(f"{at}.mlp.switch_mlp.gate_proj", experts, EXPERT, HIDDEN)
        yield from packed(f"{at}.mlp.switch_mlp.up_proj", experts, EXPERT, HIDDEN)
        yield from packed(f"{at}.mlp.switch_mlp.down_proj", experts, HIDDEN, EXPERT)
    yield from plain("language_model.model.norm.weight", HIDDEN)
    yield from packed("language_model.lm_head", vocab, HIDDEN)


def config(layers: int, experts: int, vocab: int, bits: int, group_size: int, top_k: int) -> dict:
    """Return config.json."""
    quantization: dict = {"group_size": group_size, "bits": bits, "mode": "affine"}
    for i in range(layers):
        for gate in ("gate", "shared_expert_gate"):
            path = f"language_model.model.layers.{i}.mlp.{gate}"
            quantization[path] = {"group_size": 64, "bits": 8}
    text_config = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "linear_conv_kernel_dim": CONV,
        "linear_key_head_dim": LINEAR_DIM,
        "linear_value_head_dim": LINEAR_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "full_attention_interval": INTERVAL,
        "moe_intermediate_size": EXPERT,
        "shared_expert_intermediate_size": EXPERT,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
    }
    return {
        "model_type": "qwen3_5_moe",
        "text_config": text_config,
        "tie_word_embeddings": False,
        "quantization": quantization,
        "quantization_config": quantization,
    }


class Source:
    """Makes the bytes of tensors, as windows into random tiles."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.noise = self.random.integers(0, 256, TILE_BYTES, dtype=np.uint8)
        self.uniform = self.random.random((4 << 20) + 1, dtype=np.float32)
        self.tiles: dict[tuple[float, float, float], np.ndarray] = {}

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, piece by piece."""
        tile = self._tile(tensor.fill)
        each = tensor.nbytes // tensor.units
        piece = min(each, PIECE_BYTES, len(tile) // 4 * 2)  # whole BF16 numbers
        places = (len(tile) - piece) // 2 - 1
        places -= places % STEP == 0
        for unit in range(tensor.first, tensor.first + tensor.units):
            for done in range(0, each, piece):
                # Even offsets keep the BF16 numbers whole; scales and biases of a unit stay paired.
                at = (unit * STEP + done // piece * 7919) % places * 2
                yield tile[at : at + min(piece, each - done)].data

    def _tile(self, fill: str | tuple[float, float, float]) -> np.ndarray:
        if isinstance(fill, str):
            return self.noise
        if fill not in self.tiles:
            low, high, factor = fill
            scales = _bfloat16(low + (high - low) * self.uniform)
            # The bias follows the rounded scale, so that the weights have mean 0.
            values = (scales.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
            self.tiles[fill] = _bfloat16(values).view(np.uint8)
        return self.tiles[fill]


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def write(
    out: str | Path,
    *,
    layers: int,
    experts: int,
    vocab: int = 1024,
    bits: int = 4,
    group_size: int = 64,
    top_k: int = 10,
    seed: int = 0,
) -> dict:
    """Write the checkpoint into the new or empty directory `out`; return its bytes and seconds.

    Raises:
        OSError: the disk has too little free space.
        ValueError: the sizes are impossible, or `out` is not empty.
    """
    if layers < INTERVAL or not 1 <= top_k <= experts:
        raise ValueError(
            f"layers={layers} must be {INTERVAL} or more, and top_k={top_k} in 1..experts={experts}"
        )
    began = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give a new directory")
    shards = split_into_shards(plan(layers, experts, vocab, bits, group_size))
    total = sum(t.nbytes for tensors in shards.values() for t in tensors)
    free = shutil.disk_usage(out).free
    if free < total * 1.02:
        raise OSError(
            errno.ENOSPC, f"{total:,} bytes are needed, the disk has {free:,} free", str(out)
        )
    source = Source(seed)
    for name, tensors in shards.items():
        with open(out / name, "wb", buffering=0) as f:
            f.write(encode_header(tensors))
            for tensor in tensors:
                for piece in source.pieces(tensor):
                    if f.write(piece) != len(piece):
                        raise OSError(errno.ENOSPC, "short write", str(out / name))
            os.fsync(f.fileno())
    (out / INDEX_NAME).write_text(json.dumps(index_of(shards), indent=1))
    settings = config(layers, experts, vocab, bits, group_size, top_k)
    (out / "config.json").write_text(json.dumps(settings, indent=1))
    return {
        "path": str(out),
        "layers": layers,
        "experts": experts,
        "shards": len(shards),
        "bytes": sum(f.stat().st_size for f in out.iterdir()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", metavar="NAME", help="a name that `flashmoe list` shows")
    parser.add_argument("--sparse", action="store_true", help="with --like: experts are holes")
    parser.add_argument("--layers", type=int, help="the real model has 60; with --like: all")
    parser.add_argument("--experts", type=int, help="the real model has 512; not with --like")
    parser.add_argument("--vocab", type=int, default=1024, help="the real model has 248320")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    name, sparse = args.pop("like"), args.pop("sparse")
    try:
        if name:
            chosen = {key: args[key] for key in ("layers", "seed")}
            print(json.dumps(like.write(args["out"], name, sparse=sparse, **chosen)))
            return
        if args["layers"] is None or args["experts"] is None:
            raise ValueError("give --layers and --experts, or --like")
        print(json.dumps(write(**args)))
    except (OSError, ValueError) as error:
        sys.exit(f"synth: {error}")


if __name__ == "__main__":
    main()
