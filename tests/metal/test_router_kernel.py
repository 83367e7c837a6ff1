"""Tests the router's kernel, and its reference in plain MLX, against float64."""

import mlx.core as mx
import numpy as np
import pytest
from expert_problems import IMPLEMENTATIONS, router_problem
from launching import launched

from flashmoe_metal import kernel

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
SIZES = [(512, 10), (60, 4), (7, 7), (40, 36), (128, 8), (1, 1)]

how = pytest.mark.parametrize("how", IMPLEMENTATIONS)


@how
@pytest.mark.parametrize("logits", ["ties", "equal", "none"])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_choice_is_the_end_of_a_stable_sort(experts, top_k, logits, how, on_device):
    router_problem(experts, top_k, logits=logits).check(how)


@how
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_equal_softmax(dtype, normalise, how, on_device):
    router_problem(60, 4, dtype=dtype, normalise=normalise).check(how)


@how
@pytest.mark.parametrize("experts", [7, 32, 40])
def test_columns_after_the_experts_are_ignored(experts, how, on_device):
    for logits in ("ties", "none"):
        router_problem(experts, 6, more=5, logits=logits).check(how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_kernel_and_reference_choose_the_same_experts(dtype, rows, on_device):
    """The random logits are so far apart that no rounding can change their order."""
    logits = np.random.default_rng(0).permuted(np.tile(np.arange(60) / 8, (rows, 1)), axis=1)
    arguments = mx.array(logits.astype(np.float32)).astype(dtype), 8
    outputs, expected = (
        IMPLEMENTATIONS[how].router(*arguments, experts=60, normalise=True)
        for how in ("kernel", "reference")
    )
    np.testing.assert_array_equal(outputs[0], expected[0])
    np.testing.assert_allclose(outputs[1], expected[1], rtol=2**-7)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinite_logits_give_distinct_valid_experts(bad, count, dtype, on_device):
    logits = np.zeros((2, 40), np.float32)
    logits[1, 5 : 5 + count] = bad
    logits[1, :count] = bad
    indices, _ = IMPLEMENTATIONS["kernel"].router(
        mx.array(logits).astype(dtype), 36, experts=40, normalise=True
    )
    for row in np.array(indices):
        assert len(set(row)) == 36
        assert row.max() < 40


@pytest.mark.skipif(kernel.available(), reason="a GPU chooses the order")
def test_choice_does_not_depend_on_the_order_of_lanes():
    problem = router_problem(60, 4)
    results = []
    for seed in (0, 1, 2):
        with launched(seed=seed):
            results.append(problem.call())
    for first, *others in zip(*results, strict=True):
        assert all(mx.array_equal(first, other) for other in others)
