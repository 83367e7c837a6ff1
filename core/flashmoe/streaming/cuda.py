"""Write to the memory of a discrete NVIDIA GPU with calls of the CUDA driver.

MLX holds arrays that its GPU computed in plain device memory, and moves them into managed memory
when the host looks at them. Managed memory is slow to write from the host and slow to read for the
GPU after that, so slots are written by copies from page-locked memory instead.

Every machine with such a GPU has the driver. The CUDA runtime that MLX uses is linked into MLX, and
its context is the device's primary one, which this module asks for too.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import DeviceError
from .device_copy import DeviceMemory, Mailbox

_pointer, _size, _uint, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int
_device_pointer = ctypes.c_uint64

_FUNCTIONS = {
    "cuInit": [_uint],
    "cuDeviceGetAttribute": [ctypes.POINTER(_int), _int, _int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_pointer), _int],
    "cuCtxSetCurrent": [_pointer],
    "cuPointerGetAttribute": [_pointer, _int, _device_pointer],
    "cuMemHostRegister_v2": [_pointer, _size, _uint],
    "cuMemHostUnregister": [_pointer],
    "cuMemHostGetDevicePointer_v2": [ctypes.POINTER(_device_pointer), _pointer, _uint],
    "cuMemcpyHtoDAsync_v2": [_device_pointer, _pointer, _size, _pointer],
    "cuStreamSynchronize": [_pointer],
    "cuGetErrorName": [_int, ctypes.POINTER(ctypes.c_char_p)],
}

# Names of cuda.h, without their prefixes.
_DEVICE = 0
_INTEGRATED = 18
_MEMORY_TYPE, _IS_MANAGED = 2, 8
_TYPE_DEVICE = 2
_PORTABLE, _DEVICE_MAP = 1, 2
# The driver makes a stream for each calling thread. MLX's streams do not wait for it, nor it for
# them.
_STREAM_PER_THREAD = 2


@cache
def _driver() -> ctypes.CDLL:
    """Return libcuda, ready for calls, which release the interpreter's lock.

    Raises:
        OSError: there is no libcuda.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    for name, types in _FUNCTIONS.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = types, _int
    return driver


def _call(name: str, *args: Any) -> None:
    """Call a function of the driver.

    Raises:
        DeviceError: the call failed; the text has CUDA's name of the error.
    """
    code = getattr(_driver(), name)(*args)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        error = text.value.decode() if text.value else f"error {code}"
        raise DeviceError(
            f"the GPU call {name} failed: {error}. If it fails again, check the GPU with "
            "nvidia-smi and restart the program"
        )


def device_memory() -> DeviceMemory | None:
    """Return the memory of the GPU that MLX computes on.

    None where the GPU shares the host's memory, or where no GPU is used.
    """
    if mx.default_device() != mx.gpu or not mx.cuda.is_available():
        return None
    integrated = _int()
    _call("cuInit", 0)
    _call("cuDeviceGetAttribute", ctypes.byref(integrated), _INTEGRATED, _DEVICE)
    return None if integrated.value else CudaMemory()


class CudaMemory(DeviceMemory):
    """The memory of the GPU that MLX computes on, the first one."""

    def __init__(self) -> None:
        super().__init__()
        context = _pointer()
        _call("cuInit", 0)
        # Never released: MLX holds it to the end of the process as well.
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _DEVICE)
        self._context = context

    def address(self, array: mx.array) -> int:
        # Any conversion of the array would move it; a kernel gets the addresses of its inputs.
        out = _address_kernel(str(array.dtype))(
            inputs=[array],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.uint64],
        )
        address = out[0].item()
        self._enter()
        kind = self._attribute(_MEMORY_TYPE, _uint(), address)
        managed = self._attribute(_IS_MANAGED, _uint(), address)
        if kind != _TYPE_DEVICE or managed:
            raise DeviceError(
                f"an array is not in the GPU's own memory (memory type {kind}, managed {managed}): "
                "this version of MLX places arrays differently; install the version that "
                "llm-flashmoe asks for"
            )
        return address

    def write(self, address: int, source: np.ndarray) -> None:
        # Why this may overwrite a slot at once, on a stream that waits for no kernel: a slot is
        # given away when what reads it was evaluated, and `mx.eval` returns when the GPU is done.
        # Why later kernels see the bytes: they are launched after this has returned.
        self._enter()
        _call("cuMemcpyHtoDAsync_v2", address, _address(source), source.nbytes, _STREAM_PER_THREAD)
        # Also when the source is not page-locked: then the call above returns when the driver has
        # copied the bytes, not when they have arrived.
        _call("cuStreamSynchronize", _STREAM_PER_THREAD)

    def lock(self, buffer: np.ndarray) -> None:
        self._enter()
        try:
            _call("cuMemHostRegister_v2", _address(buffer), buffer.nbytes, _PORTABLE)
        except DeviceError:
            return  # copies from it are slower, and still correct
        weakref.finalize(buffer, _unlock, self._context, _address(buffer)).atexit = False

    def mailbox(self, words: int) -> Mailbox:
        """Return a new mailbox, in page-locked host memory that kernels write to.

        Raises:
            DeviceError: the driver does not lock the memory.
        """
        self._enter()
        pages = np.frombuffer(mmap.mmap(-1, 4 * words), np.uint32)
        _call("cuMemHostRegister_v2", _address(pages), pages.nbytes, _PORTABLE | _DEVICE_MAP)
        weakref.finalize(pages, _unlock, self._context, _address(pages)).atexit = False
        address = _device_pointer()
        _call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), _address(pages), 0)
        return Mailbox(pages, mx.array([address.value], mx.uint64))

    def _enter(self) -> None:
        """Set the context of the calling thread; setting it again costs next to nothing."""
        _call("cuCtxSetCurrent", self._context)

    @staticmethod
    def _attribute(which: int, value: ctypes.c_uint, address: int) -> int:
        _call("cuPointerGetAttribute", ctypes.addressof(value), which, address)
        return value.value


def _unlock(context: ctypes.c_void_p, address: int) -> None:
    # Runs on whichever thread drops the buffer. Nobody could do anything about an error.
    _driver().cuCtxSetCurrent(context)
    _driver().cuMemHostUnregister(address)


@cache
def _address_kernel(dtype: str):
    # One for each dtype, because MLX caches a kernel by its name.
    return mx.fast.cuda_kernel(
        name=f"flashmoe_address_of_{dtype.rsplit('.', 1)[-1]}",
        input_names=["a"],
        output_names=["address"],
        source="address[0] = reinterpret_cast<unsigned long long>(a);",
        ensure_row_contiguous=False,
    )


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
