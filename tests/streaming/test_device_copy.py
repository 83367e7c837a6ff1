"""Tests reads into device memory through staging places, with host memory as the device."""

import os

import mlx.core as mx
import numpy as np
import pytest
from fake_device import HostMemory
from toys import HIDDEN, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import DeviceError, ReadError
from flashmoe.models import streaming_moe as models
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops
from flashmoe.streaming.device_copy import STAGING_NBYTES, DeviceBytes
from flashmoe.streaming.io_modes import BLOCK
from flashmoe.streaming.reader import Reader, ReadRequest
from flashmoe.streaming.slot_memory import SlotMemory

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="test_cuda.py tests a real GPU")


def zeros(nbytes: int) -> mx.array:
    array = mx.zeros((nbytes,), mx.uint8)
    mx.eval(array)
    return array


@pytest.fixture
def path(tmp_path):
    """A file of random bytes that needs several staging places."""
    path = tmp_path / "experts"
    path.write_bytes(os.urandom(3 * STAGING_NBYTES + 12345))
    return path


@pytest.mark.parametrize("io", ["buffered", "uncached", "direct"])
@pytest.mark.parametrize("split", [0, 1 << 16, 8 << 20])
def test_each_byte_arrives_in_its_range(path, io, split):
    memory, data = HostMemory(), path.read_bytes()
    # Odd sizes, full blocks, a size that just fits into a place, and one that does not.
    sizes = [1, 4095, BLOCK, 70_001, STAGING_NBYTES, STAGING_NBYTES + 1, len(data) - 4]
    arrays = [zeros(n + 2) for n in sizes]
    requests = [
        ReadRequest(path, i, DeviceBytes.of(memory, a)[1 : n + 1], 0, i)
        for i, (a, n) in enumerate(zip(arrays, sizes, strict=True))
        if i + n <= len(data)
    ]
    with Reader(3, io=io, split=split) as reader:
        reader.submit(requests).wait()
        assert memory.locked <= 3, "one place for each thread"
    for request, array in zip(requests, arrays, strict=False):
        n = request.buffer.nbytes
        assert bytes(np.array(array)) == b"\0" + data[request.start : request.start + n] + b"\0"


def test_staging_place_is_aligned_like_the_file(path, monkeypatch):
    """So a drive can write into the place directly, at any offset in the file."""
    memory = HostMemory()
    for start in (0, 1, 4095, 4097, 77_777):
        place = memory.staging(start, 70_000)
        assert place.size == 70_000
        assert (place.__array_interface__["data"][0] - start) % BLOCK == 0
    assert memory.staging(BLOCK - 1, STAGING_NBYTES).size == STAGING_NBYTES


def test_nothing_of_a_failed_read_is_copied(path):
    memory = HostMemory()
    array = zeros(BLOCK)
    request = ReadRequest(path, path.stat().st_size - 10, DeviceBytes.of(memory, array), 0, 0)
    with Reader(2) as reader, pytest.raises(ReadError, match="incomplete"):
        reader.submit([request]).wait()
    assert not np.array(array).any()


def test_failed_copy_raises_device_error(path):
    class Broken(HostMemory):
        def write(self, address, source):
            raise DeviceError("the copy failed: CUDA_ERROR_ILLEGAL_ADDRESS")

    with Reader(2) as reader:
        array = zeros(BLOCK)
        pending = reader.submit([ReadRequest(path, 0, DeviceBytes.of(Broken(), array), 0, 0)])
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            pending.wait()
        # The thread goes on to the next read.
        reader.submit([ReadRequest(path, 0, DeviceBytes.of(HostMemory(), array), 0, 0)]).wait()
    assert bytes(np.array(array)) == path.read_bytes()[:BLOCK]


def test_slice_of_a_range_keeps_its_owner():
    owner = object()
    whole = DeviceBytes(HostMemory(), owner, 1000, 50)
    part = whole[10:30][5:]
    assert (part.owner, part.address, part.nbytes) == (owner, 1015, 15)
    with pytest.raises(IndexError):
        whole[::2]
    with pytest.raises(ValueError, match="3 bytes do not fill a range of 50"):
        whole[:] = np.zeros(3, np.uint8)


@pytest.mark.parametrize("bits", [4, None])
def test_staged_slots_hold_the_bytes_of_shared_slots(tmp_path, bits):
    layer = Checkpoint.open(write_toy(tmp_path, bits=bits)).expert_layers[0]
    shared = SlotMemory(layer, 4, on_gpu=True)
    staged = SlotMemory(layer, 4, on_gpu=True, device=HostMemory())
    with Reader(2, io="direct") as reader:
        for memory in (shared, staged):
            for slot, expert in enumerate((5, 0, 3)):
                reader.submit(memory.requests(expert, slot)).wait()
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for a, b in zip(shared.stacks(projection), staged.stacks(projection), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                a, b = (np.array(x.view(mx.uint8)) for x in (a, b))
                np.testing.assert_array_equal(a, b)
                assert a[:3].any()
                assert not a[3].any()


@pytest.fixture
def staged(monkeypatch):
    """Let models keep experts in the "device" and compute with MLX's GPU operations on the CPU."""
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(models, "device_memory", HostMemory)


def test_model_with_staged_slots_equals_the_resident_one(tmp_path, staged):
    path = write_toy(tmp_path / "toy", "qwen3_moe", num_experts=9, top_k=3)
    expected = logits(load_resident(path), list(range(60)), 7)
    for slots in (5, 9):
        model = load_streaming(Checkpoint.open(path), slots=slots)
        assert same(logits(model, list(range(60)), 7), expected)


def test_expert_of_a_failed_read_is_not_resident(tmp_path, staged):
    path = write_toy(tmp_path / "toy", "qwen3_moe", num_experts=9, top_k=3)
    expected = logits(load_resident(path), list(range(30)), 7)
    model = load_streaming(Checkpoint.open(path), slots=5)
    switch = next(iter(model.blocks.values())).switch_mlp
    os.rename(path / "model.safetensors", path / "away")
    with pytest.raises(ReadError):
        switch(mx.ones((1, HIDDEN)), mx.array([[0, 1, 2]]))
    os.rename(path / "away", path / "model.safetensors")
    assert not switch._table.residents.keys() & switch._loading.keys() - {0, 1, 2}
    assert same(logits(model, list(range(30)), 7), expected)
