"""Runs Metal kernels on the CPU: a C++ compiler builds MLX's source for Metal against `msl/`.

It reports faults that a GPU would hide: lanes that do not reach a barrier, reads of memory that
nobody wrote, accesses outside a buffer. It says nothing about speed, nor about Apple's compiler.

    with launched_by(msl_cpu.launcher(seed=3)):
        y = some_kernel(x)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import cache

import mlx.core as mx
import msl_build
import msl_source
import numpy as np

#: The size of the guards around each buffer. No kernel may write there or use the values.
GUARD = 64 << 10
POISON = 0xFF  # NaN, as a float of any size


class KernelError(Exception):
    """A kernel did something that no kernel may do."""


def launcher(*, seed: int = 0, flags: Sequence[str] = ()):
    """Return a launcher for `flashmoe_metal.kernel.launched_by`, which computes at once."""

    def launch(kernel, **call) -> list[mx.array]:
        built = kernel.built_for("metal", call["inputs"])
        return run(built, title=kernel.name, seed=seed, flags=flags, **call)

    return launch


def run(
    kernel,
    *,
    inputs: Sequence[mx.array],
    template: Sequence[tuple] = (),
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    title: str = "kernel",
    seed: int = 0,
    flags: Sequence[str] = (),
) -> list[mx.array]:
    """Launch an `mx.fast.metal_kernel` and return its outputs.

    Args:
        title: the name of the kernel's text in messages.
        seed: seed of the order in which lanes and threadgroups run; 0 runs them in their order.
        flags: flags of the compiler besides the usual ones.

    Raises:
        KernelError: The kernel did something that no kernel may do.
        ValueError: The kernel does not compile.
    """
    call = {
        "template": list(template),
        "grid": grid,
        "threadgroup": threadgroup,
        "output_shapes": output_shapes,
        "output_dtypes": list(output_dtypes),
    }
    source = msl_source.source(kernel, inputs=inputs, **call)
    function = msl_build.library(msl_source.to_cpp(source, f"{title}.metal"), tuple(flags))
    outputs = list(zip(output_shapes, output_dtypes, strict=True))
    buffers = _buffers(source, map(_host, inputs), outputs)
    error = function(
        (ctypes.c_void_p * len(buffers))(*(b.address for b in buffers)),
        (ctypes.c_uint * 6)(*grid, *threadgroup),
        seed,
    ).decode()
    # A wrong write before an error may be the error's cause, so both are reported.
    errors = list(filter(None, [error, *(b.fault() for b in buffers)]))
    if errors:
        raise KernelError(f"{title}: {'; '.join(errors)}")
    written = (b for b in buffers if b.before is None)
    return [b.array(*o) for b, o in zip(written, outputs, strict=True)]


class Buffer:
    """A kernel's memory with guards around it.

    before: the content of an input; None for an output.
    """

    def __init__(self, name: str, size: int, before: bytes | None):
        self.name, self.size, self.before = name, size, before
        self.all = np.full(GUARD + size + 2 * GUARD, POISON, np.uint8)
        # Metal's buffers begin at multiples of 256 bytes.
        self.start = GUARD + -(self.all.ctypes.data + GUARD) % 256
        self.inside = self.all[self.start : self.start + size]
        if before:
            self.inside[:] = np.frombuffer(before, np.uint8)
        self._guard(closed=True)

    @property
    def address(self) -> int:
        return self.inside.ctypes.data if self.size else self.all.ctypes.data + self.start

    def _guard(self, *, closed: bool):
        """Tell AddressSanitizer about the guards, if it is in this process."""
        mark = _marker(closed)
        if mark is not None:
            first, end = self.all.ctypes.data, self.all.ctypes.data + self.all.size
            for a, b in ((first, self.address), (self.address + self.size, end)):
                mark(ctypes.c_void_p(a), ctypes.c_size_t(b - a))

    def fault(self) -> str:
        """Describe a write that is not allowed, or return "".

        Reads in the guards show only in the results.
        """
        self._guard(closed=False)
        before, after = self.all[: self.start], self.all[self.start + self.size :]
        if (before != POISON).any():
            return f"a write before the beginning of {self.name}"
        if (after != POISON).any():
            return f"a write past the end of {self.name}"
        if self.before is not None and self.inside.tobytes() != self.before:
            return f"a write to the input {self.name}"
        return ""

    def array(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        values = self.inside.view(_numpy(dtype)).reshape(shape)
        if dtype == mx.bool_:
            values = values != 0
        array = mx.array(values)
        return array.view(dtype) if dtype == mx.bfloat16 else array


@cache
def _marker(closed: bool):
    """Return AddressSanitizer's function that closes or opens memory, or None without it."""
    name = f"__asan_{'' if closed else 'un'}poison_memory_region"
    return getattr(ctypes.CDLL(None), name, None)


def _numpy(dtype: mx.Dtype) -> np.dtype:
    names = {mx.bfloat16: "uint16", mx.bool_: "uint8"}
    return np.dtype(names.get(dtype) or str(dtype).removeprefix("mlx.core."))


def _host(x: mx.array) -> np.ndarray:
    # MLX gives kernels contiguous copies too.
    return np.ascontiguousarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _buffers(source, inputs: Iterable[np.ndarray], outputs: Iterable[tuple]) -> list[Buffer]:
    """Return the buffers in the order of the kernel's parameters.

    They are each input, then what the kernel asks about it (its shape and so on), then the outputs.

    Args:
        outputs: (shape, dtype) of each output.
    """
    sizes = (math.prod(shape) * _numpy(dtype).itemsize for shape, dtype in outputs)
    inputs, details, buffers = iter(inputs), {}, []
    for name in (p.name for p in source.parameters if p.buffer is not None):
        if name in details:
            array = details[name]
        elif (array := next(inputs, None)) is not None:
            details = _details(name, array)
        else:
            buffers.append(Buffer(name, next(sizes), None))
            continue
        buffers.append(Buffer(name, array.nbytes, array.tobytes()))
    return buffers


def _details(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a kernel may ask about an input. Strides count elements, as in MLX."""
    return {
        f"{name}_shape": np.array(array.shape, np.int32),
        f"{name}_strides": np.array(array.strides, np.int64) // array.itemsize,
        f"{name}_ndim": np.array(array.ndim, np.int32),
    }
