"""Tests the expert kernels, and their references in plain MLX, against float64."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from expert_problems import (
    IMPLEMENTATIONS,
    Case,
    Kind,
    combine_problem,
    down_problem,
    gate_up_problem,
    matvec_problem,
)
from launching import launched

from flashmoe_metal import kernel
from flashmoe_metal.down import CombineInputs, DownInputs, SharedExpertTerm, combine, down
from flashmoe_metal.matrix import Matrix, lanes

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32

MATVEC = {
    "4 bits": Case(),
    "2 bits": Case(Kind(2)),
    "3 bits": Case(Kind(3)),
    "5 bits": Case(Kind(5)),
    "6 bits": Case(Kind(6)),
    "8 bits": Case(Kind(8)),
    "groups of 32": Case(Kind(group=32)),
    "groups of 128": Case(Kind(group=128)),
    "scales of f16": Case(Kind(dtype=F16)),
    "scales of f32": Case(Kind(dtype=F32)),
    "bf16": Case(Kind(0)),
    "f16": Case(Kind(0, dtype=F16)),
    "f32": Case(Kind(0, dtype=F32)),
    "x of f16": Case(dtype=F16),
    "x of f32": Case(dtype=F32),
    "one group": Case(out=1, columns=64 * 8),
    "3 chunks": Case(Kind(group=32), out=9, columns=96),
    "15 chunks": Case(Kind(group=32), out=33, columns=480),
    "24 chunks": Case(out=5, columns=768),
    "one row": Case(rows=1),
    "16 rows": Case(rows=16),
}

GATE_UP = {
    "4 bits": Case(),
    "one of one expert": Case(Kind(2, dtype=F32), 1, 9, 64, F32, top_k=1, slots=1),
    "3 chunks": Case(Kind(3, 32, F16), 3, 37, 96, F16, top_k=3),
    "24 chunks": Case(Kind(5, 128), 2, 5, 768, top_k=8, slots=16),
    "15 chunks": Case(Kind(6, 32), 2, 33, 480),
    "8 bits": Case(Kind(8), columns=64),
    "bf16": Case(Kind(0)),
    "f16": Case(Kind(0, dtype=F16), dtype=F16),
    "f32": Case(Kind(0, dtype=F32), dtype=F32),
    "a wider shared one": Case(shared=Kind(8, 32, F32), shared_size=99, dtype=F32),
    "a narrower shared one": Case(Kind(3, 128), shared=Kind(0), shared_size=8),
    "16 rows": Case(rows=16),
}

DOWN = {
    "4 bits": Case(),
    "one of one expert": Case(Kind(2, dtype=F32), 1, 9, 64, F32, top_k=1, slots=1),
    "3 chunks": Case(Kind(3, 32, F16), 3, 37, 96, F16, top_k=3, residual=F16),
    "24 chunks": Case(Kind(5, 128), 2, 5, 768, top_k=8, slots=16, residual=BF16),
    "15 chunks": Case(Kind(6, 32), 2, 33, 480, F32, residual=BF16),
    "8 bits": Case(Kind(8), columns=64, shared=Kind(4, 32), shared_size=96, residual=BF16),
    "bf16": Case(Kind(0), shared=Kind(0, dtype=F16), gate=F16),
    "f16": Case(Kind(0, dtype=F16), dtype=F16, shared=Kind(6, dtype=F32), gate=F32),
    "f32": Case(Kind(0, dtype=F32), dtype=F32),
    "17 of 17 experts": Case(top_k=17, slots=17),
    "16 and a shared one": Case(top_k=16, slots=20, shared=Kind(8), residual=BF16),
    "16 rows": Case(rows=16),
}

how = pytest.mark.parametrize("how", IMPLEMENTATIONS)


def each(cases):
    """Parametrise a test by cases and their names."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


@how
@each(MATVEC)
def test_matvec_equals_float64_within_rounding(case, how, on_device):
    matvec_problem(case).check(how)


@how
@each(GATE_UP)
def test_gate_up_equals_float64_within_rounding(case, how, on_device):
    gate_up_problem(case).check(how)


@how
@each(DOWN)
def test_down_equals_float64_within_rounding(case, how, on_device):
    down_problem(case).check(how)


@how
@each({name: DOWN[name] for name in ("4 bits", "one of one expert", "3 chunks", "bf16", "8 bits")})
def test_combine_equals_float64_within_rounding(case, how, on_device):
    combine_problem(replace(case, out=300)).check(how)


@each(
    {
        "one of one expert": DOWN["one of one expert"],
        "24 chunks": DOWN["24 chunks"],
        "a shared one of other lanes": Case(
            Kind(4, 32), columns=480, shared=Kind(8, 32), shared_size=96, dtype=F32
        ),
        "plain": Case(Kind(0), dtype=F32, shared=Kind(0, dtype=F16), residual=F16),
    }
)
def test_down_equals_combine_of_separate_terms_bit_for_bit(case, on_device):
    problem = down_problem(case)
    (inputs,) = problem.arguments
    h, slots, scores, matrix, dtype, shared, residual, _ = inputs
    order = np.random.default_rng(1).permutation(slots.size)
    pairs = mx.array(order)
    ones = mx.ones((slots.size, 1))
    terms = down(DownInputs(h[pairs], slots.reshape(-1, 1)[pairs], ones, matrix, F32))
    places = mx.array(np.argsort(order).astype(np.uint32)).reshape(slots.shape)
    term = None
    if shared:
        own = shared.down
        weight, *rest = (x[None] for x in own.arrays)
        stack = Matrix(weight, *rest, own.bits, own.group_size) if own.bits < 16 else Matrix(weight)
        rows = case.rows
        slots, ones = mx.zeros((rows, 1), mx.uint32), mx.ones((rows, 1))
        team = lanes(matrix.columns)
        values = down(DownInputs(shared.h, slots, ones, stack, F32, team=team))
        term = SharedExpertTerm(values, shared.gate, shared.column)
    combined = combine(CombineInputs(terms, places, scores, dtype, term, residual))
    assert mx.array_equal(combined, down(inputs))


@pytest.mark.skipif(kernel.available(), reason="a GPU chooses the order")
@pytest.mark.parametrize(
    "problem",
    [
        matvec_problem(MATVEC["24 chunks"]),
        gate_up_problem(GATE_UP["a wider shared one"]),
        down_problem(DOWN["8 bits"]),
        combine_problem(replace(DOWN["8 bits"], out=300)),
    ],
    ids=lambda p: p.name,
)
def test_result_does_not_depend_on_the_order_of_lanes(problem):
    results = []
    for seed in (0, 1, 2):
        with launched(seed=seed):
            results.append(problem.call())
    for first, *others in zip(*results, strict=True):
        assert all(mx.array_equal(first, other) for other in others)


FITS = {"bits": 4, "group": 64, "rows": 8, "columns": 128}


def reason(*, bits: int, group: int, rows: int, columns: int) -> str | None:
    weight = mx.zeros((rows, columns * bits // 32), mx.uint32)
    scales = mx.zeros((rows, max(columns // group, 1)))
    return Matrix(weight, scales, scales, bits, group).reason()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantised_matrix_is_supported(bits, group):
    assert reason(**FITS | {"bits": bits, "group": group}) is None


def test_scales_of_another_quantisation_mode_are_refused():
    weight, scales = mx.zeros((8, 16), mx.uint32), mx.zeros((8, 4), mx.uint8)
    assert "scales of" in Matrix(weight, scales, None, 4, 32).reason()
    assert "no biases" in Matrix(weight, scales.astype(BF16), None, 4, 32).reason()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_unquantised_matrix_is_supported(dtype):
    assert Matrix(mx.zeros((8, 32), dtype)).reason() is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"bits": 1}, "1 bits"),
        ({"bits": 7, "columns": 224, "group": 32}, "7 bits"),
        ({"group": 16}, "groups of 16"),
        ({"group": 256, "columns": 256}, "groups of 256"),
        ({"columns": 192, "group": 128}, "192 columns are not a multiple of 128"),
        ({"columns": 80, "group": 32, "bits": 2}, "80 columns are not a multiple of 32"),
        ({"rows": 7, "columns": 32, "group": 32}, "7 x 32 is too small"),
        ({"rows": 7, "columns": 64}, "7 x 64 is too small"),
    ],
)
def test_matrix_that_no_kernel_can_read_is_refused(changed, why):
    assert why in reason(**FITS | changed)


def test_very_small_unquantised_matrix_is_refused():
    assert "too small" in Matrix(mx.zeros((7, 32))).reason()
