"""Tests that a prefill layer by layer equals one chunk by chunk and reads each expert once."""

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from toys import FAMILIES, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.layerwise import prefill, split
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    return write_toy(
        tmp_path_factory.mktemp("toy"), request.param, num_experts=11, max_position_embeddings=2048
    )


def random_tokens(count):
    return random.Random(count).choices(range(160), k=count)


def answer(model, chunks, limit, keep=(), cache=None):
    """Prefill chunks and decode four greedy tokens.

    Returns:
        The logits after the prompt and after each token, and the kept states by the chunk's number.
    """
    cache = cache or make_prompt_cache(model)
    kept, lengths = {}, []
    for swept in prefill(model, chunks, cache, limit=limit, keep=keep):
        first = len(lengths)
        kept |= {first + i: s.state for i, s in enumerate(swept) if s.state is not None}
        lengths += [len(s.chunk.tokens) for s in swept]
    assert sum(lengths) == sum(map(len, chunks))
    outputs = [np.array(model.logits(swept[-1].hidden).astype(mx.float32))]
    for _ in range(4):
        new = model.next_logits([int(outputs[-1].argmax())], cache)
        outputs.append(np.array(new.astype(mx.float32)))
    return outputs, kept


@pytest.mark.parametrize("slots", [5, 7, 11])
def test_layerwise_prefill_equals_prefill_chunk_by_chunk(path, slots):
    """Both are compared with a resident model that runs one chunk after the other."""
    tokens = random_tokens(90)
    chunks = [tokens[:1], tokens[1:41], tokens[41:43], tokens[43:90]]
    resident = load_resident(path)
    cache = make_prompt_cache(resident)
    for chunk in chunks:
        expected = resident(mx.array([chunk]), cache=cache)
        mx.eval(expected, [c.state for c in cache])
    model = load_streaming(Checkpoint.open(path), slots=slots)
    ours, _ = answer(model, chunks, 1)
    # A GPU computes in bfloat16.
    whole = np.array(expected[0, -1].astype(mx.float32))
    np.testing.assert_allclose(ours[0][0], whole, atol=0.1 if ops.on_gpu() else 1e-5, rtol=0)
    ours_resident, _ = answer(resident, chunks, 10**9)
    for limit in (1, 41, 60, 10**9):
        outputs, _ = answer(model, chunks, limit)
        assert same(outputs, ours)
        assert same(outputs, ours_resident)
    model.close()


def test_states_kept_inside_a_pass_continue_like_the_whole_prompt(path):
    tokens = random_tokens(60)
    chunks = [tokens[:20], tokens[20:33], tokens[33:60]]
    model = load_streaming(Checkpoint.open(path), slots=6)
    expected, states = answer(model, chunks, 10**9, keep={0, 1})
    assert sorted(states) == [0, 1]
    for i, state in states.items():
        continued, _ = answer(model, chunks[i + 1 :], 10**9, cache=state)
        assert same(continued, expected)
    model.close()


def test_each_expert_is_read_once_in_a_pass(path):
    checkpoint = Checkpoint.open(path)
    tokens = random_tokens(120)
    chunks = [tokens[i : i + 40] for i in (0, 40, 80)]
    model = load_streaming(checkpoint, slots=5)
    for _ in prefill(model, chunks, make_prompt_cache(model), limit=10**9):
        pass
    layers = len(checkpoint.expert_layers)
    assert model.stats.needed == model.stats.loaded == 11 * layers
    assert model.stats.reads.bytes == checkpoint.expert_nbytes
    before = model.stats
    for _ in prefill(model, chunks, make_prompt_cache(model), limit=40):
        pass
    assert (model.stats - before).needed > 2 * 11 * layers
    model.close()


@pytest.mark.parametrize(
    ("count", "cuts", "sizes"),
    [
        (1, [], [1]),
        (512, [], [512]),
        (513, [], [512, 1]),
        (1100, [3, 600], [3, 512, 85, 500]),
        (20, [10, 19], [10, 9, 1]),
    ],
)
def test_chunks_end_at_cuts_and_have_at_most_512_tokens(count, cuts, sizes):
    chunks = split(list(range(count)), cuts)
    assert [len(p) for p in chunks] == sizes
    assert sum(chunks, []) == list(range(count))


def test_read_error_in_a_pass_is_raised(path, tmp_path):
    model = load_streaming(Checkpoint.open(path), slots=5)
    for file in Checkpoint.open(path).files:
        file.rename(tmp_path / file.name)
    try:
        with pytest.raises(Exception, match="needs bytes .* is missing"):
            answer(model, [[1, 2, 3], [4, 5]], 10**9)
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.rename(path / file.name)
    tokens = random_tokens(30)
    assert same(logits(model, tokens, 9), logits(load_resident(path), tokens, 9))
    model.close()
