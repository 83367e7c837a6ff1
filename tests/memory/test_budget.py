"""Tests the split of a memory budget into the parts of a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import BudgetError
from flashmoe.memory.budget import split_budget
from flashmoe.memory.system import available
from flashmoe.sizes import parse_size

GB = 10**9

MODEL = {
    "base": 200_000_000,
    "dense": 1_200_000_000,
    "working": 800_000_000,
    "layer_slot_nbytes": [7_077_888] * 60,
    "num_experts": 512,
    "minimum": 12,
}


def test_budget_is_filled_with_slots():
    plan = split_budget(budget=20 * GB, slots=None, **MODEL)
    slot_of_each_layer = 60 * 7_077_888
    assert plan.slots_per_layer == (20 * GB - 2_200_000_000) // slot_of_each_layer == 41
    assert plan.slots_nbytes == 41 * slot_of_each_layer
    assert plan.total == 2_200_000_000 + 41 * slot_of_each_layer <= 20 * GB
    assert plan.describe() == (
        "memory 19.6 GB of 20.0 GB: program 200.0 MB + dense weights 1.2 GB + working memory "
        "800.0 MB + 41 slots x 60 layers x 7.1 MB"
    )


def test_slots_are_at_most_the_number_of_experts():
    assert split_budget(budget=1000 * GB, slots=None, **MODEL).slots_per_layer == 512
    assert split_budget(budget=None, slots=1000, **MODEL).slots_per_layer == 512


def test_slots_of_layers_of_different_sizes_are_summed():
    plan = split_budget(budget=None, slots=20, **MODEL | {"layer_slot_nbytes": [10, 3, 5]})
    assert plan.slots_nbytes == 20 * 18
    assert plan.total == plan.budget == 2_200_000_000 + 360


def test_given_number_of_slots_is_kept():
    assert split_budget(budget=None, slots=13, **MODEL).slots_per_layer == 13
    assert split_budget(budget=900 * GB, slots=13, **MODEL).slots_per_layer == 13


def test_too_small_a_budget_is_refused_with_the_least_one():
    with pytest.raises(BudgetError) as caught:
        split_budget(budget=2 * GB, slots=None, **MODEL)
    assert str(caught.value) == (
        "memory 2.0 GB is too small: this model needs at least 7.3 GB (program 200.0 MB + dense "
        "weights 1.2 GB + working memory 800.0 MB + 12 slots x 60 layers x 7.1 MB); pass "
        'memory="7.3GB" or more, or fewer experts with experts=K'
    )


@given(
    dense=st.integers(0, 10**11),
    layers=st.lists(st.integers(1, 10**8), min_size=1, max_size=5),
    minimum=st.integers(1, 40),
)
def test_advised_budget_is_enough(dense, layers, minimum):
    model = MODEL | {"dense": dense, "layer_slot_nbytes": layers, "minimum": minimum}
    with pytest.raises(BudgetError) as caught:
        split_budget(budget=1, slots=None, **model)
    advice = str(caught.value).split('memory="')[1].split('"')[0]
    assert split_budget(budget=parse_size(advice), slots=None, **model).slots_per_layer >= minimum


def test_too_few_slots_are_refused():
    with pytest.raises(BudgetError, match="11 slots per layer are too few.* at least 12; pass "):
        split_budget(budget=None, slots=11, **MODEL)


def test_slots_beyond_the_budget_are_refused():
    with pytest.raises(BudgetError, match=r'too small for 100 slots .*pass memory="44.7GB"'):
        split_budget(budget=20 * GB, slots=100, **MODEL)


def test_minimum_is_at_most_the_number_of_experts():
    small = MODEL | {"num_experts": 8}
    budget = 2_200_000_000 + 8 * 60 * 7_077_888
    assert split_budget(budget=budget, slots=None, **small).slots_per_layer == 8
    assert split_budget(budget=None, slots=8, **small).slots_per_layer == 8


def test_default_budget_leaves_a_reserve_to_the_machine():
    held = 10**13  # far more than the results of `available` differ
    fits = MODEL | {"base": held, "dense": 0, "working": 0, "minimum": 0}
    free = available()
    budget = split_budget(budget=None, slots=None, **fits).budget
    assert budget - held == pytest.approx(max(0, free - max(GB, free // 10)), rel=0.05)


def test_model_larger_than_the_machine_is_refused():
    with pytest.raises(BudgetError, match="the memory this machine can spare, .* is too small"):
        split_budget(budget=None, slots=None, **MODEL | {"dense": 10**15})
