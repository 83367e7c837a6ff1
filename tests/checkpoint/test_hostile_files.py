"""Tests that a checkpoint of arbitrary bytes either opens or raises a CheckpointError."""

import contextlib
import json
import os
import shutil
import time

import numpy as np
import pytest
from checkpoint_edits import SIZES, SWITCH, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import CheckpointError
from flashmoe.memory.footprint import RUNTIME_NBYTES, lasting_nbytes

#: Each example overwrites the files of the copy that the test got, so one copy serves them all.
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

NAMES = st.sampled_from(["a", f"{SWITCH}.up_proj.weight", "__metadata__", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "U32", "BF16", "C64"]) | JSON,
        "shape": st.lists(st.integers(0, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    },
)
HEADERS = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda v: json.dumps(v).encode()),
    st.dictionaries(NAMES, ENTRY | JSON).map(lambda v: json.dumps(v).encode()),
)


@settings(max_examples=300, suppress_health_check=SUPPRESSED)
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_random_shard_bytes_raise_checkpoint_error(checkpoint_dir, header, length, data):
    length = len(header) if length is None else length
    (checkpoint_dir / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    with pytest.raises(CheckpointError):
        Checkpoint.open(checkpoint_dir)


@settings(max_examples=150, suppress_health_check=SUPPRESSED)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_changed_header_byte_opens_or_raises_checkpoint_error(originals, checkpoint_dir, at, byte):
    content = bytearray((originals / "one" / "model.safetensors").read_bytes())
    content[at] = byte
    (checkpoint_dir / "model.safetensors").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        Checkpoint.open(checkpoint_dir)


@settings(max_examples=150, suppress_health_check=SUPPRESSED)
@given(field=st.text(max_size=5) | st.sampled_from(["quantization", "text_config"]), value=JSON)
def test_random_config_value_opens_or_raises_checkpoint_error(
    originals, checkpoint_dir, field, value
):
    config = json.loads((originals / "one" / "config.json").read_text())
    (checkpoint_dir / "config.json").write_text(json.dumps({**config, field: value}))
    assert_opens_or_is_refused(checkpoint_dir)


@settings(max_examples=300, suppress_health_check=SUPPRESSED)
@given(
    toy=st.sampled_from(["one", "next"]),
    edits=st.dictionaries(
        st.sampled_from([*SIZES, "mlp_only_layers", "decoder_sparse_step"]),
        st.integers(-1, 9) | st.integers() | st.just("missing") | JSON,
        max_size=3,
    ),
)
def test_random_sizes_open_or_raise_checkpoint_error(originals, checkpoint_dir, toy, edits):
    config = json.loads((originals / toy / "config.json").read_text())
    text_config = config.get("text_config", config)
    text_config.update(edits)
    for field in [k for k, v in edits.items() if v == "missing"]:
        del text_config[field]
    shutil.copy(originals / toy / "model.safetensors", checkpoint_dir)
    (checkpoint_dir / "config.json").write_text(json.dumps(config))
    assert_opens_or_is_refused(checkpoint_dir)


def assert_opens_or_is_refused(directory):
    """Assert that the directory raises a CheckpointError, or opens with a plausible footprint."""
    with contextlib.suppress(CheckpointError):
        checkpoint = Checkpoint.open(directory)
        for on_gpu in (False, True):
            assert lasting_nbytes(checkpoint, on_gpu=on_gpu) >= RUNTIME_NBYTES


def test_opening_reads_headers_only(tmp_path):
    """A sparse file of 8 TB opens in a moment; reading all of it would take many minutes."""
    toy = write_toy(tmp_path, bits=None)
    checkpoint = Checkpoint.open(toy)
    header = {t.name: {"dtype": t.dtype, "shape": t.shape} for t in checkpoint.tensors.values()}
    header["vision_tower.big"] = {"dtype": "U8", "shape": [2**30, 2**13]}
    end = 0
    for t in header.values():
        size = int(np.prod(t["shape"])) * {"U8": 1, "BF16": 2}[t["dtype"]]
        t["data_offsets"] = [end, end + size]
        end += size
    write_safetensors(toy / "model.safetensors", header)
    os.truncate(toy / "model.safetensors", (toy / "model.safetensors").stat().st_size + end)
    began = time.perf_counter()
    assert Checkpoint.open(toy).expert_nbytes == checkpoint.expert_nbytes
    assert time.perf_counter() - began < 60
