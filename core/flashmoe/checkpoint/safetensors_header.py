"""Read the headers of safetensors files, and nothing else of them.

The files are hostile input: each header is checked against the rules of the format before a byte
range leaves this module. No tensor data is read, so a 200 GB checkpoint costs a few small reads.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .file_identity import FileIdentity
from .json_files import (
    DOWNLOAD_AGAIN,
    MAX_JSON_BYTES,
    is_file,
    is_int,
    parse_object,
    read_object,
    show,
)

INDEX_NAME = "model.safetensors.index.json"
EXPERT_TENSOR = re.compile(r".*\.layers\.(?P<layer>\d{1,9})\.mlp\.switch_mlp\..+")
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file.

    Attributes:
        dtype: the name that safetensors has for it, such as "BF16".
        start, stop: absolute byte offsets in `file`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor's data."""
        return self.stop - self.start


def is_loaded(name: str) -> bool:
    """Return whether mlx-lm loads a tensor: not the vision tower or multi-token prediction."""
    return not name.startswith(("vision_tower", "model.visual")) and "mtp." not in name


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[Path, FileIdentity]]:
    """Read the headers of all shards of a checkpoint directory.

    The shards are model*.safetensors, as in mlx-lm, which loads the dense weights from all of
    them. If there is an index file, it must agree with their headers, except on tensors that are
    not loaded: converters leave the vision tower out, or add multi-token prediction.

    Returns:
        The tensors by name, and the identity of each shard at the time its header was read.

    Raises:
        CheckpointError: there are no shards, or they are corrupt or disagree.
    """
    index = directory / INDEX_NAME
    weight_map = _weight_map(index) if os.path.lexists(index) else None
    shards = {directory / shard for name, shard in (weight_map or {}).items() if is_loaded(name)}
    files = sorted(shards.union(directory.glob("model*.safetensors")))
    if not files:
        raise CheckpointError(
            f"{directory} holds no model*.safetensors: give the directory of an MLX checkpoint"
        )
    tensors: dict[str, Tensor] = {}
    identities: dict[Path, FileIdentity] = {}
    for file in files:
        identities[file], in_shard = read_header(file)
        for tensor in in_shard:
            name = tensor.name
            if name in tensors:
                raise CheckpointError(
                    f"tensor {show(name)} is in both {tensors[name].file.name} and {file.name}: "
                    "remove the files that are not part of this checkpoint"
                )
            if weight_map is None or not is_loaded(name):
                tensors[name] = tensor
                continue
            if weight_map.get(name) != file.name:
                raise CheckpointError(
                    f"tensor {show(name)} is in {file.name}, but {INDEX_NAME} places it in "
                    f"{show(weight_map.get(name))}: the files are from two checkpoints; download "
                    "the checkpoint again"
                )
            tensors[name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in tensors and is_loaded(name):
            raise CheckpointError(
                f"{INDEX_NAME} places tensor {show(name)} in {shard}, which does not hold "
                "it: the files are from two checkpoints; download the checkpoint again"
            )
    return tensors, identities


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, MAX_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} must have an object weight_map, it has {show(weight_map)}")
    for name, shard in weight_map.items():
        if not is_loaded(name):
            continue  # it may be in a file of another name
        # One plain name: a path from a stranger's file must not lead out of the directory.
        if not isinstance(shard, str) or not re.fullmatch(
            r"model[A-Za-z0-9_.+-]*\.safetensors", shard
        ):
            raise CheckpointError(
                f"{index} places tensor {show(name)} in {show(shard)}: a shard must be a "
                "model*.safetensors file in the same directory"
            )
    return weight_map


def read_header(file: Path) -> tuple[FileIdentity, list[Tensor]]:
    """Read the header of one safetensors file.

    Each range is checked: it is inside the file and as long as its shape says, no two tensors
    share a byte, and each byte belongs to one.

    Returns:
        The identity of the file, and its tensors in the order of their data.

    Raises:
        CheckpointError: the file cannot be read, or breaks a rule of the format.
    """
    if not is_file(file):
        raise CheckpointError(f"{file} is missing or not a regular file: {DOWNLOAD_AGAIN}")
    try:
        with open(file, "rb") as f:
            identity = FileIdentity.from_fd(f.fileno())
            size = identity.nbytes
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{file} gives its header {length} bytes; the file has {size} and the limit is "
                    f"{MAX_JSON_BYTES}: it is corrupt or {DOWNLOAD_AGAIN}"
                )
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror}") from e
    header = parse_object(text, f"the header of {file}")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = [_tensor(name, entry, file, base) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    end, before = base, "the header"
    for t in tensors:
        if t.start != end:
            fault = "overlaps" if t.start < end else f"leaves {t.start - end} unowned bytes after"
            raise CheckpointError(
                f"{file.name}: tensor {show(t.name)} at bytes {t.start}..{t.stop} {fault} "
                f"{before}, which ends at {end}: the file is corrupt; download it again"
            )
        if t.stop > size:
            raise CheckpointError(_truncated(t, size))
        end, before = t.stop, f"tensor {show(t.name)}"
    if end != size:
        raise CheckpointError(
            f"{file.name} has {size} bytes, but its last tensor ends at {end}: "
            "the file is corrupt; download it again"
        )
    return identity, tensors


def _tensor(name: str, entry: object, file: Path, base: int) -> Tensor:
    """Check one entry of a header. base: the offset of the data in the file."""
    where = f"{file.name}: tensor {show(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} must be described by an object, not {show(entry)}")
    dtype, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {show(dtype)}")
    # The bounds are those of MLX; they also keep the product below from growing without end.
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(is_int(n, 0, 2**31 - 1) for n in shape)
    ):
        raise CheckpointError(f"{where} has shape {show(shape)}: up to 8 non-negative sizes needed")
    if not isinstance(offsets, list) or [is_int(n, 0, 2**62) for n in offsets] != [True, True]:
        raise CheckpointError(f"{where} has data_offsets {show(offsets)}: two byte offsets needed")
    start, stop = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if stop - start != needed:
        raise CheckpointError(
            f"{where}, {dtype} {shape}, needs {needed} bytes, but data_offsets {offsets} hold "
            f"{stop - start}: the file is corrupt; download it again"
        )
    return Tensor(name, dtype, tuple(shape), file, base + start, base + stop)


def _truncated(t: Tensor, size: int) -> str:
    """Return the error text for a file that ends inside a tensor; an expert is named."""
    owner, start, stop = f"tensor {show(t.name)}", t.start, t.stop
    if (match := EXPERT_TENSOR.fullmatch(t.name)) and t.shape:
        each = t.nbytes // t.shape[0]
        expert = (size - t.start) // each
        owner = f"expert {expert} of layer {int(match['layer'])}"
        start = t.start + expert * each
        stop = start + each
    return (
        f"{owner} needs bytes {start}..{stop} of {t.file.name}, which has {size}: {DOWNLOAD_AGAIN}"
    )
