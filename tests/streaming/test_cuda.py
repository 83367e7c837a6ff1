"""Tests slots in the memory of a discrete NVIDIA GPU; they run only where there is one."""

import ctypes
import gc
import threading
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import DeviceError
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.streaming import cuda as cuda_memory
from flashmoe.streaming.cuda import CudaMemory, device_memory
from flashmoe.streaming.device_copy import STAGING_NBYTES, DeviceBytes
from flashmoe.streaming.reader import Reader, ReadRequest

pytestmark = pytest.mark.skipif(device_memory() is None, reason="needs a discrete NVIDIA GPU")


def zeros(*shape, dtype=mx.uint8) -> mx.array:
    """Return an evaluated array of zeros."""
    mx.clear_cache()  # slot memory does so before it allocates its stacks
    array = mx.zeros(shape, dtype)
    mx.eval(array)
    return array


def gpu_sees(array: mx.array, expected: np.ndarray) -> bool:
    """Return whether the GPU sees these bytes. The host does not read the array."""
    equal = mx.array_equal(array.view(mx.uint8).reshape(-1), mx.array(expected.reshape(-1)))
    return equal.item()


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint32, mx.bfloat16, mx.float16, mx.float32])
def test_gpu_sees_the_bytes_that_were_read(tmp_path, dtype):
    data = np.random.default_rng(0).integers(0, 256, 2 * STAGING_NBYTES + 4096, np.uint8)
    (tmp_path / "experts").write_bytes(data.tobytes())
    memory = CudaMemory()
    stack = zeros(3, data.size // dtype.size, dtype=dtype)
    before = memory.address(stack)
    slot = DeviceBytes.of(memory, stack)[data.size : 2 * data.size]
    for io in ("buffered", "direct"):
        with Reader(4, io=io) as reader:
            reader.submit([ReadRequest(tmp_path / "experts", 0, slot, 0, 0)]).wait()
        assert gpu_sees(stack[1], data)
        assert gpu_sees(stack[0], np.zeros_like(data))
        assert gpu_sees(stack[2], np.zeros_like(data))
        slot[:] = np.zeros_like(data)
        assert gpu_sees(stack[1], np.zeros_like(data))
    assert memory.address(stack) == before, "a use by the GPU moved the array"


def test_use_by_the_gpu_does_not_move_an_array():
    memory = CudaMemory()
    stack = zeros(4, 1 << 20)
    before = memory.address(stack)
    mx.eval(stack[1], stack.view(mx.uint32), mx.sum(stack))
    mx.clear_cache()
    assert memory.address(stack) == before


def test_address_of_an_array_that_the_host_read_is_the_same_or_an_error():
    """When the host reads an array, MLX may move it. Then its address is an error."""
    memory = CudaMemory()
    stack = zeros(4, 1 << 20)
    before = memory.address(stack)
    np.array(stack)
    # There is no error only if the array has stayed in its place.
    with suppress(DeviceError):
        assert memory.address(stack) == before


def test_evaluated_kernels_do_not_see_later_writes():
    """`mx.eval` returns when the GPU has read. Only then may a slot get its next bytes."""
    memory = CudaMemory()
    stack = zeros(1 << 28)
    whole = DeviceBytes.of(memory, stack)
    for i in range(20):
        total = mx.sum(stack.view(mx.uint32)[: 1 << 20].astype(mx.uint64))
        mx.eval(total)
        whole[: 1 << 22] = np.full(1 << 22, i + 1, np.uint8)
        assert total.item() == (1 << 20) * int.from_bytes(bytes([i] * 4), "little")


def test_places_are_unlocked_after_their_threads_have_ended():
    memory = CudaMemory()
    array = zeros(1 << 20)
    target = DeviceBytes.of(memory, array)
    addresses = []

    def work():
        place = target.staging(0)
        place[:] = 7
        target[:] = place
        addresses.append(place.__array_interface__["data"][0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert gpu_sees(array, np.full(1 << 20, 7, np.uint8))
    memory._enter()
    with pytest.raises(DeviceError, match="cuMemHostUnregister failed: CUDA_ERROR_"):
        cuda_memory._call("cuMemHostUnregister", addresses[0])


def test_driver_error_has_its_name():
    with pytest.raises(
        DeviceError, match="cuDevicePrimaryCtxRetain failed: CUDA_ERROR_INVALID_DEVICE"
    ):
        cuda_memory._call("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), 99)
    assert mx.sum(mx.ones((4,))).item() == 4


def test_streamed_model_equals_the_resident_one(tmp_path):
    path = write_toy(tmp_path / "toy", "qwen3_moe", num_experts=9, top_k=3)
    tokens = list(range(60))
    model = load_streaming(Checkpoint.open(path), slots=5)
    stacks = [
        stack
        for block in model.blocks.values()
        for projection in ("gate_proj", "up_proj", "down_proj")
        for stack in block.switch_mlp._memory.stacks(projection)
    ]
    memory = CudaMemory()
    before = [memory.address(stack) for stack in stacks]
    assert same(logits(model, tokens, 7), logits(load_resident(path), tokens, 7))
    assert [memory.address(stack) for stack in stacks] == before, "the host looked at a stack"
