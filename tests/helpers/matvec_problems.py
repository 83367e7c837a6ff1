"""Random weight stacks for the CPU kernels, calls of the kernels, and the check of a product."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np

from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.ops.cpu import gemm, matvec

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
#: The error allowed for a number of a product, relative to the sum of its |w * x|.
TOLERANCE = 2e-6


def _raw(array, dtype):
    return np.array(array if dtype == "float32" else array.view(mx.uint16))


def quantised(shape, bits, group_size, dtype, seed=0):
    """Return a random quantised stack, as Packed, and its values in float32.

    Args:
        shape: (slots, rows, columns).
    """
    w = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))
    q, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    values = mx.dequantize(q, *wide, group_size=group_size, bits=bits)
    parts = _raw(scales, dtype), _raw(biases, dtype)
    packed = matvec.Packed(np.array(q.view(mx.uint8)), *parts, bits, group_size, dtype)
    return packed, np.array(values)


def small_floats(shape, mode, seed=0):
    """Return a random stack of small floats, as Packed, and its values in float32.

    Args:
        shape: (slots, rows, columns).
        mode: one of `FLOAT_MODES`.
    """
    form = FLOAT_MODES[mode]
    w = mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)
    how = {"group_size": form.group_size, "bits": form.bits, "mode": mode}
    q, scales = mx.quantize(w, **how)
    values = np.array(mx.dequantize(q, scales, dtype=mx.float32, **how))
    return packed_floats(np.array(q.view(mx.uint8)), np.array(scales), mode), values


def packed_floats(weight, scales, mode):
    """Return a stack of small floats from its bytes and scales."""
    form = FLOAT_MODES[mode]
    return matvec.Packed(weight, scales, None, form.bits, form.group_size, form.scale_dtype)


def unquantised(shape, dtype, seed=0):
    """Return a random unquantised stack, as Packed, and its values in float32.

    Args:
        shape: (slots, rows, columns).
    """
    w = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))
    bits = 32 if dtype == "float32" else 16
    packed = matvec.Packed(np.array(w.view(mx.uint8)), None, None, bits, 0, dtype)
    return packed, np.array(w.astype(mx.float32))


def normal(*shape, seed=1):
    """Return normally distributed float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_matvec(w, slots, x, rows):
    """Return w[slot] @ x[row] for each pair of a slot and a row, of shape (pairs, rows of w)."""
    out = np.full((len(slots), w.shape[1]), np.nan, np.float32)
    matvec.matvec(w, np.array(slots, np.int64), x, np.array(rows, np.int64), out)
    return out


def run_gate_up(gate, up, slots, x, rows):
    """Return silu(gate[slot] @ x[row]) * (up[slot] @ x[row]) for each pair of a slot and a row."""
    out = np.full((len(slots), gate.shape[1]), np.nan, np.float32)
    matvec.gate_up(gate, up, np.array(slots, np.int64), x, np.array(rows, np.int64), out)
    return out


def run_matmul(w, slot, x):
    """Return x @ w[slot].T, of shape (rows of x, rows of w)."""
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    gemm.matmul(w, slot, x, out)
    return out


def run_dequantize(w, slot):
    """Return the weights of a slot in float32, of shape (rows, columns)."""
    out = np.full(w.shape[1:], np.nan, np.float32)
    matvec.dequantize(w, slot, out)
    return out


def assert_product(out, values, x):
    """Assert that out = x @ values.T, up to the rounding of float32 sums."""
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(values.T) + 1e-30
    worst = np.max(np.abs(out - exact) / size)
    assert worst < TOLERANCE, f"error {worst} of the sum of |w * x|"


def rerun_with_two_threads(file, test):
    """Run a test in a new process with two threads, and assert that it passes.

    The workers of pytest-xdist have one thread each, and numba fixes the largest number of threads
    when it starts.
    """
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-rs", f"{file}::{test}"]
    env = {k: v for k, v in os.environ.items() if "XDIST" not in k}
    env["NUMBA_NUM_THREADS"] = "2"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def repeat_a_slot(stacks):
    """Give slot 4 of each stack the bytes of slot 1, and return the stacks."""
    for w in stacks:
        for array in (w.weight, w.scales, w.biases):
            if array is not None:
                array[4] = array[1]
    return stacks
