"""Test that any options in range give a token that the mask allows, and NaN gives none."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine
from flashmoe.errors import CheckpointError
from flashmoe.generation.sampling import FIRST_CANDIDATES, Candidates, Penalties, Sampler
from flashmoe.requests import RANGES, SMALLEST, Request

#: Values at the ends of the ranges, and a usual one. The engine passes on nothing below SMALLEST.
TEMPERATURES = (0, SMALLEST, 0.7, RANGES["temperature"][2])
TOP_PS = (SMALLEST, 0.5, 1 - 1e-12, 1)
MIN_PS = (0, 1e-320, 0.1, 1)
PENALTIES = (None, *RANGES["repetition_penalty"][1:])
HISTORY = [3, 6, 9]


@pytest.mark.parametrize("scale", [1e-3, 10, 5e3])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_token_is_allowed_and_likely(temperature, scale):
    random = np.random.default_rng(0)
    mask = np.where(np.arange(300) % 3, -np.inf, 0)
    for top_p, min_p, top_k, penalty in itertools.product(TOP_PS, MIN_PS, (0, 1, 9), PENALTIES):
        logits = (scale * random.normal(size=(1, 300))).astype(np.float32)
        settings = {"temp": temperature, "top_p": top_p, "min_p": min_p, "top_k": top_k}
        sampler = Sampler(settings, Penalties(penalty), 7, HISTORY)
        token = sampler.sample(mx.array(logits), lambda x: x + mx.array(mask, mx.float32)).token
        assert token % 3 == 0, (settings, penalty)
        # The probabilities of small logits are all alike.
        greedy = temperature <= SMALLEST and scale > 1
        if penalty is None and (greedy or top_p == SMALLEST or min_p == 1 or top_k == 1):
            assert token == np.argmax(logits + mask), (settings, penalty)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_comes_from_logits_that_are_not_finite(value, temperature):
    logits = mx.zeros((1, 300))
    logits[0, 100] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        Sampler({"temp": temperature}, Penalties(), 7, HISTORY).sample(logits, lambda x: x)


def test_tiny_values_take_the_likeliest_token():
    with Engine(find(DEMO)) as engine:

        def text(**options):
            request = Request([{"role": "user", "content": "Hello."}], max_tokens=8, **options)
            return "".join(getattr(e, "text", "") for e in engine.stream(request))

        likeliest = text(temperature=0)
        assert likeliest
        for options in (
            {"temperature": 1e-40},
            {"temperature": 1e-320},
            {"temperature": 1, "top_p": 1e-320},
            {"temperature": 1, "top_p": 0},
            {"temperature": 1, "top_k": 1},
            {"temperature": 1, "min_p": 1},
        ):
            assert text(**options) == likeliest, options


SETTINGS = [
    {"top_k": 20},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 4, "top_p": 0.999, "min_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.9999},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_candidates_are_sampled_with_the_distribution_of_mlx_lm(settings):
    """mlx-lm sorts the whole vocabulary for top_p, which takes longer than the rest of a token."""
    logits = mx.array(np.random.default_rng(1).normal(0, 2, (1, 4 * FIRST_CANDIDATES)), mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    kept = logprobs
    if "top_p" in settings:
        kept = apply_top_p(kept, settings["top_p"])
    if "min_p" in settings:
        kept = apply_min_p(kept, settings["min_p"])
    if "top_k" in settings:
        kept = apply_top_k(kept, settings["top_k"])
    expected = np.array(mx.softmax(kept / 0.7)[0])
    mx.random.seed(5)
    sample = Candidates({"temp": 0.7, **settings})
    drawn = np.bincount([sample(logprobs).item() for _ in range(1500)], minlength=len(expected))
    assert not drawn[expected == 0].any()
    assert np.abs(drawn / 1500 - expected).sum() / 2 < 0.03 + 0.02 * (expected > 0).sum() ** 0.5


def sampled(logits, penalties, answer=(), **options):
    sampler = Sampler({"temp": 0}, penalties, 7, [0, 1, 2], **options)
    sampler.record(list(answer))
    return sampler.sample(mx.array([logits], mx.float32), lambda x: x)


def test_penalties_count_the_tokens_of_the_answer():
    logits = [5.0, 4.0, 3.5, 0.0]
    assert sampled(logits, Penalties()).token == 0
    # What is in the prompt is not in the answer.
    assert sampled(logits, Penalties(presence=2, frequency=2)).token == 0
    assert sampled(logits, Penalties(presence=1.1), [0]).token == 1
    assert sampled(logits, Penalties(presence=0.9), [0] * 5).token == 0
    assert sampled(logits, Penalties(frequency=0.3), [0] * 3).token == 0
    assert sampled(logits, Penalties(frequency=0.3), [0] * 4 + [3] * 40).token == 1
    assert sampled(logits, Penalties(presence=-2), [1]).token == 1
    assert sampled(logits, Penalties(bias={2: 2.0, 3: -100})).token == 2
    assert sampled(logits, Penalties(bias={2: 2.0}, presence=1.6), [2]).token == 0


def test_probabilities_are_those_after_penalties():
    logits = [2.0, 1.0, 0.0, -1.0]
    expected = np.array(logits) - np.log(np.exp(logits).sum())
    got = sampled(logits, Penalties(), logprobs=2)
    assert [token for token, _ in got.top] == [0, 1]
    assert np.allclose([got.logprob, *(value for _, value in got.top)], expected[[0, 0, 1]])
    assert sampled(logits, Penalties(), logprobs=0).top == ()
    assert sampled(logits, Penalties()).logprob is None
    biased = sampled(logits, Penalties(bias={0: -100}), logprobs=20)
    assert biased.token == 1
    assert len(biased.top) == 4
    assert np.isclose(biased.logprob, 1 - np.log(np.exp(logits[1:]).sum()))
