"""The router's kernel, and what computes the same in plain MLX, against float64."""

import mlx.core as mx
import numpy as np
import pytest
from expert_problems import HOW, router_problem
from launching import launched

from flashmoe_metal import kernel

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
SIZES = [(512, 10), (60, 4), (7, 7), (40, 36), (128, 8), (1, 1)]

how = pytest.mark.parametrize("how", HOW)


@how
@pytest.mark.parametrize("logits", ["ties", "equal", "none"])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_choice_differs_from_the_end_of_a_stable_sort(experts, top_k, logits, how, on_device):
    router_problem(experts, top_k, logits=logits).check(how)


@how
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_differ_from_softmax(dtype, normalise, how, on_device):
    router_problem(60, 4, dtype=dtype, normalise=normalise).check(how)


@how
@pytest.mark.parametrize("experts", [7, 32, 40])
def test_columns_after_the_experts_are_looked_at(experts, how, on_device):
    for logits in ("ties", "none"):
        router_problem(experts, 6, more=5, logits=logits).check(how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_kernel_chooses_others_than_mlx(dtype, rows, on_device):
    """Of random logits, where no rounding can change the order."""
    logits = np.random.default_rng(0).permuted(np.tile(np.arange(60) / 8, (rows, 1)), axis=1)
    arguments = mx.array(logits.astype(np.float32)).astype(dtype), 8
    found, expected = (
        HOW[how].router(*arguments, experts=60, normalise=True) for how in ("kernel", "twin")
    )
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=2**-7)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_no_numbers_give_an_expert_twice_or_none(bad, count, dtype, on_device):
    logits = np.zeros((2, 40), np.float32)
    logits[1, 5 : 5 + count] = bad
    logits[1, :count] = bad
    indices, _ = HOW["kernel"].router(
        mx.array(logits).astype(dtype), 36, experts=40, normalise=True
    )
    for row in np.array(indices):
        assert len(set(row)) == 36
        assert row.max() < 40


@pytest.mark.skipif(kernel.available(), reason="a GPU has an order of its own")
def test_order_of_lanes_changes_the_choice():
    problem = router_problem(60, 4)
    results = []
    for seed in (0, 1, 2):
        with launched(seed=seed):
            results.append(problem.call())
    for first, *others in zip(*results, strict=True):
        assert all(mx.array_equal(first, other) for other in others)
