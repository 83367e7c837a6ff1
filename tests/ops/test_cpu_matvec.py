"""Tests the CPU kernels for few rows against float64, with MLX's own unpacked values.

The bits of a result must depend on nothing but its weights and its row of x.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

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
    run_dequantize,
    run_gate_up,
    run_matmul,
    run_matvec,
    unquantised,
)

from flashmoe.ops.cpu import matvec


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_quantised_format_is_unpacked_and_multiplied(bits, group_size, dtype):
    # Rows of one group, of odd numbers of groups and of full vectors, for matrices of any height.
    for height, groups in ((1, 1), (19, 3), (5, 16), (2, 19)):
        w, values = quantised((2, height, groups * group_size), bits, group_size, dtype)
        unpacked = run_dequantize(w, 1)
        if dtype == "float32":  # MLX and the kernel may round scale * q differently
            np.testing.assert_allclose(unpacked, values[1], rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(unpacked, values[1])
        x = normal(3, w.shape[2])
        assert_product(run_matvec(w, [1], x, [2]), values[1], x[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unquantised_matrix_is_unpacked_and_multiplied(dtype):
    for height, width in itertools.product((1, 3, 33), (1, 17, 32, 100)):
        w, values = unquantised((2, height, width), dtype)
        np.testing.assert_array_equal(run_dequantize(w, 1), values[1])
        for count in (1, 6, 40):
            x = normal(count, width)
            assert_product(run_matmul(w, 1, x), values[1], x)


def assert_alone(w, up=None):
    """Assert that pairs have the same bits in one call, in full and partial tiles, as alone."""
    slots = [0] * 5 + [1] + [2] * 8 + [1] * 3
    x = normal(9, w.shape[2])
    rows = np.random.default_rng(2).integers(0, 9, len(slots)).tolist()
    together = run_matvec(w, slots, x, rows) if up is None else run_gate_up(w, up, slots, x, rows)
    for p, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        single = (
            run_matvec(w, [slot], x, [row]) if up is None else run_gate_up(w, up, [slot], x, [row])
        )
        np.testing.assert_array_equal(together[p], single[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_bits_of_a_pair_do_not_depend_on_its_neighbours(bits, group_size):
    # Full and partial vectors of inputs and steps of groups, for one matrix row and several.
    dtype = DTYPES[(bits + group_size // 32) % 3]
    for height, groups in ((19, 3), (1, 16), (3, 37)):
        assert_alone(quantised((3, height, groups * group_size), bits, group_size, dtype)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_an_unquantised_pair_do_not_depend_on_its_neighbours(dtype):
    for height, width in ((3, 1), (19, 100), (2, 1024), (17, 2500)):
        assert_alone(unquantised((3, height, width), dtype)[0])


def test_bits_of_a_gated_pair_do_not_depend_on_its_neighbours():
    up = quantised((3, 37, 2240), 8, 32, "float16", seed=1)[0]
    assert_alone(quantised((3, 37, 2240), 4, 64, "bfloat16")[0], up)
    rounding = dataclasses.replace(up, activations="int8")
    assert_alone(quantised((3, 37, 2240), 4, 64, "bfloat16")[0], rounding)
    assert_alone(rounding, rounding)


def test_each_float16_is_widened_exactly():
    """These are all 65536 values: subnormals, infinities and NaN too."""
    raw = np.arange(2**16, dtype=np.uint16)
    w = matvec.Packed(raw.view(np.uint8).reshape(1, 16, -1), None, None, 16, 0, "float16")
    values = raw.view(np.float16).astype(np.float32).reshape(16, -1)
    np.testing.assert_array_equal(run_dequantize(w, 0), values)
    tiny = raw[:1024].reshape(1, 32, 32)
    w = matvec.Packed(tiny.view(np.uint8), None, None, 16, 0, "float16")
    x = np.zeros((1, 32), np.float32)
    for i in range(32):
        x[:] = 0
        x[0, i] = 1
        np.testing.assert_array_equal(run_matvec(w, [0], x, [0])[0], tiny.view(np.float16)[0, :, i])


@pytest.mark.parametrize("bits", BITS)
def test_each_weight_is_multiplied_with_its_own_input(bits):
    """One input is not zero at a time, so that no error can hide in a sum."""
    w, values = quantised((1, 3, 192), bits, 64, "bfloat16")
    out = run_matvec(w, [0] * 192, np.eye(192, dtype=np.float32), range(192))
    np.testing.assert_allclose(out, values[0].T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 70])
def test_matmul_computes_every_row(count):
    for height, width in ((1, 64), (40, 192), (1030, 128)):
        w, values = quantised((2, height, width), 4, 64, "bfloat16")
        x = normal(count, width)
        assert_product(run_matmul(w, 1, x), values[1], x)


@pytest.mark.parametrize(("gate_bits", "up_bits"), [(4, 4), (4, 6), (8, 3)])
def test_gate_up_is_silu_of_gate_times_up(gate_bits, up_bits):
    gate, gate_values = quantised((3, 21, 256), gate_bits, 64, "bfloat16")
    up, up_values = quantised((3, 21, 256), up_bits, 32, "bfloat16", seed=5)
    x = normal(2, 256)
    slots, rows = [2, 0, 1], [1, 0, 1]
    out = run_gate_up(gate, up, slots, x, rows)
    for p, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        g = gate_values[slot].astype(np.float64) @ x[row]
        expected = g / (1 + np.exp(-g)) * (up_values[slot].astype(np.float64) @ x[row])
        np.testing.assert_allclose(out[p], expected, rtol=2e-4, atol=2e-4)


def test_large_gate_does_not_overflow():
    gate, _ = quantised((1, 8, 64), 4, 64, "bfloat16")
    x = normal(1, 64) * 1000
    assert np.isfinite(run_gate_up(gate, gate, [0], x, [0])).all()


@pytest.fixture(scope="module")
def stacks():
    """Stacks in formats that fill vectors differently. Slot 4 has the bytes of slot 1."""
    stacks = [quantised((5, 37, 320), b, 64, "bfloat16")[0] for b in (3, 4)]
    stacks.append(unquantised((5, 37, 75), "bfloat16")[0])
    stacks.append(
        dataclasses.replace(quantised((5, 37, 320), 4, 64, "bfloat16")[0], activations="int8")
    )
    return repeat_a_slot(stacks)


@settings(max_examples=40)
@given(st.data())
def test_bits_of_a_result_do_not_depend_on_other_pairs(stacks, data):
    w = data.draw(st.sampled_from(stacks))
    count = data.draw(st.integers(1, 6), "rows of x")
    x = normal(count, w.shape[2])
    pair = st.tuples(st.integers(0, 4), st.integers(0, count - 1))
    pairs = data.draw(st.lists(pair, min_size=1, max_size=40))
    slots, rows = zip(*pairs, strict=True)
    out, gated = run_matvec(w, slots, x, rows), run_gate_up(w, w, slots, x, rows)
    for p, (slot, row) in enumerate(pairs):
        alone = {4: 1}.get(slot, slot)
        np.testing.assert_array_equal(out[p], run_matvec(w, [alone], x[row : row + 1], [0])[0])
        single = run_gate_up(w, w, [alone], x[row : row + 1], [0])[0]
        np.testing.assert_array_equal(gated[p], single)


@pytest.mark.skipif(os.cpu_count() < 2, reason="one CPU")
def test_bits_of_a_result_do_not_depend_on_threads(stacks):
    if numba.config.NUMBA_NUM_THREADS < 2:
        rerun_with_two_threads(__file__, "test_bits_of_a_result_do_not_depend_on_threads")
        return

    def results():
        for w in stacks:
            x = normal(40, w.shape[2])
            slots = np.arange(40) % 5
            yield run_matvec(w, slots, x, np.arange(40))
            yield run_gate_up(w, w, slots, x, np.arange(40))
            for count in (1, 7):
                yield run_matmul(w, 2, x[:count])

    several = list(results())
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = list(results())
    finally:
        numba.set_num_threads(before)
    for a, b in zip(several, one, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_pairs_and_no_rows_give_empty_results(stacks):
    w = stacks[1]
    assert run_matvec(w, [], normal(2, w.shape[2]), []).shape == (0, 37)
    assert run_matmul(w, 0, normal(0, w.shape[2])).shape == (0, 37)


@pytest.mark.parametrize(
    ("slots", "rows"), [([0, 5], [0, 0]), ([-1], [0]), ([0], [2]), ([0], [-1])]
)
def test_slot_or_row_out_of_range_raises_index_error(stacks, slots, rows):
    w = stacks[1]
    for run_one in (run_matvec, lambda w, *a: run_gate_up(w, w, *a)):
        with pytest.raises(IndexError, match=r"slot|row"):
            run_one(w, slots, normal(2, w.shape[2]), rows)


@pytest.mark.parametrize("slot", [-1, 5])
def test_unpacking_a_slot_out_of_range_raises_index_error(stacks, slot):
    for count in (1, 4, 40):
        with pytest.raises(IndexError, match=f"slot {slot} "):
            run_matmul(stacks[1], slot, normal(count, stacks[1].shape[2]))
    with pytest.raises(IndexError, match=f"slot {slot} "):
        run_dequantize(stacks[1], slot)


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
def test_inconsistent_stack_raises_value_error(change):
    w, _ = quantised((2, 3, 128), 4, 64, "bfloat16")
    with pytest.raises(ValueError, match=r"7 bits|size 16|float64|scales is|weight is"):
        dataclasses.replace(w, **change)


def test_arrays_of_wrong_dtype_or_shape_raise_value_error(stacks):
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
            matvec.matvec(w, *arguments)


def test_second_process_uses_the_kernels_that_the_first_compiled(tmp_path):
    """The first token waits for the compiler only once on a machine."""
    code = """if True:
        import numpy as np
        from flashmoe.ops.cpu import matvec, unpack
        w = matvec.Packed(np.zeros((1, 4, 32), np.uint8), *[np.zeros((1, 4, 1), np.uint16)] * 2,
                       4, 64, "bfloat16")
        zero, x, out = np.zeros(1, np.int64), np.ones((1, 64), np.float32), np.ones((1, 4), "f4")
        matvec.matvec(w, zero, x, zero, out)
        assert not out.any()
        kernel = unpack.block_kernel("dot", 4, 64, "bfloat16")
        print(kernel.cache_hits, *matvec._launch.stats.cache_hits.values())
    """
    core = Path(matvec.__file__).parents[3]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(core)}

    def hits():
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert hits().split() == ["0"]
    assert hits().split() == ["1", "1"]
