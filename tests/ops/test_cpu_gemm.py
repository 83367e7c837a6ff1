"""Products of many rows against float64; the bits of a row depend on nothing but its values."""

import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_matvec import BITS, DTYPES, GROUPS, affine, assert_product, normal, plain

from flashmoe.ops.cpu import gemm
from flashmoe.ops.cpu import matvec as kernels
from flashmoe.ops.cpu import swiglu as glu

ROWS = (1, 2, 3, 5, 7, 13, 21, 40, 51)
HEIGHTS = (1, 5, 17, 40)


def product(w, slot, x, up=None):
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    gemm.product(w, slot, x, out, up)
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_many_rows_is_wrong(bits, group_size, dtype):
    # One group, some groups, and more than two pieces.
    for height, groups in zip(HEIGHTS, (1, 3, 7, 2080 // group_size + 1), strict=True):
        w, values = affine((2, height, groups * group_size), bits, group_size, dtype)
        x = normal(max(ROWS), w.shape[2])
        for rows in ROWS:
            assert_product(product(w, 1, x[:rows]), values[1], x[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_with_unquantised_weights_is_wrong(dtype):
    for height, width in itertools.product(HEIGHTS, (1, 17, 32, 100, 1023, 1024, 1025, 2100)):
        w, values = plain((2, height, width), dtype)
        x = normal(max(ROWS), width)
        for rows in ROWS:
            assert_product(product(w, 1, x[:rows]), values[1], x[:rows])


def test_what_lay_in_memory_after_the_last_input_counts():
    """There x is zero, and zero times an infinity of the piece before would be nan."""
    values = np.full((1, 17, 1030), np.inf, np.float32)
    w = kernels.Packed(values.view(np.uint8), None, None, 32, 0, "float32")
    assert np.isinf(product(w, 0, np.ones((5, 1030), np.float32))).all()


def test_a_row_of_nan_reaches_other_rows(stacks):
    x = normal(7, stacks[1].shape[2])
    whole = product(stacks[1], 1, x)
    x[2] = np.nan
    out = product(stacks[1], 1, x)
    assert np.isnan(out[2]).all()
    np.testing.assert_array_equal(np.delete(out, 2, axis=0), np.delete(whole, 2, axis=0))


@pytest.fixture(scope="module")
def stacks():
    """Slot 4 has the bytes of slot 1."""
    made = [affine((5, 37, 1344), b, 64, "bfloat16")[0] for b in (3, 4)]
    made += [plain((5, 37, 1075), "bfloat16")[0], affine((5, 21, 320), 8, 32, "float16")[0]]
    for w in made:
        for array in (w.weight, w.scales, w.biases):
            if array is not None:
                array[4] = array[1]
    return made


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bits_of_a_row_depend_on_other_rows(stacks, data):
    w = data.draw(st.sampled_from(stacks))
    up = data.draw(st.sampled_from([None, w]))
    x = normal(70, w.shape[2])
    whole = product(w, 1, x, up)
    rows = data.draw(st.lists(st.integers(0, 69), min_size=1, max_size=60))
    slot = data.draw(st.sampled_from([1, 4]))
    np.testing.assert_array_equal(product(w, slot, x[rows], up), whole[rows])


def test_bits_of_a_result_depend_on_other_matrix_rows(stacks):
    """Nor does a result depend on where its matrix row lies among the others."""
    w = stacks[1]
    x = normal(7, w.shape[2])
    whole = product(w, 1, x)
    for first, last in ((1, 37), (5, 6), (17, 36)):
        parts = (np.ascontiguousarray(a[:, first:last]) for a in (w.weight, w.scales, w.biases))
        part = kernels.Packed(*parts, 4, 64, "bfloat16")
        np.testing.assert_array_equal(product(part, 1, x), whole[:, first:last])


@pytest.mark.skipif(os.cpu_count() < 2, reason="one CPU")
def test_bits_of_a_product_depend_on_threads(stacks):
    if numba.config.NUMBA_NUM_THREADS < 2:
        # A worker of xdist has one thread; how many there can be is decided at the start.
        name = f"{__file__}::test_bits_of_a_product_depend_on_threads"
        command = [sys.executable, "-m", "pytest", "-n0", "-q", "-rs", name]
        env = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        env["NUMBA_NUM_THREADS"] = "2"
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "1 passed" in done.stdout, done.stdout + done.stderr
        return

    def results():
        for w, rows in itertools.product(stacks, (1, 5, 40)):
            x = normal(rows, w.shape[2])
            yield product(w, 2, x)
            yield product(w, 2, x, w)

    several = list(results())
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = list(results())
    finally:
        numba.set_num_threads(before)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("gate_bits", "up_bits"), [(4, 4), (4, 6), (8, 3), (16, 4)])
def test_a_product_with_up_is_not_silu_times_up(gate_bits, up_bits):
    def made(bits, seed):
        shape = (2, 21, 1152)
        if bits == 16:
            return plain(shape, "bfloat16", seed)
        return affine(shape, bits, 32 if seed else 64, "bfloat16", seed)

    (gate, gate_values), (up, up_values) = made(gate_bits, 0), made(up_bits, 5)
    x = normal(7, 1152) / 8
    g = x.astype(np.float64) @ gate_values[1].T
    expected = g / (1 + np.exp(-g)) * (x @ up_values[1].T.astype(np.float64))
    np.testing.assert_allclose(product(gate, 1, x, up), expected, rtol=2e-4, atol=2e-4)
    assert np.isfinite(product(gate, 1, x * 10000, up)).all()


def test_many_rows_are_not_the_mlp_of_few():
    gate, up = (affine((2, 96, 256), 4, 64, "bfloat16", seed=s)[0] for s in (0, 1))
    down, _ = affine((2, 256, 96), 4, 32, "bfloat16", seed=2)
    x = normal(30, 256)
    few = glu.few_rows(gate, up, down, np.ones(30, np.int64), x, np.arange(30))
    many = glu.many_rows(gate, up, down, 1, x)
    np.testing.assert_allclose(many, few, rtol=1e-3, atol=1e-3 * np.abs(few).max())


def test_wrong_arrays_or_slots_reach_the_product(stacks):
    w = stacks[1]
    assert product(w, 0, normal(0, w.shape[2])).shape == (0, 37)
    x, out = normal(40, w.shape[2]), np.empty((40, 37), np.float32)
    for slot in (-1, 5):
        with pytest.raises(IndexError, match=f"slot {slot} "):
            gemm.product(w, slot, x, out)
    for match, arguments in {
        "x is": (x.astype(np.float64), out),
        "out is": (x, out[:, :36]),
    }.items():
        with pytest.raises(ValueError, match=match):
            gemm.product(w, 0, *arguments)
    with pytest.raises(ValueError, match="out is"):
        gemm.product(w, 0, x, out, affine((5, 38, w.shape[2]), 4, 64, "bfloat16")[0])
