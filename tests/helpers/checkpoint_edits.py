"""Edits that damage a checkpoint, and the assertion that it is refused."""

import json

import mlx.core as mx
import pytest

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.limits import HEAD_DIM, LINEAR_SIZES
from flashmoe.checkpoint.limits import SIZES as COMMON_SIZES
from flashmoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SWITCH = "language_model.model.layers.0.mlp.switch_mlp"

#: The fields of config.json that are sizes of the model.
SIZES = [*COMMON_SIZES, *LINEAR_SIZES, *HEAD_DIM]


def assert_refused(directory, *texts):
    """Assert that opening the directory raises a CheckpointError whose message has all texts."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    for text in texts:
        assert text in str(caught.value)


def edit_json(file, edit):
    """Rewrite a JSON file after `edit`, which changes the parsed value in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def edit_weights(directory, edit):
    """Rewrite model.safetensors after `edit`, which changes the dict of arrays in place."""
    file = directory / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights)


def write_safetensors(file, header, data=b""):
    """Write a safetensors file of a header, as a JSON value or as its raw bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(start, stop, dtype="U8", shape=None):
    """Return the header's entry for a tensor at bytes start..stop, by default of one axis."""
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }
