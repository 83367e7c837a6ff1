"""Tests how memory is split between slots and prompts, at the size of real models."""

import pytest

from flashmoe.catalog import CATALOGUE
from flashmoe.errors import ContextError
from flashmoe.hub.layouts import compute_layout, open_computed_checkpoint
from flashmoe.memory.prefill import split_for_prefill
from flashmoe.models.loading import plan_memory
from flashmoe.options import LoadOptions


@pytest.fixture(scope="module")
def checkpoint():
    with open_computed_checkpoint(compute_layout(CATALOGUE["qwen3.5-397b"])) as opened:
        yield opened


def split(checkpoint, plan, tokens):
    return split_for_prefill(
        checkpoint, plan, tokens=tokens, contexts=[tokens], experts=10, budget=int, on_gpu=True
    )


def test_prompt_that_does_not_fit_a_gpu_is_refused_before_work(checkpoint):
    plan = plan_memory(checkpoint, LoadOptions(), mac=38_650_000_000)
    assert split(checkpoint, plan, 8000).slots == plan.slots_per_layer
    with pytest.raises(ContextError, match=r"131072 tokens needs .* there are 38\.[67] GB"):
        split(checkpoint, plan, 131072)


def test_context_that_the_refusal_names_is_enough(checkpoint):
    plan = plan_memory(checkpoint, LoadOptions(), mac=38_650_000_000)
    with pytest.raises(ContextError, match="load the model with context=65536"):
        split(checkpoint, plan, 65536)
    longer = plan_memory(checkpoint, LoadOptions(context=65536), mac=38_650_000_000)
    assert split(checkpoint, longer, 65536).slots == longer.slots_per_layer < plan.slots_per_layer


def test_context_of_the_options_is_planned_for(checkpoint):
    plan = plan_memory(checkpoint, LoadOptions(context=20000), mac=38_650_000_000)
    assert plan.context == 20000


def test_slots_without_a_budget_refuse_no_prompt(checkpoint):
    plan = plan_memory(checkpoint, LoadOptions(slots=20), mac=10**12)
    assert split(checkpoint, plan, 131072).slots == 20
