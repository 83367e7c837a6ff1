"""Test that any options in range give a token that the mask allows, and NaN gives none."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine
from flashmoe.errors import CheckpointError
from flashmoe.generation.sampling import Sampler
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
        sampler = Sampler(settings, penalty, 7, HISTORY)
        token = sampler.sample(mx.array(logits), lambda x: x + mx.array(mask, mx.float32))
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
        Sampler({"temp": temperature}, None, 7, HISTORY).sample(logits, lambda x: x)


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
