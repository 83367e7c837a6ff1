"""Blocks of rows of a checkpoint's matrices, read from files as float32."""

from __future__ import annotations

import math
import os

import numpy as np

from ..checkpoint.config import Quantization
from ..checkpoint.safetensors_header import Tensor
from ..checkpoint.safetensors_writer import ShardWriter
from ..errors import CheckpointError
from .recipe import Part


def read_bytes(fd: int, tensor: Tensor, start: int, nbytes: int) -> bytes:
    try:
        data = os.pread(fd, nbytes, tensor.start + start)
    except OSError as e:
        raise CheckpointError(
            f"cannot read bytes {tensor.start + start} and on of {tensor.file}: {e.strerror}"
        ) from e
    if len(data) != nbytes:
        raise CheckpointError(f"{tensor.file} ends inside {tensor.name}: download it again")
    return data


def read_weights(part: Part, fds: dict[str, int], row: int, rows: int) -> np.ndarray:
    """(rows, width) float32 from row `row` on, the rows of all experts counted as one list."""
    found = {}
    for name, tensor in part.sources.items():
        each = tensor.nbytes // math.prod(tensor.shape[:-1])
        data = read_bytes(fds[name], tensor, row * each, rows * each)
        found[name] = widen(data, tensor.dtype).reshape(rows, -1)
    return found["weight"] if part.old is None else _unpacked(*found.values(), part.old)


def _unpacked(weight, scales, biases, quantization: Quantization) -> np.ndarray:
    import mlx.core as mx

    # The float32 of it, also where a model computes in 16 bits.
    with mx.stream(mx.cpu):
        arrays = (mx.array(a) for a in (weight, scales, biases))
        made = mx.dequantize(*arrays, quantization.group_size, quantization.bits)
        return np.array(made)


def widen(data: bytes, dtype: str) -> np.ndarray:
    """Floats of a safetensors dtype as float32, or U32 as it is."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = {"U32": np.uint32, "F32": np.float32, "F16": np.float16}[dtype]
    found = np.frombuffer(data, kind)
    return found.astype(np.float32) if dtype == "F16" else found


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 that the dtype holds exactly, in that dtype."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "F16" else np.float32)


def read_back(part: Part, out: ShardWriter, row: int, rows: int) -> np.ndarray:
    """Weights as MLX unpacks them from the file under way."""
    found = []
    for target in part.targets:
        each = target.nbytes // math.prod(target.shape[:-1])
        data = out.read(target.name, row * each, rows * each)
        found.append(widen(data, target.dtype).reshape(rows, -1))
    return _unpacked(*found, part.new)
