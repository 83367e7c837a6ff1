"""The CPU kernels against float64 on the values that MLX itself unpacks; and their bit promises."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.ops.cpu import gemm
from flashmoe.ops.cpu import matvec as kernels

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DTYPES = ("bfloat16", "float16", "float32")
# Of (matrix row, row of x): the error over the sum of |w * x|.
TOLERANCE = 2e-6


def host(array, dtype):
    return np.array(array if dtype == "float32" else array.view(mx.uint16))


def affine(shape, bits, group_size, dtype, seed=0):
    """A random stack as (Packed, its values in float32)."""
    w = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))
    q, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    values = mx.dequantize(q, *wide, group_size=group_size, bits=bits)
    parts = host(scales, dtype), host(biases, dtype)
    packed = kernels.Packed(np.array(q.view(mx.uint8)), *parts, bits, group_size, dtype)
    return packed, np.array(values)


def plain(shape, dtype, seed=0):
    w = mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))
    bits = 32 if dtype == "float32" else 16
    packed = kernels.Packed(np.array(w.view(mx.uint8)), None, None, bits, 0, dtype)
    return packed, np.array(w.astype(mx.float32))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(w, slots, x, rows):
    out = np.full((len(slots), w.shape[1]), np.nan, np.float32)
    kernels.matvec(w, np.array(slots, np.int64), x, np.array(rows, np.int64), out)
    return out


def run_gate_up(gate, up, slots, x, rows):
    out = np.full((len(slots), gate.shape[1]), np.nan, np.float32)
    kernels.gate_up(gate, up, np.array(slots, np.int64), x, np.array(rows, np.int64), out)
    return out


def multiply(w, slot, x):
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    gemm.matmul(w, slot, x, out)
    return out


def unpack(w, slot):
    out = np.full(w.shape[1:], np.nan, np.float32)
    kernels.dequantize(w, slot, out)
    return out


def assert_product(out, values, x):
    """out = x @ values.T, to the rounding of float32 sums."""
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(values.T) + 1e-30
    worst = np.max(np.abs(out - exact) / size)
    assert worst < TOLERANCE, f"error {worst} of the sum of |w * x|"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_format_is_read_wrongly(bits, group_size, dtype):
    # Rows of one group, of odd numbers of groups, and of whole vectors; one matrix row and 19.
    for height, groups in ((1, 1), (19, 3), (5, 16), (2, 19)):
        w, values = affine((2, height, groups * group_size), bits, group_size, dtype)
        unpacked = unpack(w, 1)
        if dtype == "float32":  # scale * q is rounded before the sum, or not
            np.testing.assert_allclose(unpacked, values[1], rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(unpacked, values[1])
        x = normal(3, w.shape[2])
        assert_product(run(w, [1], x, [2]), values[1], x[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unquantised_matrix_is_read_wrongly(dtype):
    for height, width in itertools.product((1, 3, 33), (1, 17, 32, 100)):
        w, values = plain((2, height, width), dtype)
        np.testing.assert_array_equal(unpack(w, 1), values[1])
        for count in (1, 6, 40):
            x = normal(count, width)
            assert_product(multiply(w, 1, x), values[1], x)


def assert_alone(w, up=None):
    """Runs of pairs of one slot, whole tiles and what is left, have the bits of single pairs."""
    slots = [0] * 5 + [1] + [2] * 8 + [1] * 3
    x = normal(9, w.shape[2])
    rows = np.random.default_rng(2).integers(0, 9, len(slots)).tolist()
    together = run(w, slots, x, rows) if up is None else run_gate_up(w, up, slots, x, rows)
    for p, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        one = run(w, [slot], x, [row]) if up is None else run_gate_up(w, up, [slot], x, [row])
        np.testing.assert_array_equal(together[p], one[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_row_has_other_bits_beside_others(bits, group_size):
    # Whole and broken parts of the inputs, and steps of groups; one matrix row and 19.
    dtype = DTYPES[(bits + group_size // 32) % 3]
    for height, groups in ((19, 3), (1, 16), (3, 37)):
        assert_alone(affine((3, height, groups * group_size), bits, group_size, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unquantised_row_has_other_bits_beside_others(dtype):
    for height, width in ((3, 1), (19, 100), (2, 1024), (17, 2500)):
        assert_alone(plain((3, height, width), dtype)[0])


def test_a_gated_row_has_other_bits_beside_others():
    up = affine((3, 37, 2240), 8, 32, "float16", seed=1)[0]
    assert_alone(affine((3, 37, 2240), 4, 64, "bfloat16")[0], up)
    rounding = dataclasses.replace(up, activations="int8")
    assert_alone(affine((3, 37, 2240), 4, 64, "bfloat16")[0], rounding)
    assert_alone(rounding, rounding)


def test_a_half_float_is_widened_inexactly():
    """All of them: subnormals, infinities and nan too."""
    raw = np.arange(2**16, dtype=np.uint16)
    w = kernels.Packed(raw.view(np.uint8).reshape(1, 16, -1), None, None, 16, 0, "float16")
    values = raw.view(np.float16).astype(np.float32).reshape(16, -1)
    np.testing.assert_array_equal(unpack(w, 0), values)
    tiny = raw[:1024].reshape(1, 32, 32)
    w = kernels.Packed(tiny.view(np.uint8), None, None, 16, 0, "float16")
    x = np.zeros((1, 32), np.float32)
    for i in range(32):
        x[:] = 0
        x[0, i] = 1
        np.testing.assert_array_equal(run(w, [0], x, [0])[0], tiny.view(np.float16)[0, :, i])


@pytest.mark.parametrize("bits", BITS)
def test_a_value_meets_the_wrong_x(bits):
    """One input at a time, so that no error can hide in a sum."""
    w, values = affine((1, 3, 192), bits, 64, "bfloat16")
    out = run(w, [0] * 192, np.eye(192, dtype=np.float32), range(192))
    np.testing.assert_allclose(out, values[0].T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 70])
def test_matmul_loses_a_row(count):
    for height, width in ((1, 64), (40, 192), (1030, 128)):
        w, values = affine((2, height, width), 4, 64, "bfloat16")
        x = normal(count, width)
        assert_product(multiply(w, 1, x), values[1], x)


@pytest.mark.parametrize(("gate_bits", "up_bits"), [(4, 4), (4, 6), (8, 3)])
def test_gate_up_is_not_silu_times_up(gate_bits, up_bits):
    gate, gate_values = affine((3, 21, 256), gate_bits, 64, "bfloat16")
    up, up_values = affine((3, 21, 256), up_bits, 32, "bfloat16", seed=5)
    x = normal(2, 256)
    slots, rows = [2, 0, 1], [1, 0, 1]
    out = run_gate_up(gate, up, slots, x, rows)
    for p, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        g = gate_values[slot].astype(np.float64) @ x[row]
        expected = g / (1 + np.exp(-g)) * (up_values[slot].astype(np.float64) @ x[row])
        np.testing.assert_allclose(out[p], expected, rtol=2e-4, atol=2e-4)


def test_a_large_gate_overflows():
    gate, _ = affine((1, 8, 64), 4, 64, "bfloat16")
    x = normal(1, 64) * 1000
    assert np.isfinite(run_gate_up(gate, gate, [0], x, [0])).all()


@pytest.fixture(scope="module")
def stacks():
    """Formats that fill vectors differently; slot 4 has the bytes of slot 1."""
    made = [affine((5, 37, 320), b, 64, "bfloat16")[0] for b in (3, 4)]
    made.append(plain((5, 37, 75), "bfloat16")[0])
    made.append(dataclasses.replace(affine((5, 37, 320), 4, 64, "bfloat16")[0], activations="int8"))
    for w in made:
        for array in (w.weight, w.scales, w.biases):
            if array is not None:
                array[4] = array[1]
    return made


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_bits_of_a_result_depend_on_other_pairs(stacks, data):
    w = data.draw(st.sampled_from(stacks))
    count = data.draw(st.integers(1, 6), "rows of x")
    x = normal(count, w.shape[2])
    pair = st.tuples(st.integers(0, 4), st.integers(0, count - 1))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=40))
    slots, rows = zip(*pairs, strict=True)
    out, both = run(w, slots, x, rows), run_gate_up(w, w, slots, x, rows)
    for p, (slot, row) in enumerate(pairs):
        alone = {4: 1}.get(slot, slot)
        np.testing.assert_array_equal(out[p], run(w, [alone], x[row : row + 1], [0])[0])
        single = run_gate_up(w, w, [alone], x[row : row + 1], [0])[0]
        np.testing.assert_array_equal(both[p], single)


@pytest.mark.skipif(os.cpu_count() < 2, reason="one CPU")
def test_bits_of_a_result_depend_on_threads(stacks):
    if numba.config.NUMBA_NUM_THREADS < 2:
        # A worker of xdist has one thread; how many there can be is decided at the start.
        name = f"{__file__}::test_bits_of_a_result_depend_on_threads"
        command = [sys.executable, "-m", "pytest", "-n0", "-q", "-rs", name]
        env = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        env["NUMBA_NUM_THREADS"] = "2"
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "1 passed" in done.stdout, done.stdout + done.stderr
        return

    def results():
        for w in stacks:
            x = normal(40, w.shape[2])
            slots = np.arange(40) % 5
            yield run(w, slots, x, np.arange(40))
            yield run_gate_up(w, w, slots, x, np.arange(40))
            for count in (1, 7):
                yield multiply(w, 2, x[:count])

    several = list(results())
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = list(results())
    finally:
        numba.set_num_threads(before)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_pairs_or_rows_crash(stacks):
    w = stacks[1]
    assert run(w, [], normal(2, w.shape[2]), []).shape == (0, 37)
    assert multiply(w, 0, normal(0, w.shape[2])).shape == (0, 37)


@pytest.mark.parametrize(
    ("slots", "rows"), [([0, 5], [0, 0]), ([-1], [0]), ([0], [2]), ([0], [-1])]
)
def test_memory_outside_a_stack_is_read(stacks, slots, rows):
    w = stacks[1]
    for run_one in (run, lambda w, *a: run_gate_up(w, w, *a)):
        with pytest.raises(IndexError, match=r"slot|row"):
            run_one(w, slots, normal(2, w.shape[2]), rows)


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_slot_outside_is_unpacked(stacks, slot):
    for count in (1, 4, 40):
        with pytest.raises(IndexError, match=f"slot {slot} "):
            multiply(stacks[1], slot, normal(count, stacks[1].shape[2]))
    with pytest.raises(IndexError, match=f"slot {slot} "):
        unpack(stacks[1], slot)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 7},
        {"group_size": 16},
        {"dtype": "float64"},
        {"dtype": "float32"},
        {"scales": np.zeros((2, 3, 3), np.uint16)},
        {"weight": np.zeros((2, 3, 128), np.uint8)[:, :, ::2]},
    ],
)
def test_a_wrong_stack_reaches_the_kernels(change):
    w, _ = affine((2, 3, 128), 4, 64, "bfloat16")
    with pytest.raises(ValueError, match=r"7 bits|size 16|float64|scales is|weight is"):
        dataclasses.replace(w, **change)


def test_wrong_arrays_reach_the_kernels(stacks):
    w = stacks[1]
    x, out, zero = normal(1, w.shape[2]), np.empty((1, 37), np.float32), np.zeros(1, np.int64)
    wrong = {
        "x is": (zero, x.astype(np.float64), zero, out),
        "out is": (zero, x, zero, out[:, :36]),
        "slots is": (zero.astype(np.int32), x, zero, out),
        "rows is": (zero, x, np.zeros(2, np.int64), out),
    }
    for match, arguments in wrong.items():
        with pytest.raises(ValueError, match=match):
            kernels.matvec(w, *arguments)


def test_a_second_process_compiles_again(tmp_path):
    """The first token waits for the compiler; only once for a machine."""
    code = """if True:
        import numpy as np
        from flashmoe.ops import kernels, unpack
        w = kernels.Packed(np.zeros((1, 4, 32), np.uint8), *[np.zeros((1, 4, 1), np.uint16)] * 2,
                       4, 64, "bfloat16")
        zero, x, out = np.zeros(1, np.int64), np.ones((1, 64), np.float32), np.ones((1, 4), "f4")
        kernels.matvec(w, zero, x, zero, out)
        assert not out.any()
        kernel = unpack.block_kernel("dot", 4, 64, "bfloat16")
        print(kernel.cache_hits, *kernels._launch.stats.cache_hits.values())
    """
    core = Path(kernels.__file__).parents[3]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(core)}

    def hits():
        run = [sys.executable, "-c", code]
        return subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout

    assert hits().split() == ["0"]
    assert hits().split() == ["1", "1"]
