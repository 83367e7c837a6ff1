"""Write the model of synth.py as GGUF, for llama.cpp.

    python benchmarks/synth_gguf.py OUT.gguf --layers 4 --experts 512

Both models mean the same work: the number of layers, experts, K, the vocabulary and the shape of
every matrix are the same, and an expert has the same 7,077,888 bytes. Q4_0 takes 4 bits per weight
and 16 for the scale of 32 weights; MLX's 4 bits at group 64 take 16 for a scale and 16 for a bias
of 64 weights: both are 4.5 bits per weight. The weights are not equal, since Q4_0 has no bias, so
the results differ; so does the size of dense weights that llama.cpp needs as float32 (routers,
norms, convolutions).

There is no tokenizer: the input is token ids. The bytes are windows into random tiles, as in
synth.py. It needs the `gguf` package. The last line is JSON.
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

# Weights and bytes of a block of Q4_0: a float16 scale, then 4 bits for each weight.
BLOCK, BLOCK_BYTES = 32, 18
TILE_BLOCKS = 1 << 20
STEP = 4099  # a prime, as in synth.py


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, and how its numbers are drawn.

    spread: the standard deviation of Q4_0 weights, or (low, high) of float32 numbers.
    """

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
    """Yield all tensors in the order in which they are written, with shapes in numpy's order."""

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
        bound = (3 / HIDDEN) ** 0.5  # uniform numbers in -bound..bound have rows of norm 1 too
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
    """Makes the bytes of tensors, as windows into random tiles."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        # A weight is scale * (q - 8). Without q = 0 the mean is 0: any other mean grows from matrix
        # to matrix until all activations are alike, and every token chooses the same experts.
        low, high = self.random.integers(1, 16, (2, TILE_BLOCKS, 16), np.uint8)
        self.noise = low | high << 4
        self.tiles: dict[float, np.ndarray] = {}
        self.place = 0

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, piece by piece."""
        if not tensor.packed:
            numbers = self.random.uniform(*tensor.spread, tensor.shape)
            yield memoryview(numbers.astype("<f4")).cast("B")
            return
        tile = self._tile(tensor.spread)
        blocks = tensor.nbytes // BLOCK_BYTES
        while blocks:
            # Each piece starts at another place and ends within the tile, so no two are equal.
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
    """Add the keys that llama.cpp reads, with the values of synth.py's config.json."""
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
    writer.add_rope_dimension_sections([11, 11, 10, 0])  # for text, the position in all three
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
    """Write the file `out`, which must not exist; return its bytes and seconds.

    Raises:
        OSError: the disk has too little free space.
        ValueError: the sizes are impossible, or `out` exists.
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
    # Not write_tensor_data: it takes a whole tensor, which may be larger than memory.
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
