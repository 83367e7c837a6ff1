"""Write a safetensors file whose tensors arrive in any order and in parts, as bytes.

The header is complete before the first byte of data, so each part is written to its place at once
and memory does not grow with the file. The safetensors package writes whole tensors from memory
instead. A file gets its name when it is complete and on the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..files import PARTIAL, publish
from .safetensors_header import ITEM_BYTES

#: The data of a file begins at a multiple of this, a page of a Mac: drives write whole blocks of a
#: file into memory by themselves.
DATA_ALIGNMENT = 16384
#: The most bytes of tensors in a shard of mlx-lm, unless a single tensor is larger.
SHARD_NBYTES = 5 << 30


class HasBytes(Protocol):
    """Something whose size in a shard is known."""

    @property
    def nbytes(self) -> int:
        """Return its bytes."""


Item = TypeVar("Item", bound=HasBytes)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write. dtype is the name that safetensors has for it, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def encode_header(tensors: Sequence[TensorSpec], alignment: int = 8) -> bytes:
    """Return the header of a file of these tensors in this order, its length in front of it.

    The data behind it begins at a multiple of `alignment`.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for t in tensors:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": t.shape,
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def split_into_shards(
    tensors: Iterable[Item], shard_nbytes: int = SHARD_NBYTES
) -> dict[str, list[Item]]:
    """Split tensors into shards as mlx-lm does, and return those of each file by its name.

    Args:
        tensors: in the order in which they are written.
        shard_nbytes: the most bytes of a shard; a tensor that is larger gets a shard of its own.
    """
    shards: list[list[Item]] = [[]]
    nbytes = 0
    for tensor in tensors:
        if shards[-1] and nbytes + tensor.nbytes > shard_nbytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.nbytes
    count = len(shards)
    if count == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Iterable[TensorSpec]]) -> dict[str, Any]:
    """Return the content of the index of shards: the file of each tensor, and the bytes of all."""
    places = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


class ShardWriter:
    """Write one file, a context manager. Until `publish` its name ends with PARTIAL.

    All methods raise OSError.

    Args:
        path: the final name.
        tensors: the tensors of the file, in the order of their data.

    Attributes:
        partial: where the file is until `publish`.
        nbytes: the size of the complete file.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]):
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        head = encode_header(tensors, DATA_ALIGNMENT)
        self.nbytes = len(head)
        self._starts = {}
        for t in tensors:
            self._starts[t.name] = self.nbytes
            self.nbytes += t.nbytes
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(0, head)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at `offset` of a tensor."""
        self._write(self._starts[name] + offset, data)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Read bytes at `offset` of a tensor, which were written before."""
        return os.pread(self._fd, nbytes, self._starts[name] + offset)

    def sync(self) -> None:
        """Return when all bytes that were written are on the disk."""
        os.fsync(self._fd)

    def publish(self) -> None:
        """Give the complete file its final name."""
        publish(self.partial, self.path)

    def _write(self, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
