"""Reads blocks of rows of a checkpoint's matrices as float32, and converts dtypes."""

from __future__ import annotations

import math
import os

import numpy as np

from ..checkpoint.expert_layers import GLOBAL_SCALE
from ..checkpoint.quantization import GLOBAL_SCALE_UNIT, Quantization
from ..checkpoint.safetensors_header import Tensor
from ..checkpoint.safetensors_writer import ShardWriter
from ..errors import CheckpointError
from .recipe import TensorPlan


def read_bytes(fd: int, tensor: Tensor, start: int, nbytes: int) -> bytes:
    """Read bytes of a tensor, from `start` in it.

    Raises:
        CheckpointError: the file cannot be read, or ends too early.
    """
    try:
        data = os.pread(fd, nbytes, tensor.start + start)
    except OSError as e:
        raise CheckpointError(
            f"cannot read {tensor.file} from byte {tensor.start + start} on: {e.strerror}; check "
            "the disk, or download the model again"
        ) from e
    if len(data) != nbytes:
        raise CheckpointError(f"{tensor.file} ends inside {tensor.name}: download the model again")
    return data


def read_weights(tensor: TensorPlan, fds: dict[str, int], row: int, rows: int) -> np.ndarray:
    """Read rows of a matrix of the source as float32.

    Args:
        fds: open files by part of the tensor.
        row: first row; the rows of all experts are numbered through.
        rows: number of rows.

    Returns:
        float32 (rows, width).
    """
    parts = {}
    for name, source in tensor.sources.items():
        if name == GLOBAL_SCALE:
            continue
        row_nbytes = source.nbytes // math.prod(source.shape[:-1])
        data = read_bytes(fds[name], source, row * row_nbytes, rows * row_nbytes)
        parts[name] = widen(data, source.dtype).reshape(rows, -1)
    if tensor.old is None:
        return parts["weight"]
    weights = _dequantize(parts["weight"], parts["scales"], parts.get("biases"), tensor.old)
    if GLOBAL_SCALE not in tensor.sources:
        return weights
    source = tensor.sources[GLOBAL_SCALE]
    scales = widen(read_bytes(fds[GLOBAL_SCALE], source, 0, source.nbytes), source.dtype)
    of_row = np.arange(row, row + rows) // tensor.shape[-2]
    return weights * (scales[of_row] / np.float32(GLOBAL_SCALE_UNIT))[:, None]


def _dequantize(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, quantization: Quantization
) -> np.ndarray:
    import mlx.core as mx

    # From float32 scales, so the result is float32 even if the model computes in 16 bits.
    with mx.stream(mx.cpu):
        weights = mx.dequantize(
            mx.array(weight),
            mx.array(scales),
            None if biases is None else mx.array(biases),
            quantization.group_size,
            quantization.bits,
            quantization.mode,
            dtype=mx.float32,
        )
        return np.array(weights)


def widen(data: bytes, dtype: str) -> np.ndarray:
    """Convert floats of a safetensors dtype to float32; U32 and U8 stay as they are."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"U8": np.uint8, "U32": np.uint32, "F32": np.float32, "F16": np.float16}
    values = np.frombuffer(data, kinds[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 to a safetensors dtype that represents these values exactly."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "F16" else np.float32)


def read_back(
    tensor: TensorPlan, quantization: Quantization, out: ShardWriter, row: int, rows: int
) -> np.ndarray:
    """Read rows that were written, and dequantise them with MLX.

    Args:
        tensor: a tensor that is rounded.
        quantization: its new quantisation.
        out: the file that is being written.
        row: first row; the rows of all experts are numbered through.
        rows: number of rows.

    Returns:
        float32 (rows, width).
    """
    parts = []
    for target in tensor.targets:
        row_nbytes = target.nbytes // math.prod(target.shape[:-1])
        data = out.read(target.name, row * row_nbytes, rows * row_nbytes)
        parts.append(widen(data, target.dtype).reshape(rows, -1))
    weight, scales, biases = parts
    return _dequantize(weight, scales, biases, quantization)
