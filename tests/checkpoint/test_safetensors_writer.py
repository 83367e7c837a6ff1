"""Tests the files that are written in parts, with mlx as their reader."""

import mlx.core as mx

from flashmoe.checkpoint.safetensors_writer import (
    DATA_ALIGNMENT,
    ShardWriter,
    TensorSpec,
    index_of,
    split_into_shards,
)


def test_parts_written_in_any_order_are_read_by_mlx_and_data_begins_at_a_page(tmp_path):
    tensors = [TensorSpec("a", "U32", (2, 3)), TensorSpec("b" * 300, "F32", (4,))]
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, tensors) as file:
        file.write("b" * 300, 8, mx.array([3.0, 4.0]))
        file.write("a", 0, memoryview(mx.arange(6, dtype=mx.uint32)).cast("B"))
        file.write("b" * 300, 0, mx.array([1.0, 2.0]))
        file.publish()
    assert path.stat().st_size == DATA_ALIGNMENT + 24 + 16
    read = mx.load(str(path))
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b" * 300].tolist() == [1, 2, 3, 4]


def test_shards_and_index_are_those_of_mlx_lm():
    tensors = [
        TensorSpec(name, "U8", (n,)) for name, n in zip("cbaedf", (9, 3, 4, 3, 2, 6), strict=True)
    ]
    shards = split_into_shards(tensors, 8)
    assert [[t.name for t in shard] for shard in shards.values()] == [
        ["c"],
        ["b", "a"],
        ["e", "d"],
        ["f"],
    ]
    assert list(shards)[1] == "model-00002-of-00004.safetensors"
    assert list(split_into_shards(tensors)) == ["model.safetensors"]
    index = index_of(shards)
    assert index["metadata"] == {"total_size": 27}
    assert list(index["weight_map"]) == sorted("abcdef")
    assert index["weight_map"]["f"] == "model-00004-of-00004.safetensors"
