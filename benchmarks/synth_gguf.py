"""Writes the twin of synth.py's model as GGUF, for llama.cpp.

    python benchmarks/synth_gguf.py OUT.gguf --layers 4 --experts 512

The same model means the same work: layers, experts, K, vocabulary and every matrix have the same
shape, and an expert has the same 7,077,888 bytes. Q4_0 takes 4 bits a weight and 16 for the scale
of 32 weights, MLX's 4 bits at group 64 take 16 for a scale and 16 for a bias: 4.5 bits a weight
both. The weights are not equal, since Q4_0 has no bias, so what is computed differs; so do the
dense weights in what llama.cpp wants as float32 (routers, norms, convolutions).

There is no tokenizer: token ids go in. The bytes are windows into random tiles, as in synth.py.
Needs the `gguf` package. Ends with one JSON line.
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

import numpy as np
from synth import (
    CONV,
    EXPERT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERVAL,
    KEY_HEADS,
    KV_HEADS,
    LINEAR_DIM,
    VALUE_HEADS,
)

BLOCK, BLOCK_BYTES = (
    32,
    18,
)  # weights and bytes of a block of Q4_0: a float16 scale, then 4 bits each
TILE_BLOCKS = 1 << 20
STEP = 4099  # a prime, as in synth.py


@dataclass(frozen=True)
class Tensor:
    """spread: of Q4_0 weights, their standard deviation; of float32, the numbers low..high."""

    name: str
    shape: tuple[int, ...]
    spread: float | tuple[float, float]

    @property
    def packed(self) -> bool:
        return isinstance(self.spread, float)

    @property
    def nbytes(self) -> int:
        size = int(np.prod(self.shape))
        return size // BLOCK * BLOCK_BYTES if self.packed else size * 4


def plan(layers: int, experts: int, vocab: int) -> Iterator[Tensor]:
    """All tensors, in the order in which they are written. Shapes as numpy has them."""

    def packed(name: str, *shape: int, std: float | None = None) -> Tensor:
        # Rows of norm 1 keep activations near 1.
        return Tensor(f"{name}.weight", shape, std or shape[-1] ** -0.5)

    def plain(name: str, *shape: int, low: float = 1.0, high: float = 1.0) -> Tensor:
        return Tensor(name, shape, (low, high))

    values = VALUE_HEADS * LINEAR_DIM
    qkv = 2 * KEY_HEADS * LINEAR_DIM + values
    yield packed("token_embd", vocab, HIDDEN, std=1.0)
    for i in range(layers):
        at = f"blk.{i}"
        yield plain(f"{at}.attn_norm.weight", HIDDEN)
        yield plain(f"{at}.post_attention_norm.weight", HIDDEN)
        if (i + 1) % INTERVAL:
            yield packed(f"{at}.attn_qkv", qkv, HIDDEN)
            yield packed(f"{at}.attn_gate", values, HIDDEN)
            yield packed(f"{at}.ssm_beta", VALUE_HEADS, HIDDEN)
            yield packed(f"{at}.ssm_alpha", VALUE_HEADS, HIDDEN)
            yield packed(f"{at}.ssm_out", HIDDEN, values)
            yield plain(f"{at}.ssm_conv1d.weight", qkv, CONV, low=-0.8, high=0.8)
            yield plain(f"{at}.ssm_a", VALUE_HEADS, low=-15.0, high=-1.0)  # -exp(A_log)
            yield plain(f"{at}.ssm_dt.bias", VALUE_HEADS, low=-4.0, high=1.0)
            yield plain(f"{at}.ssm_norm.weight", LINEAR_DIM)
        else:
            yield packed(f"{at}.attn_q", 2 * HEADS * HEAD_DIM, HIDDEN)
            yield packed(f"{at}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN)
            yield packed(f"{at}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN)
            yield packed(f"{at}.attn_output", HIDDEN, HEADS * HEAD_DIM)
            yield plain(f"{at}.attn_q_norm.weight", HEAD_DIM)
            yield plain(f"{at}.attn_k_norm.weight", HEAD_DIM)
        bound = (3 / HIDDEN) ** 0.5  # uniform numbers up to here have rows of norm 1 too
        yield plain(f"{at}.ffn_gate_inp.weight", experts, HIDDEN, low=-bound, high=bound)
        yield plain(f"{at}.ffn_gate_inp_shexp.weight", HIDDEN, low=-bound, high=bound)
        yield packed(f"{at}.ffn_gate_shexp", EXPERT, HIDDEN)
        yield packed(f"{at}.ffn_up_shexp", EXPERT, HIDDEN)
        yield packed(f"{at}.ffn_down_shexp", HIDDEN, EXPERT)
        yield packed(f"{at}.ffn_gate_exps", experts, EXPERT, HIDDEN)
        yield packed(f"{at}.ffn_up_exps", experts, EXPERT, HIDDEN)
        yield packed(f"{at}.ffn_down_exps", experts, HIDDEN, EXPERT)
    yield plain("output_norm.weight", HIDDEN)
    yield packed("output", vocab, HIDDEN)


class Source:
    """Gives the bytes of tensors."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        # A weight is scale * (q - 8). Without q = 0 the mean is 0: any other one grows from matrix
        # to matrix until all activations are alike, and every token chooses the same experts.
        low, high = self.random.integers(1, 16, (2, TILE_BLOCKS, 16), np.uint8)
        self.noise = low | high << 4
        self.tiles: dict[float, np.ndarray] = {}
        self.place = 0

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        if not tensor.packed:
            numbers = self.random.uniform(*tensor.spread, tensor.shape)
            yield memoryview(numbers.astype("<f4")).cast("B")
            return
        tile = self._tile(tensor.spread)
        blocks = tensor.nbytes // BLOCK_BYTES
        while blocks:
            # Each piece begins elsewhere and ends within the tile, so that no two are equal.
            self.place = (self.place + STEP) % (TILE_BLOCKS // 2)
            piece = tile[self.place : self.place + min(blocks, TILE_BLOCKS // 2)]
            blocks -= len(piece)
            yield memoryview(piece).cast("B")

    def _tile(self, std: float) -> np.ndarray:
        if std not in self.tiles:
            spread = ((15**2 - 1) / 12) ** 0.5  # of whole numbers -7..7
            scales = std / spread * self.random.uniform(0.75, 1.25, (TILE_BLOCKS, 1))
            tile = np.empty((TILE_BLOCKS, BLOCK_BYTES), np.uint8)
            tile[:, :2] = scales.astype("<f2").view(np.uint8)
            tile[:, 2:] = self.noise
            self.tiles[std] = tile
        return self.tiles[std]


def describe(writer, layers: int, experts: int, vocab: int, top_k: int) -> None:
    """The keys that llama.cpp reads, as synth.py's config.json has them."""
    writer.add_block_count(layers)
    writer.add_context_length(262144)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(EXPERT)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(HEAD_DIM // 4)
    writer.add_rope_dimension_sections([11, 11, 10, 0])  # of text, all three are the position
    writer.add_expert_count(experts)
    writer.add_expert_used_count(top_k)
    writer.add_expert_feed_forward_length(EXPERT)
    writer.add_expert_shared_feed_forward_length(EXPERT)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_state_size(LINEAR_DIM)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUE_HEADS * LINEAR_DIM)
    writer.add_full_attention_interval(INTERVAL)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")


def write(
    out: str | Path,
    *,
    layers: int,
    experts: int,
    vocab: int = 1024,
    top_k: int = 10,
    seed: int = 0,
) -> dict:
    """Writes the file `out`, which must not exist; returns bytes and seconds.

    Raises OSError if the disk has too little room, ValueError for sizes that cannot be.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    if layers < INTERVAL or not 1 <= top_k <= experts:
        raise ValueError(
            f"layers={layers} must be {INTERVAL} or more, and top_k={top_k} in 1..experts={experts}"
        )
    began = time.perf_counter()
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: give a new file")
    tensors = list(plan(layers, experts, vocab))
    total = sum(t.nbytes for t in tensors)
    free = shutil.disk_usage(out.parent).free
    if free < total * 1.02:
        raise OSError(
            errno.ENOSPC, f"{total:,} bytes are needed, the disk has {free:,} free", str(out)
        )
    writer = GGUFWriter(out, "qwen35moe")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    describe(writer, layers, experts, vocab, top_k)
    for t in tensors:
        if t.packed:
            rows = (*t.shape[:-1], t.shape[-1] // BLOCK * BLOCK_BYTES)
            kind = GGMLQuantizationType.Q4_0
            writer.add_tensor_info(t.name, rows, np.uint8, t.nbytes, kind)
        else:
            writer.add_tensor_info(t.name, t.shape, np.float32, t.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    source = Source(seed)
    # Not write_tensor_data: it wants a tensor whole, and one may be larger than memory.
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for tensor in tensors:
        for piece in source.pieces(tensor):
            file.write(piece)
        writer.write_padding(file, tensor.nbytes)
    file.flush()
    os.fsync(file.fileno())
    writer.close()
    return {
        "path": str(out),
        "layers": layers,
        "experts": experts,
        "expert_bytes": 3 * HIDDEN * EXPERT // BLOCK * BLOCK_BYTES,
        "bytes": out.stat().st_size,
        "seconds": round(time.perf_counter() - began, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True, help="the real model has 60")
    parser.add_argument("--experts", type=int, required=True, help="the real model has 512")
    parser.add_argument("--vocab", type=int, default=1024, help="the real model has 248320")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    try:
        print(json.dumps(write(**vars(parser.parse_args()))))
    except (OSError, ValueError) as error:
        sys.exit(f"synth_gguf: {error}")


if __name__ == "__main__":
    main()
