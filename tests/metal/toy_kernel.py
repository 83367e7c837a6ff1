"""A test kernel that multiplies a 4-bit matrix with a vector, written like the package's."""

from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_metal.kernel import Kernel

TEXT = (Path(__file__).parent / "msl/matvec.metal").read_text()
GROUP, SIMDS = 32, 4
#: The error allowed, relative to the largest value of the product: the rounding of the result.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class TextKernel(Kernel):
    """A kernel whose body is a given text and not a file of the package."""

    def __init__(self, name, inputs, outputs, body: str):
        super().__init__(name, inputs, outputs)
        self.body = body

    @cached_property
    def source(self) -> str:
        return self.body


def matvec(*changes: tuple[str, str]) -> TextKernel:
    """Return the kernel with changes to its text, as (old, new), which plant faults."""
    body = TEXT
    for old, new in changes:
        assert old in body, old
        body = body.replace(old, new)
    return TextKernel("matvec", ["w", "scales", "biases", "x"], ["y"], body)


def problem(rows: int = 3, width: int = 512, dtype: mx.Dtype = mx.float32):
    """Return random arguments of the kernel and the exact product in float64."""
    w = mx.random.normal((rows, width), key=mx.random.key(1))
    q, scales, biases = mx.quantize(w, group_size=GROUP, bits=4)
    x = mx.random.normal((width,), key=mx.random.key(2)).astype(dtype)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    values = np.array(mx.dequantize(q, *wide, group_size=GROUP, bits=4)).astype(np.float64)
    return (q, scales, biases, x), values @ np.array(x.astype(mx.float32)).astype(np.float64)


def multiply(kernel: TextKernel, q, scales, biases, x) -> mx.array:
    """Return the kernel's product, of shape (rows,)."""
    rows = q.shape[0]
    template = [("T", x.dtype), ("K", x.size), ("G", GROUP), ("SIMDS", SIMDS)]
    (y,) = kernel(
        inputs=[q, scales, biases, x],
        template=template,
        grid=(rows * SIMDS * 32, 1, 1),
        threadgroup=(SIMDS * 32, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[x.dtype],
    )
    return y


def launch(
    body: str, inputs: dict[str, mx.array], outputs: dict, *, lanes=32, groups=1, template=()
):
    """Launch a kernel with this body once. outputs: {name: (shape, dtype)}."""
    shapes, dtypes = zip(*outputs.values(), strict=True)
    return TextKernel("lines", list(inputs), list(outputs), body)(
        inputs=list(inputs.values()),
        template=template,
        grid=(lanes * groups, 1, 1),
        threadgroup=(lanes, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
