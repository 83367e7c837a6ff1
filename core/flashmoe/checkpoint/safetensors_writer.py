"""Writes a safetensors file whose tensors come in any order and in parts, as bytes.

The header is settled before the first byte of data, so a part is written to its place at once and
memory does not grow with the file. A file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import PARTIAL, publish
from .safetensors_header import ITEM_BYTES


@dataclass(frozen=True)
class Target:
    """A tensor to write. dtype is the safetensors word."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def header(targets: Sequence[Target]) -> bytes:
    """The header of a file of these tensors in this order, its length in front of it."""
    entries: dict = {"__metadata__": {"format": "mlx"}}
    end = 0
    for t in targets:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": t.shape,
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """One file under way, under its name with PARTIAL behind it. A context manager.

    All methods raise OSError.
    """

    def __init__(self, path: Path, targets: Sequence[Target]):
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        head = header(targets)
        self.nbytes = len(head)
        self._starts = {}
        for t in targets:
            self._starts[t.name] = self.nbytes
            self.nbytes += t.nbytes
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(0, head)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at `offset` of a tensor."""
        self._write(self._starts[name] + offset, data)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Read back what was written."""
        return os.pread(self._fd, nbytes, self._starts[name] + offset)

    def sync(self) -> None:
        os.fsync(self._fd)

    def finish(self) -> None:
        """Give the whole file its name."""
        publish(self.partial, self.path)

    def _write(self, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._fd)
