"""Tests products with activations that are rounded to int8.

The integers must be exact, and every instruction must give the same ones.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from matvec_problems import normal, quantised, run_gate_up, run_matmul, run_matvec, unquantised

from flashmoe.ops.cpu import int8, matvec

FORMATS = [(b, g) for b in (2, 4, 8) for g in (32, 64, 128) if int8.supports(b, g)]
# (matrix rows, groups): rows of one group, of odd numbers of groups and of full steps.
SHAPES = ((1, 1), (19, 3), (5, 16), (2, 19))


def rounded(w):
    """Return a stack whose products round x to int8."""
    return dataclasses.replace(w, activations="int8")


def as_int8(x, group_size):
    """Round x by the definition.

    Returns:
        The integers (rows, groups, group_size) and the scales (rows, groups, 1).
    """
    groups = x.reshape(len(x), -1, group_size)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.float32(127) / largest
    return np.rint(groups * inverse).astype(np.int64), largest / np.float32(127)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_product_equals_float64_of_the_rounded_inputs(bits, group_size, dtype):
    for height, groups in SHAPES:
        w, values = quantised((2, height, groups * group_size), bits, group_size, dtype)
        x = normal(3, w.shape[2])
        q, scales = as_int8(x, group_size)
        exact = (q * scales.astype(np.float64)).reshape(x.shape)
        expected = exact @ values[1].astype(np.float64).T
        size = np.abs(exact) @ np.abs(values[1]).astype(np.float64).T
        out = run_matvec(rounded(w), [1] * 3, x, range(3))
        assert np.max(np.abs(out - expected) / size) < 1e-6


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_integer_sums_are_exact(bits, group_size):
    """With scale 1, bias 0 and one group of x at a time, the results are equal, not just near.

    The largest values are among them.
    """
    rng = np.random.default_rng(bits)
    for height, groups in SHAPES:
        width = groups * group_size
        q = rng.integers(0, 2**bits, (height, width)).astype(np.uint8)
        q[0] = 2**bits - 1
        stream = np.unpackbits(q[..., None], axis=2, bitorder="little")[..., :bits]
        weight = np.packbits(stream.reshape(1, height, -1), axis=2, bitorder="little")
        ones = np.ones((1, height, groups), np.float32)
        w = matvec.Packed(weight, ones, 0 * ones, bits, group_size, "float32", "int8")
        x = rng.integers(-127, 128, (2, groups, group_size))
        x[0], x[:, :, 0] = 127, -127
        alone = (np.eye(groups, dtype=int)[..., None] * x[:, None]).reshape(-1, width)
        outputs = run_matvec(w, [0] * len(alone), alone.astype(np.float32), range(len(alone)))
        assert (outputs == alone @ q.T.astype(int)).all()


def kernel_result(how, w, x):
    """Return x @ w[0].T by the kernel of one instruction."""
    weight, scales, biases, _, _, n = w.location
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    kernel = int8.dot_kernel(w.bits, w.group_size, w.dtype, how).ctypes
    for row, to in zip(int8.quantised(x, w.bits, w.group_size), out, strict=True):
        kernel(weight, scales, biases, row.ctypes.data, w.shape[1], n, to.ctypes.data)
    return out


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_every_instruction_gives_the_same_bits(bits, group_size):
    for height, groups in SHAPES:
        w, _ = quantised((1, height, groups * group_size), bits, group_size, "bfloat16")
        x = normal(2, w.shape[2])
        outputs = kernel_result("plain", w, x)
        np.testing.assert_array_equal(outputs, run_matvec(rounded(w), [0, 0], x, [0, 1]))
        np.testing.assert_array_equal(outputs, kernel_result(int8.instruction(), w, x))


@pytest.mark.parametrize(
    ("features", "how"),
    [
        ("+avx2,+fma", "avx2"),
        ("+avx2,+avx512vnni,-avx512vl", "avx2"),
        ("+avx2,+avx512vl,+avx512vnni", "vnni"),
        ("+avxvnni,+avx2", "vnni"),
        ("+neon,+dotprod", "dotprod"),
        ("+neon,-dotprod", "plain"),
        ("-avx2,-avxvnni", "plain"),
        ("", "plain"),
    ],
)
def test_fastest_instruction_of_the_cpu_is_chosen(features, how):
    assert int8.fastest(features) == how


@pytest.mark.parametrize(
    ("target", "features", "how", "instruction"),
    [
        ("x86_64", "+avx2,+fma", "avx2", "vpmaddubsw"),
        ("x86_64", "+avx512f,+avx512bw,+avx512vl,+avx512vnni", "vnni", "vpdpbusd"),
        ("x86_64", "+avx2,+fma,+avxvnni", "vnni", "{vex}"),
        ("aarch64", "+neon,+dotprod", "dotprod", "sdot"),
        ("x86_64", "", "plain", "cvtdq2ps"),
        ("aarch64", "+neon", "plain", "scvtf"),
    ],
)
def test_kernel_compiles_for_each_cpu(target, features, how, instruction):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = f"{target}-unknown-linux-gnu"
    try:
        machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
    except RuntimeError:
        pytest.skip(f"this LLVM has no {target}")
    for bits, group_size in FORMATS:
        module = ir.Module()
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 6)
        function = ir.Function(module, kind, "dot")
        builder = ir.IRBuilder(function.append_basic_block())
        int8.emit_dot(builder, (bits, group_size, "bfloat16", how), *function.args)
        builder.ret_void()
        parsed = llvm.parse_assembly(str(module))
        parsed.triple = triple
        parsed.verify()
        assert instruction in machine.emit_assembly(parsed), (bits, group_size)


@pytest.mark.slow
def test_cached_kernel_is_not_used_on_another_cpu(tmp_path):
    code = """if True:
        import numpy as np
        from flashmoe.ops.cpu import int8, matvec
        w = matvec.Packed(np.full((1, 4, 32), 1, np.uint8), *[np.ones((1, 4, 1), "f4")] * 2,
                          4, 64, "float32", "int8")
        zero, x, out = np.zeros(1, np.int64), np.ones((1, 64), np.float32), np.ones((1, 4), "f4")
        matvec.matvec(w, zero, x, zero, out)
        how = int8.instruction()
        print(how, int8.dot_kernel(4, 64, "float32", how).cache_hits, *out[0])
    """
    core = Path(matvec.__file__).parents[3]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(core)}
    bare = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}

    def result(**more):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True)
        how, hits, *values = done.stdout.split()
        return how, int(hits), values

    how, hits, values = result()
    assert result() == (how, 1, values)
    assert hits == 0
    assert result(**bare) == ("plain", 0, values)
    assert result(**bare) == ("plain", 1, values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_of_rounding_is_below_one_percent(bits):
    w, _ = quantised((1, 512, 4096), bits, 64, "bfloat16")
    x = normal(4, 4096)
    exact, approximate = (run_matvec(m, [0] * 4, x, range(4)) for m in (w, rounded(w)))
    error = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 8e-3


def test_formats_without_a_kernel_and_many_rows_are_not_rounded():
    """These formats have no kernel, and products of many rows are a prefill."""
    stacks = [quantised((2, 9, 128), b, 64, "bfloat16")[0] for b in (3, 5, 6)]
    stacks += [quantised((2, 9, 128), 2, 32, "bfloat16")[0], unquantised((2, 9, 75), "bfloat16")[0]]
    for w in stacks:
        x = normal(3, w.shape[2])
        assert not rounded(w).rounds_x
        np.testing.assert_array_equal(run_matmul(rounded(w), 1, x), run_matmul(w, 1, x))
    w, _ = quantised((2, 9, 128), 4, 64, "bfloat16")
    x = normal(matvec.INT8_ROWS + 1, 128)
    np.testing.assert_array_equal(run_matmul(rounded(w), 1, x), run_matmul(w, 1, x))
    assert (run_matmul(rounded(w), 1, x[:-1]) != run_matmul(w, 1, x[:-1])).any()


def test_gate_up_of_mixed_formats_equals_two_products():
    x = normal(2, 256)
    gate, up = (rounded(quantised((3, 21, 256), b, 64, "bfloat16", seed=b)[0]) for b in (4, 8))
    other = rounded(quantised((3, 21, 256), 3, 64, "bfloat16")[0])
    for a, b in ((gate, up), (gate, other), (other, up), (gate, gate)):
        g, u = (run_matvec(m, [2, 1], x, [1, 0]) for m in (a, b))
        expected = g / (1 + np.exp(-g)) * u
        np.testing.assert_allclose(run_gate_up(a, b, [2, 1], x, [1, 0]), expected, rtol=1e-5)


def test_group_of_zeros_gives_zero():
    w, values = quantised((1, 5, 192), 4, 64, "bfloat16")
    for tiny in (0, 1e-41, -1e-37):
        x = np.full((1, 192), tiny, np.float32)
        np.testing.assert_allclose(run_matvec(rounded(w), [0], x, [0]), 0, atol=1e-30)
        x[0, 64:128] = 1
        expected = values[0][:, 64:128].sum(axis=1)
        np.testing.assert_allclose(
            run_matvec(rounded(w), [0], x, [0])[0], expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row(bad):
    w, _ = quantised((1, 5, 192), 4, 64, "bfloat16")
    x = normal(2, 192)
    x[1, 100] = bad
    out = run_matvec(rounded(w), [0, 0], x, [0, 1])
    assert np.isfinite(out[0]).all()
    assert not np.isfinite(out[1]).any()
