"""Tests the CPU kernels of mxfp4, mxfp8 and nvfp4 against MLX's own values and float64."""

import mlx.core as mx
import numpy as np
import pytest
from matvec_problems import (
    assert_product,
    normal,
    packed_floats,
    run_dequantize,
    run_gate_up,
    run_matmul,
    run_matvec,
    small_floats,
)

from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.ops.cpu import small_floats as decoding
from flashmoe.ops.cpu.unpack import arrange, arrangement, block_kernel

# (matrix rows, columns / 32): partial and full vectors, odd numbers of groups.
SHAPES = ((1, 1), (19, 3), (5, 16), (2, 37))


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_each_mode_is_unpacked_and_multiplied(mode):
    for height, groups in SHAPES:
        w, values = small_floats((2, height, 32 * groups), mode)
        np.testing.assert_array_equal(run_dequantize(w, 1), values[1])
        for count in (1, 2, 3, 40):
            x = normal(count, w.shape[2])
            assert_product(run_matmul(w, 1, x), values[1], x)


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_each_weight_is_multiplied_with_its_own_input(mode):
    w, values = small_floats((1, 3, 160), mode)
    out = run_matvec(w, [0] * 160, np.eye(160, dtype=np.float32), range(160))
    np.testing.assert_array_equal(out, values[0].T)


def every_code(mode):
    """Return (weights, scales) of one stack of 256 rows: each row has all codes and one scale."""
    bits, group = FLOAT_MODES[mode].bits, FLOAT_MODES[mode].group_size
    codes = np.arange(256, dtype=np.uint8)
    if bits == 4:
        codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), 2)
    weight = np.broadcast_to(codes, (1, 256, codes.size)).copy()
    groups = codes.size * 8 // bits // group
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, groups)).copy()
    return weight, scales[None]


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_every_code_and_every_scale_is_what_mlx_makes_of_it(mode):
    """Denormals, infinities and NaN are among them."""
    weight, scales = every_code(mode)
    form = FLOAT_MODES[mode]
    expected = mx.dequantize(
        mx.array(weight).view(mx.uint32),
        mx.array(scales),
        group_size=form.group_size,
        bits=form.bits,
        mode=mode,
        dtype=mx.float32,
    )
    out = run_dequantize(packed_floats(weight, scales, mode), 0)
    np.testing.assert_array_equal(out, np.array(expected)[0])


#: Ways to decode that this CPU has.
WAYS = {"plain", decoding.decoder()} | ({"avx2"} if decoding.decoder() == "avx512" else set())


def run_kernel(op, w, how, x, row):
    """Return what the kernel of one way writes for all rows of w[0], `row` values each."""
    kernel = block_kernel(op, w.bits, w.group_size, w.dtype, how)
    out = np.zeros((w.shape[1], row), np.float32)
    n = w.shape[2] // w.group_size
    kernel.ctypes(*w.location[:3], x.ctypes.data, w.shape[1], n, out.ctypes.data)
    return out


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_every_way_to_decode_gives_the_same_values(mode):
    w = packed_floats(*every_code(mode), mode)
    plain, *others = (run_kernel("unpack", w, how, np.zeros(1), w.shape[2]) for how in sorted(WAYS))
    for other in others:
        np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize("mode", FLOAT_MODES)
@pytest.mark.parametrize("how", sorted(WAYS))
def test_products_by_every_way_to_decode_are_those_of_float64(mode, how):
    for height, groups in SHAPES:
        w, values = small_floats((1, height, 32 * groups), mode)
        x = arranged = normal(1, w.shape[2])
        if w.bits == 4:
            index, factor, sums = arrangement(4, w.group_size, w.shape[2] // w.group_size, how)
            arranged = np.empty((1, index.size), np.float32)
            arrange(x, index, factor, sums, arranged)
        assert_product(run_kernel("dot", w, how, arranged, 1).T, values[0], x)


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_bits_of_a_pair_do_not_depend_on_its_neighbours(mode):
    for height, groups in ((19, 3), (1, 16), (3, 150)):
        w, _ = small_floats((3, height, 32 * groups), mode)
        slots = [0] * 5 + [1] + [2] * 8 + [1] * 3
        x = normal(9, w.shape[2])
        rows = np.random.default_rng(2).integers(0, 9, len(slots)).tolist()
        together, gated = run_matvec(w, slots, x, rows), run_gate_up(w, w, slots, x, rows)
        for p, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            np.testing.assert_array_equal(together[p], run_matvec(w, [slot], x, [row])[0])
            np.testing.assert_array_equal(gated[p], run_gate_up(w, w, [slot], x, [row])[0])


@pytest.mark.parametrize(
    ("features", "machine", "expected"),
    [
        ("+avx2,+f16c,+avx512f", "x86_64", "avx512"),
        ("+avx2,+f16c,-avx512f", "x86_64", "avx2"),
        ("+avx2,-f16c", "x86_64", "plain"),
        ("+sse2", "x86_64", "plain"),
        ("+neon", "arm64", "half"),
    ],
)
def test_the_fastest_way_that_a_cpu_has_is_chosen(features, machine, expected):
    assert decoding.fastest(features, machine) == expected
