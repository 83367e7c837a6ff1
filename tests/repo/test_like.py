"""Test the checkpoints of true layout that `benchmarks/synth.py --like` writes."""

import json
import struct

import fullsize
import like
import numpy as np
import pytest

from flashmoe.catalog import CATALOGUE
from flashmoe.checkpoint.safetensors_writer import TensorSpec
from flashmoe.hub.layouts import Layout, compute_layout


def test_experts_are_where_the_published_files_have_them():
    layout = compute_layout(CATALOGUE["qwen3.5-397b"])
    offsets = like.published_offsets("qwen3.5-397b")
    assert len(offsets) == 60 * 9
    places, fillers, names = {}, 0, 0
    for shard in like.place(layout, offsets):
        at = len(shard.header)
        assert struct.unpack("<Q", shard.header[:8])[0] == at - 8
        described = json.loads(shard.header[8:])
        for tensor in shard.tensors:
            assert described[tensor.name]["data_offsets"][0] == at - len(shard.header)
            places[tensor.name] = shard.name, at
            fillers += tensor.nbytes * tensor.name.startswith(like.FILLER)
            at += tensor.nbytes
            names += 1
    assert {name: places[name] for name in offsets} == offsets
    assert {t.name for t in layout.tensors} <= set(places)
    assert fillers < 20e6  # of 224 GB
    assert len(places) == names


def test_without_published_offsets_headers_have_odd_lengths():
    layout = compute_layout(CATALOGUE["qwen3.6-35b"])
    shards = like.place(layout, {})
    assert all(len(shard.header) % 2 for shard in shards)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(
        t.name for t in layout.tensors
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_have_mean_0_and_rows_of_norm_1(bits):
    rows, width = 96, 512
    shape = {"weight": (rows, width * bits // 32), "scales": (rows, 8), "biases": (rows, 8)}
    dtypes = {"weight": "U32", "scales": "BF16", "biases": "BF16"}
    tensors = tuple(TensorSpec(f"x.{part}", dtypes[part], shape[part]) for part in shape)
    fill = like.Fill(Layout({}, {"model.safetensors": [*tensors]}), seed=0)
    data = {t.name: b"".join(map(bytes, fill.pieces(t))) for t in tensors}
    assert {t.name: t.nbytes for t in tensors} == {name: len(d) for name, d in data.items()}
    packed = np.frombuffer(data["x.weight"], np.uint8)
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    scales, biases = (
        (np.frombuffer(data[f"x.{part}"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        for part in ("scales", "biases")
    )
    integers = packed.reshape(rows, 8, 64)
    weights = integers * scales.reshape(rows, 8, 1) + biases.reshape(rows, 8, 1)
    assert abs(weights.mean()) < 2e-3
    assert np.linalg.norm(weights.reshape(rows, width), axis=1).mean() == pytest.approx(1, rel=0.1)


def test_unknown_names_and_full_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gpt-5 is not in the catalogue"):
        like.write(tmp_path, "gpt-5")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        like.write(tmp_path, "qwen3.6-35b-4bit", sparse=True)


def test_full_size_results_become_a_table(tmp_path):
    runner = fullsize.Runner(tmp_path)
    runner.record("a", "m", "1GB", lambda: {"peak": 2 * 10**9, "tokens_per_second": 1.234})
    runner.record("b", "m", "default", lambda: {"peak": 2 * 10**9, "ends": {"after 1 s": 0.5}})
    runner.record("c", "m", "1GB", lambda: runner.call("false"))
    assert [r["ok"] for r in runner.results] == [False, True, False]
    *_, first, second, third = fullsize.table(runner.results)
    assert first == "| m | 1GB | a |  | 1.23 |  |  | 2.00 | NO: above the budget |"
    assert second.endswith("| 2.00 | yes; ends within 0.5 s |")
    assert "NO: false exits 1" in third
