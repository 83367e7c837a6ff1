"""Tests the CPU kernel for many rows against float64.

The bits of a row must depend on nothing but the weights and the values of the row.
"""

import itertools
import os

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matvec_problems import (
    BITS,
    DTYPES,
    GROUPS,
    assert_product,
    normal,
    quantised,
    repeat_a_slot,
    rerun_with_two_threads,
    unquantised,
)

from flashmoe.ops.cpu import gemm, matvec, swiglu

ROWS = (1, 2, 3, 5, 7, 13, 21, 40, 51)
HEIGHTS = (1, 5, 17, 40)


def product(w, slot, x, up=None):
    """Return x @ w[slot].T; with `up`, its silu times x @ up[slot].T."""
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    gemm.product(w, slot, x, out, up)
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_equals_float64_for_each_quantised_format(bits, group_size, dtype):
    # Rows of one group, of some groups, and of more columns than are unpacked at once.
    for height, groups in zip(HEIGHTS, (1, 3, 7, 2080 // group_size + 1), strict=True):
        w, values = quantised((2, height, groups * group_size), bits, group_size, dtype)
        x = normal(max(ROWS), w.shape[2])
        for rows in ROWS:
            assert_product(product(w, 1, x[:rows]), values[1], x[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_equals_float64_for_unquantised_weights(dtype):
    for height, width in itertools.product(HEIGHTS, (1, 17, 32, 100, 1023, 1024, 1025, 2100)):
        w, values = unquantised((2, height, width), dtype)
        x = normal(max(ROWS), width)
        for rows in ROWS:
            assert_product(product(w, 1, x[:rows]), values[1], x[:rows])


def test_memory_after_the_last_input_does_not_count():
    """The kernel pads x with zeros. Zero times an infinity that was left there would be NaN."""
    values = np.full((1, 17, 1030), np.inf, np.float32)
    w = matvec.Packed(values.view(np.uint8), None, None, 32, 0, "float32")
    assert np.isinf(product(w, 0, np.ones((5, 1030), np.float32))).all()


def test_row_of_nan_does_not_reach_other_rows(stacks):
    x = normal(7, stacks[1].shape[2])
    whole = product(stacks[1], 1, x)
    x[2] = np.nan
    out = product(stacks[1], 1, x)
    assert np.isnan(out[2]).all()
    np.testing.assert_array_equal(np.delete(out, 2, axis=0), np.delete(whole, 2, axis=0))


@pytest.fixture(scope="module")
def stacks():
    """Stacks of several formats. Slot 4 has the bytes of slot 1."""
    stacks = [quantised((5, 37, 1344), b, 64, "bfloat16")[0] for b in (3, 4)]
    stacks += [
        unquantised((5, 37, 1075), "bfloat16")[0],
        quantised((5, 21, 320), 8, 32, "float16")[0],
    ]
    return repeat_a_slot(stacks)


@settings(max_examples=60)
@given(st.data())
def test_bits_of_a_row_do_not_depend_on_other_rows(stacks, data):
    w = data.draw(st.sampled_from(stacks))
    up = data.draw(st.sampled_from([None, w]))
    x = normal(70, w.shape[2])
    whole = product(w, 1, x, up)
    rows = data.draw(st.lists(st.integers(0, 69), min_size=1, max_size=60))
    slot = data.draw(st.sampled_from([1, 4]))
    np.testing.assert_array_equal(product(w, slot, x[rows], up), whole[rows])


def test_bits_of_a_result_do_not_depend_on_other_matrix_rows(stacks):
    """Neither does a result depend on the position of its matrix row."""
    w = stacks[1]
    x = normal(7, w.shape[2])
    whole = product(w, 1, x)
    for first, last in ((1, 37), (5, 6), (17, 36)):
        parts = (np.ascontiguousarray(a[:, first:last]) for a in (w.weight, w.scales, w.biases))
        part = matvec.Packed(*parts, 4, 64, "bfloat16")
        np.testing.assert_array_equal(product(part, 1, x), whole[:, first:last])


@pytest.mark.skipif(os.cpu_count() < 2, reason="one CPU")
def test_bits_of_a_product_do_not_depend_on_threads(stacks):
    if numba.config.NUMBA_NUM_THREADS < 2:
        rerun_with_two_threads(__file__, "test_bits_of_a_product_do_not_depend_on_threads")
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
def test_product_with_up_is_silu_of_gate_times_up(gate_bits, up_bits):
    def stack(bits, seed):
        shape = (2, 21, 1152)
        if bits == 16:
            return unquantised(shape, "bfloat16", seed)
        return quantised(shape, bits, 32 if seed else 64, "bfloat16", seed)

    (gate, gate_values), (up, up_values) = stack(gate_bits, 0), stack(up_bits, 5)
    x = normal(7, 1152) / 8
    g = x.astype(np.float64) @ gate_values[1].T
    expected = g / (1 + np.exp(-g)) * (x @ up_values[1].T.astype(np.float64))
    np.testing.assert_allclose(product(gate, 1, x, up), expected, rtol=2e-4, atol=2e-4)
    assert np.isfinite(product(gate, 1, x * 10000, up)).all()


def test_many_rows_and_few_rows_compute_the_same_mlp():
    gate, up = (quantised((2, 96, 256), 4, 64, "bfloat16", seed=s)[0] for s in (0, 1))
    down, _ = quantised((2, 256, 96), 4, 32, "bfloat16", seed=2)
    x = normal(30, 256)
    matrices = swiglu.MlpMatrices(gate, up, down)
    few = swiglu.few_rows(matrices, np.ones(30, np.int64), x, np.arange(30))
    many = swiglu.many_rows(matrices, 1, x)
    np.testing.assert_allclose(many, few, rtol=1e-3, atol=1e-3 * np.abs(few).max())


def test_wrong_arrays_and_slots_raise(stacks):
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
        gemm.product(w, 0, x, out, quantised((5, 38, w.shape[2]), 4, 64, "bfloat16")[0])
