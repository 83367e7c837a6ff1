"""A prompt read by layers: the bits of one that is read piece by piece, each expert read once."""

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


def answer(model, pieces, limit, keep=(), cache=None):
    """Logits after the prompt and of four greedy tokens; the states that were kept."""
    cache = cache or make_prompt_cache(model)
    states, taken = {}, []
    for swept in prefill(model, pieces, cache, limit=limit, keep=keep):
        first = len(taken)
        states |= {first + i: s.state for i, s in enumerate(swept) if s.state is not None}
        taken += [len(s.piece.tokens) for s in swept]
    assert sum(taken) == sum(map(len, pieces))
    found = [np.array(model.logits(swept[-1].hidden).astype(mx.float32))]
    for _ in range(4):
        new = model.next_logits([int(found[-1].argmax())], cache)
        found.append(np.array(new.astype(mx.float32)))
    return found, states


@pytest.mark.parametrize("slots", [5, 7, 11])
def test_sweep_changes_a_bit(path, slots):
    """Against whole models, resident, that take one piece after the other."""
    tokens = random_tokens(90)
    pieces = [tokens[:1], tokens[1:41], tokens[41:43], tokens[43:90]]
    resident = load_resident(path)
    cache = make_prompt_cache(resident)
    for piece in pieces:
        expected = resident(mx.array([piece]), cache=cache)
        mx.eval(expected, [c.state for c in cache])
    model = load_streaming(Checkpoint.open(path), slots=slots)
    ours, _ = answer(model, pieces, 1)
    # In bfloat16 on a GPU.
    whole = np.array(expected[0, -1].astype(mx.float32))
    np.testing.assert_allclose(ours[0][0], whole, atol=0.1 if ops.on_gpu() else 1e-5, rtol=0)
    ours_resident, _ = answer(resident, pieces, 10**9)
    for limit in (1, 41, 60, 10**9):
        found, _ = answer(model, pieces, limit)
        assert same(found, ours)
        assert same(found, ours_resident)
    model.close()


def test_states_inside_a_sweep_are_not_those_of_their_piece(path):
    tokens = random_tokens(60)
    pieces = [tokens[:20], tokens[20:33], tokens[33:60]]
    model = load_streaming(Checkpoint.open(path), slots=6)
    expected, states = answer(model, pieces, 10**9, keep={0, 1})
    assert sorted(states) == [0, 1]
    for i, state in states.items():
        found, _ = answer(model, pieces[i + 1 :], 10**9, cache=state)
        assert same(found, expected)
    model.close()


def test_expert_is_read_twice_in_a_sweep(path):
    checkpoint = Checkpoint.open(path)
    tokens = random_tokens(120)
    pieces = [tokens[i : i + 40] for i in (0, 40, 80)]
    model = load_streaming(checkpoint, slots=5)
    for _ in prefill(model, pieces, make_prompt_cache(model), limit=10**9):
        pass
    layers = len(checkpoint.expert_layers)
    assert model.stats.needed == model.stats.loaded == 11 * layers
    assert model.stats.reads.bytes == checkpoint.expert_nbytes
    before = model.stats
    for _ in prefill(model, pieces, make_prompt_cache(model), limit=40):
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
def test_pieces_cross_a_cut_or_are_too_long(count, cuts, sizes):
    pieces = split(list(range(count)), cuts)
    assert [len(p) for p in pieces] == sizes
    assert sum(pieces, []) == list(range(count))


def test_read_error_in_a_sweep_is_lost(path, tmp_path):
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
