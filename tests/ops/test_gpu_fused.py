"""Whole models through our kernels: streamed as resident, settled, pruned, and with other ops."""

import mlx.core as mx
import numpy as np
import pytest
from fused_toys import TOYS, activations, load_all_experts, random_tokens, write
from launching import launched, operations
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from toys import HIDDEN

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.models.layerwise import prefill
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops
from flashmoe.ops.gpu import compiled_step as steps
from flashmoe.ops.gpu.fused import MOST_ROWS
from flashmoe.streaming.switch_glu import StreamingSwitchGLU
from flashmoe_metal import kernel

ON_GPU = kernel.available()
TOKENS = random_tokens(23)
#: Tokens of a prompt, tokens of a chunk, tokens that follow.
CALLS = [(4, 1, 2), (23, 5, 1), (16, 16, 1), (23, 17, 0), (23, 23, 1)]
#: As in test_exactness.py.
TOY_TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def launches():
    with launched() as names:
        yield names


@pytest.fixture(scope="module", params=TOYS)
def toy(request, tmp_path_factory):
    return Checkpoint.open(write(tmp_path_factory.mktemp("toys"), request.param))


#: What does not depend on the family.
one_toy = pytest.mark.parametrize("toy", ["qwen3_5_moe"], indirect=True)


def run(model, length: int, chunk: int, decode: int) -> list[np.ndarray]:
    return logits(model, TOKENS[:length], chunk, decode)


@pytest.fixture(scope="module")
def resident(toy):
    return load_resident(toy.path)


@pytest.fixture(scope="module")
def expected(resident):
    """Logits of each of CALLS."""
    return {call: run(resident, *call) for call in CALLS}


@pytest.fixture
def load(toy):
    """Load it with so many slots, all by default."""
    models = []

    def load(slots=None, **settings):
        models.append(load_streaming(toy, slots=slots or toy.num_experts, **settings))
        return models[-1]

    yield load
    for model in models:
        model.close()


def test_streamed_logits_differ_from_resident(toy, expected, load, launches):
    few = toy.top_k + 2
    for slots, calls in (
        (few, CALLS),
        ((few + toy.num_experts) // 2, CALLS[1:2]),
        (toy.num_experts, CALLS),
    ):
        model = load(slots)
        launches.clear()
        for call in calls:
            assert same(run(model, *call), expected[call]), (slots, call)
        evictions = sum(b.switch_mlp._slots.evictions for b in model._blocks)
        assert (evictions > 0) == (slots < toy.num_experts)
        # Chunks of tokens that need more experts than there are slots.
        assert slots > few or "combine" in launches


@pytest.mark.parametrize("toy", ["qwen3_5_moe", "bf16"], indirect=True)
def test_split_into_sweeps_changes_a_bit(toy, load):
    """Of pieces that go through our kernels and others that do not."""
    pieces = [TOKENS[:1], TOKENS[1:19], TOKENS[19:], TOKENS[:17]]
    found = []
    for slots, limit in ((None, 1), (None, 10**9), (toy.top_k + 2, 19), (toy.top_k + 2, 10**9)):
        model = load(slots)
        *_, (*_, last) = prefill(model, pieces, make_prompt_cache(model), limit=limit)
        found.append(np.array(model.logits(last.hidden).astype(mx.float32)))
    assert all(same([other], found[:1]) for other in found[1:])


@pytest.mark.skipif(ON_GPU, reason="on a GPU the model computes in bfloat16")
def test_logits_differ_from_stock_mlx_lm(toy, expected):
    stock, _ = load_model(toy.path)
    stock.set_dtype(mx.float32)
    for call in CALLS:
        for a, b in zip(expected[call], run(stock, *call), strict=True):
            np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_settled_model_looks_or_reads(toy, expected, load, monkeypatch):
    """And gives other bits than one that looks."""
    model = load()
    assert not any(b.switch_mlp.settled for b in model._blocks)
    load_all_experts(model)
    monkeypatch.setattr(StreamingSwitchGLU, "start", None)
    before = model.stats
    assert same(run(model, *CALLS[0]), expected[CALLS[0]])
    spent = model.stats - before
    assert spent.reads.bytes == spent.loaded == 0
    assert spent.needed == 6 * toy.top_k * len(model._blocks)


@one_toy
def test_layer_settles_with_an_expert_elsewhere(toy, load):
    """With all but one of the experts, or with one in a slot of another number."""
    for slots in (toy.num_experts - 1, toy.num_experts):
        model = load(slots)
        switch = model._blocks[0].switch_mlp
        numbers = list(range(toy.num_experts))
        for expert in numbers[:-1]:
            switch(activations(1, HIDDEN), mx.array([[expert]]))
            assert not switch.settled
        switch(activations(1, HIDDEN), mx.array([numbers[-1:]]))
        assert switch.settled == (slots == toy.num_experts)
    # A read that has not ended: its bytes may not be there.
    model = load()
    switch = model._blocks[0].switch_mlp
    for expert in numbers:
        assert switch.load(expert, set())
        assert not switch.settled
    for expert in numbers:
        switch.landed(expert)
    assert switch.settled
    switch.resize(toy.num_experts - 1)
    assert not switch.settled, "an expert has left"


@one_toy
def test_piece_of_another_k_is_run(toy, resident, load, monkeypatch):
    """A piece holds the K that it was made with."""

    def frozen(f):
        made, made_with = kernel.compiled(f), k_of(f)

        def call(*args):
            assert k_of(f) == made_with
            return made(*args)

        return call

    def k_of(f):
        return [block.top_k for block in getattr(f, "args", ())]

    monkeypatch.setattr(steps, "compiled", frozen)
    model = load()
    load_all_experts(model)
    for k in (*range(1, toy.top_k + 1), *range(1, toy.top_k + 1)):
        with model.pruned_to(k), resident.pruned_to(k):
            found = logits(model, TOKENS[:3], 1, decode=1)
            assert same(found, logits(resident, TOKENS[:3], 1, decode=1)), k


@one_toy
@pytest.mark.parametrize(
    ("settled", "tokens", "stop"),
    [(False, 1, 1), (False, 1, 2), (False, 16, 2), (False, 17, 3), (True, 1, 1), (True, 1, 4)],
)
def test_interrupted_call_leaves_a_layer_that_is_wrong(toy, expected, load, settled, tokens, stop):
    """Interrupted at the start, between waves or in another layer."""
    model, calls = load(None if settled else toy.top_k + 2), []
    if settled:
        load_all_experts(model)

    def check():
        calls.append(1)
        if len(calls) == stop:
            raise TimeoutError

    def three_times():
        cache = make_prompt_cache(model)
        for _ in range(3):
            mx.eval(model(mx.array([TOKENS[:tokens]]), cache=cache))

    model.watch.check = check
    with pytest.raises(TimeoutError):
        three_times()
    model.watch.check = lambda: None
    assert same(run(model, *CALLS[1]), expected[CALLS[1]])


@pytest.mark.parametrize("name", ["gather", "reference"])
def test_other_ops_differ(tmp_path, launches, monkeypatch, name):
    # In the types of the weights, as a GPU computes, rounding may choose other experts.
    dtype = "float32" if ON_GPU else "bfloat16"
    toy = Checkpoint.open(write(tmp_path, "qwen3_5_moe", dtype=dtype))
    expected = run(load_resident(toy.path), *CALLS[1])
    monkeypatch.setenv(ops.ENV, name)
    model = load_streaming(toy, slots=toy.top_k + 2)
    launches.clear()
    found = run(model, *CALLS[1])
    model.close()
    assert launches == []
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_cpu_ops_are_picked_beside_kernels(monkeypatch):
    assert ops.pick().NAME == "fused"
    monkeypatch.setenv(ops.ENV, "cpu")
    with pytest.raises(SettingError, match="FLASHMOE_OPS='cpu' does not run on MLX's gpu device"):
        ops.pick()


@one_toy
def test_many_tokens_reach_the_kernels(load, launches):
    model = load()
    for tokens, few in ((MOST_ROWS, True), (MOST_ROWS + 1, False)):
        launches.clear()
        mx.eval(model(mx.array([random_tokens(tokens)])))
        of_blocks = {"router", "gate_up", "down"} & set(launches)
        assert of_blocks == ({"router", "gate_up", "down"} if few else set())


@pytest.mark.parametrize("what", ["experts", "shared expert"])
def test_matrices_that_the_kernels_cannot_read_are_read(tmp_path, launches, what):
    """Rows of 48 columns."""
    size = {"experts": "moe_intermediate_size", "shared expert": "shared_expert_intermediate_size"}
    path = write(tmp_path, "qwen3_5_moe", bits=None, **{size[what]: 48})
    resident = load_resident(path)
    model = load_streaming(Checkpoint.open(path), slots=5)
    block = model._blocks[0]
    assert block.switch_mlp.fused == (what != "experts")
    launches.clear()
    found = logits(model, TOKENS, 5)
    assert "router" not in launches
    assert ("gate_up" in launches) == block.switch_mlp.fused
    assert same(found, logits(resident, TOKENS, 5))
    model.close()
    if not ON_GPU:
        stock, _ = load_model(path)
        stock.set_dtype(mx.float32)
        for a, b in zip(found, logits(stock, TOKENS, 5), strict=True):
            np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_step_launches_more_than_it_needs(toy, load, launches):
    model = load()
    load_all_experts(model)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([TOKENS[:5]]), cache=cache), [c.state for c in cache])
    for layer, c in zip(model.layers, cache, strict=True):
        linear, routed = getattr(layer, "is_linear", False), hasattr(layer.mlp, "switch_mlp")
        # A product before attention and one after it; the router's, or those of a dense block.
        step = ["matvec", "gated_delta_step" if linear else "qk_norm_rope", "matvec", "add_norm"]
        step += ["matvec", "router", "gate_up", "down"] if routed else ["matvec"] * 3
        if "quantization" not in toy.config or mx.metal.is_available():
            # By MLX.
            step = [name for name in step if name != "matvec"]
        launches.clear()
        x = activations(1, 1, HIDDEN).astype(layer.input_layernorm.weight.dtype)
        mx.eval(layer(x, None, c))
        assert launches == step
        if linear and routed and "matvec" in step:
            # A change of shape costs the host much of a launch.
            found = operations(layer, x, None, c) - operations(layer.input_layernorm, x)
            assert found == {"Depends": len(step)}
