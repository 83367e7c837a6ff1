"""Products with rounded activations: the integers are exact, and every instruction gives them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from test_cpu_matvec import affine, multiply, normal, plain, run, run_gate_up

from flashmoe.ops.cpu import int8
from flashmoe.ops.cpu import matvec as kernels

FORMATS = [(b, g) for b in (2, 4, 8) for g in (32, 64, 128) if int8.supports(b, g)]
# Rows of one group, of odd numbers of groups, and of whole steps; one matrix row and several.
SHAPES = ((1, 1), (19, 3), (5, 16), (2, 19))


def rounded(w):
    return dataclasses.replace(w, activations="int8")


def as_int8(x, group_size):
    """(values, scales) by the definition: (R, groups, group_size) and (R, groups, 1)."""
    groups = x.reshape(len(x), -1, group_size)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.float32(127) / largest
    return np.rint(groups * inverse).astype(np.int64), largest / np.float32(127)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_product_is_not_that_of_the_rounded_operands(bits, group_size, dtype):
    for height, groups in SHAPES:
        w, values = affine((2, height, groups * group_size), bits, group_size, dtype)
        x = normal(3, w.shape[2])
        q, scales = as_int8(x, group_size)
        exact = (q * scales.astype(np.float64)).reshape(x.shape)
        expected = exact @ values[1].astype(np.float64).T
        size = np.abs(exact) @ np.abs(values[1]).astype(np.float64).T
        out = run(rounded(w), [1] * 3, x, range(3))
        assert np.max(np.abs(out - expected) / size) < 1e-6


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_integers_are_summed_wrongly(bits, group_size):
    """Scale 1, bias 0, one group of x at a time, of the largest values too: equal, not near."""
    rng = np.random.default_rng(bits)
    for height, groups in SHAPES:
        width = groups * group_size
        q = rng.integers(0, 2**bits, (height, width)).astype(np.uint8)
        q[0] = 2**bits - 1
        stream = np.unpackbits(q[..., None], axis=2, bitorder="little")[..., :bits]
        weight = np.packbits(stream.reshape(1, height, -1), axis=2, bitorder="little")
        ones = np.ones((1, height, groups), np.float32)
        w = kernels.Packed(weight, ones, 0 * ones, bits, group_size, "float32", "int8")
        x = rng.integers(-127, 128, (2, groups, group_size))
        x[0], x[:, :, 0] = 127, -127
        alone = (np.eye(groups, dtype=int)[..., None] * x[:, None]).reshape(-1, width)
        found = run(w, [0] * len(alone), alone.astype(np.float32), range(len(alone)))
        assert (found == alone @ q.T.astype(int)).all()


def kernel_result(how, w, x):
    weight, scales, biases, _, _, n = w.place
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    kernel = int8.dot_kernel(w.bits, w.group_size, w.dtype, how).ctypes
    for row, to in zip(int8.quantised(x, w.bits, w.group_size), out, strict=True):
        kernel(weight, scales, biases, row.ctypes.data, w.shape[1], n, to.ctypes.data)
    return out


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_bits_depend_on_the_instruction(bits, group_size):
    for height, groups in SHAPES:
        w, _ = affine((1, height, groups * group_size), bits, group_size, "bfloat16")
        x = normal(2, w.shape[2])
        found = kernel_result("plain", w, x)
        np.testing.assert_array_equal(found, run(rounded(w), [0, 0], x, [0, 1]))
        np.testing.assert_array_equal(found, kernel_result(int8.instruction(), w, x))


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
def test_cpu_gets_an_instruction_that_it_lacks_or_a_slow_one(features, how):
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
def test_kernel_of_another_cpu_does_not_compile(target, features, how, instruction):
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


def test_kernel_in_the_cache_is_of_another_cpu(tmp_path):
    code = """if True:
        import numpy as np
        from flashmoe.ops import int8, kernels
        w = kernels.Packed(np.full((1, 4, 32), 1, np.uint8), *[np.ones((1, 4, 1), "f4")] * 2,
                           4, 64, "float32", "int8")
        zero, x, out = np.zeros(1, np.int64), np.ones((1, 64), np.float32), np.ones((1, 4), "f4")
        kernels.matvec(w, zero, x, zero, out)
        how = int8.instruction()
        print(how, int8.dot_kernel(4, 64, "float32", how).cache_hits, *out[0])
    """
    core = Path(kernels.__file__).parents[3]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(core)}
    bare = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}

    def found(**more):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True)
        how, hits, *values = done.stdout.split()
        return how, int(hits), values

    how, hits, values = found()
    assert found() == (how, 1, values)
    assert hits == 0
    assert found(**bare) == ("plain", 0, values)
    assert found(**bare) == ("plain", 1, values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_costs_more_than_it_should(bits):
    w, _ = affine((1, 512, 4096), bits, 64, "bfloat16")
    x = normal(4, 4096)
    exact, found = (run(m, [0] * 4, x, range(4)) for m in (w, rounded(w)))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 8e-3


def test_other_weights_are_rounded():
    """Formats without a kernel, and products of many rows, stay as they are."""
    same = [affine((2, 9, 128), b, 64, "bfloat16")[0] for b in (3, 5, 6)]
    same += [affine((2, 9, 128), 2, 32, "bfloat16")[0], plain((2, 9, 75), "bfloat16")[0]]
    for w in same:
        x = normal(3, w.shape[2])
        assert not rounded(w).rounds_x
        np.testing.assert_array_equal(multiply(rounded(w), 1, x), multiply(w, 1, x))
    w, _ = affine((2, 9, 128), 4, 64, "bfloat16")
    x = normal(kernels.INT8_ROWS + 1, 128)
    np.testing.assert_array_equal(multiply(rounded(w), 1, x), multiply(w, 1, x))
    assert (multiply(rounded(w), 1, x[:-1]) != multiply(w, 1, x[:-1])).any()


def test_gate_and_up_read_the_rows_of_each_other():
    x = normal(2, 256)
    gate, up = (rounded(affine((3, 21, 256), b, 64, "bfloat16", seed=b)[0]) for b in (4, 8))
    other = rounded(affine((3, 21, 256), 3, 64, "bfloat16")[0])
    for a, b in ((gate, up), (gate, other), (other, up), (gate, gate)):
        g, u = (run(m, [2, 1], x, [1, 0]) for m in (a, b))
        expected = g / (1 + np.exp(-g)) * u
        np.testing.assert_allclose(run_gate_up(a, b, [2, 1], x, [1, 0]), expected, rtol=1e-5)


def test_a_group_of_zeros_is_not_zero():
    w, values = affine((1, 5, 192), 4, 64, "bfloat16")
    for tiny in (0, 1e-41, -1e-37):
        x = np.full((1, 192), tiny, np.float32)
        np.testing.assert_allclose(run(rounded(w), [0], x, [0]), 0, atol=1e-30)
        x[0, 64:128] = 1
        expected = values[0][:, 64:128].sum(axis=1)
        np.testing.assert_allclose(run(rounded(w), [0], x, [0])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_infinity_is_lost(bad):
    w, _ = affine((1, 5, 192), 4, 64, "bfloat16")
    x = normal(2, 192)
    x[1, 100] = bad
    out = run(rounded(w), [0, 0], x, [0, 1])
    assert np.isfinite(out[0]).all()
    assert not np.isfinite(out[1]).any()
