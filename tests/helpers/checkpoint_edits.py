"""What tests of checkpoints do to good ones, and how they see that one is refused."""

import json

import mlx.core as mx
import pytest

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.config import FIELDS, LINEAR_FIELDS
from flashmoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SWITCH = "language_model.model.layers.0.mlp.switch_mlp"

#: Fields of config.json that are sizes.
SIZES = [*FIELDS, *LINEAR_FIELDS, "head_dim"]


def refuses(directory, *texts):
    """The directory does not open, and the message holds all texts."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    for text in texts:
        assert text in str(caught.value)


def edit_json(file, edit):
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def edit_weights(directory, edit):
    file = directory / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights)


def write_safetensors(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(start, stop, dtype="U8", shape=None):
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }
