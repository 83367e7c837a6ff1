"""Tests whole models that run on the GPU kernels, on a GPU or on the stand-in."""

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
from flashmoe.ops.gpu import compiled_step
from flashmoe.ops.gpu.fused import MAX_TOKENS
from flashmoe.streaming.switch_glu import StreamingSwitchGLU
from flashmoe_metal import kernel

ON_GPU = kernel.available()
TOKENS = random_tokens(23)
#: (tokens of a prompt, tokens of a chunk, decoded tokens).
CALLS = [(4, 1, 2), (23, 5, 1), (16, 16, 1), (23, 17, 0), (23, 23, 1)]
#: See test_exactness.py.
TOY_TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def launches():
    with launched() as names:
        yield names


@pytest.fixture(scope="module", params=TOYS)
def toy(request, tmp_path_factory):
    return Checkpoint.open(write(tmp_path_factory.mktemp("toys"), request.param))


#: For tests that do not depend on the family.
one_toy = pytest.mark.parametrize("toy", ["qwen3_5_moe"], indirect=True)


def run(model, length: int, chunk: int, decode: int) -> list[np.ndarray]:
    return logits(model, TOKENS[:length], chunk, decode)


@pytest.fixture(scope="module")
def resident(toy):
    return load_resident(toy.path)


@pytest.fixture(scope="module")
def expected(resident):
    """The logits of the resident model for each of CALLS."""
    return {call: run(resident, *call) for call in CALLS}


@pytest.fixture
def load(toy):
    """A function that loads the toy with this number of slots, by default one for each expert."""
    models = []

    def load(slots=None, **settings):
        models.append(load_streaming(toy, slots=slots or toy.num_experts, **settings))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.mark.slow
def test_streamed_logits_equal_resident_ones(toy, expected, load, launches):
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
        evictions = sum(b.switch_mlp._table.evictions for b in model.blocks.values())
        assert (evictions > 0) == (slots < toy.num_experts)
        # combine runs for chunks that need more experts than there are slots.
        assert slots > few or "combine" in launches


@pytest.mark.parametrize("toy", ["qwen3_5_moe", "bf16"], indirect=True)
def test_split_into_passes_does_not_change_a_bit(toy, load):
    """Some of the chunks run on the kernels, and the longer ones do not."""
    chunks = [TOKENS[:1], TOKENS[1:19], TOKENS[19:], TOKENS[:17]]
    results = []
    for slots, limit in ((None, 1), (None, 10**9), (toy.top_k + 2, 19), (toy.top_k + 2, 10**9)):
        model = load(slots)
        *_, (*_, last) = prefill(model, chunks, make_prompt_cache(model), limit=limit)
        results.append(np.array(model.logits(last.hidden).astype(mx.float32)))
    assert all(same([other], results[:1]) for other in results[1:])


@pytest.mark.skipif(ON_GPU, reason="on a GPU the model computes in bfloat16")
def test_logits_equal_stock_mlx_lm(toy, expected):
    stock, _ = load_model(toy.path)
    stock.set_dtype(mx.float32)
    for call in CALLS:
        for a, b in zip(expected[call], run(stock, *call), strict=True):
            np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_fully_resident_model_needs_neither_reads_nor_the_host(toy, expected, load, monkeypatch):
    """It gives the same bits as a model that copies the router's choice to the host."""
    model = load()
    assert not any(b.switch_mlp.fully_resident for b in model.blocks.values())
    load_all_experts(model)
    monkeypatch.setattr(StreamingSwitchGLU, "start", None)
    before = model.stats
    assert same(run(model, *CALLS[0]), expected[CALLS[0]])
    spent = model.stats - before
    assert spent.reads.bytes == spent.loaded == 0
    assert spent.needed == 6 * toy.top_k * len(model.blocks)


@one_toy
def test_layer_with_all_experts_in_their_own_slots_is_fully_resident(toy, load):
    """It is not, with a slot fewer than experts or while a read is in flight."""
    for slots in (toy.num_experts - 1, toy.num_experts):
        model = load(slots)
        switch = next(iter(model.blocks.values())).switch_mlp
        numbers = list(range(toy.num_experts))
        for expert in numbers[:-1]:
            switch(activations(1, HIDDEN), mx.array([[expert]]))
            assert not switch.fully_resident
        switch(activations(1, HIDDEN), mx.array([numbers[-1:]]))
        assert switch.fully_resident == (slots == toy.num_experts)
    # While a read is in flight, its bytes may not have arrived.
    model = load()
    switch = next(iter(model.blocks.values())).switch_mlp
    for expert in numbers:
        assert switch.load(expert, set())
        assert not switch.fully_resident
    for expert in numbers:
        switch.wait_for(expert)
    assert switch.fully_resident
    switch.resize(toy.num_experts - 1)
    assert not switch.fully_resident, "an expert has left"


@one_toy
def test_compiled_step_of_another_top_k_is_not_reused(toy, resident, load, monkeypatch):
    """A compiled step keeps the K with which it was compiled."""

    def frozen(f):
        step, compiled_with = kernel.compiled(f), k_of(f)

        def call(*args):
            assert k_of(f) == compiled_with
            return step(*args)

        return call

    def k_of(f):
        return [block.top_k for block in getattr(f, "args", ())]

    monkeypatch.setattr(compiled_step, "compiled", frozen)
    model = load()
    load_all_experts(model)
    for k in (*range(1, toy.top_k + 1), *range(1, toy.top_k + 1)):
        with model.pruned_to(k), resident.pruned_to(k):
            pruned = logits(model, TOKENS[:3], 1, decode=1)
            assert same(pruned, logits(resident, TOKENS[:3], 1, decode=1)), k


@one_toy
@pytest.mark.parametrize(
    ("full", "tokens", "stop"),
    [(False, 1, 1), (False, 1, 2), (False, 16, 2), (False, 17, 3), (True, 1, 1), (True, 1, 4)],
)
def test_calls_after_an_interrupted_one_give_the_same_bits(toy, expected, load, full, tokens, stop):
    """The call is interrupted at its start, between waves or in another layer."""
    model, calls = load(None if full else toy.top_k + 2), []
    if full:
        load_all_experts(model)

    def check():
        calls.append(1)
        if len(calls) == stop:
            raise TimeoutError

    def three_times():
        cache = make_prompt_cache(model)
        for _ in range(3):
            mx.eval(model(mx.array([TOKENS[:tokens]]), cache=cache))

    model.hooks.check_cancelled = check
    with pytest.raises(TimeoutError):
        three_times()
    model.hooks.check_cancelled = lambda: None
    assert same(run(model, *CALLS[1]), expected[CALLS[1]])


@pytest.mark.parametrize("name", ["gather", "reference"])
def test_other_backends_give_nearly_the_same_logits(tmp_path, launches, monkeypatch, name):
    # In the dtype of the weights, in which a GPU computes, rounding may choose other experts.
    dtype = "float32" if ON_GPU else "bfloat16"
    toy = Checkpoint.open(write(tmp_path, "qwen3_5_moe", dtype=dtype))
    expected = run(load_resident(toy.path), *CALLS[1])
    monkeypatch.setenv(ops.ENV, name)
    model = load_streaming(toy, slots=toy.top_k + 2)
    launches.clear()
    outputs = run(model, *CALLS[1])
    model.close()
    assert launches == []
    for a, b in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_cpu_backend_is_refused_where_kernels_run(monkeypatch):
    assert ops.pick().name == "fused"
    monkeypatch.setenv(ops.ENV, "cpu")
    with pytest.raises(SettingError, match="FLASHMOE_OPS='cpu' does not run on MLX's gpu device"):
        ops.pick()


@one_toy
def test_kernels_run_for_few_tokens_only(load, launches):
    model = load()
    for tokens, few in ((MAX_TOKENS, True), (MAX_TOKENS + 1, False)):
        launches.clear()
        mx.eval(model(mx.array([random_tokens(tokens)])))
        of_blocks = {"router", "gate_up", "down"} & set(launches)
        assert of_blocks == ({"router", "gate_up", "down"} if few else set())


@pytest.mark.parametrize("what", ["experts", "shared expert"])
def test_matrices_that_no_kernel_can_read_go_to_mlx(tmp_path, launches, what):
    """The kernels do not support rows of 48 columns."""
    size = {"experts": "moe_intermediate_size", "shared expert": "shared_expert_intermediate_size"}
    path = write(tmp_path, "qwen3_5_moe", bits=None, **{size[what]: 48})
    resident = load_resident(path)
    model = load_streaming(Checkpoint.open(path), slots=5)
    block = next(iter(model.blocks.values()))
    assert block.switch_mlp.has_kernels == (what != "experts")
    launches.clear()
    outputs = logits(model, TOKENS, 5)
    assert "router" not in launches
    assert ("gate_up" in launches) == block.switch_mlp.has_kernels
    assert same(outputs, logits(resident, TOKENS, 5))
    model.close()
    if not ON_GPU:
        stock, _ = load_model(path)
        stock.set_dtype(mx.float32)
        for a, b in zip(outputs, logits(stock, TOKENS, 5), strict=True):
            np.testing.assert_allclose(a, b, atol=TOY_TOLERANCE, rtol=0)


def test_step_launches_exactly_its_kernels(toy, load, launches):
    model = load()
    load_all_experts(model)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([TOKENS[:5]]), cache=cache), [c.state for c in cache])
    for layer, c in zip(model.layers, cache, strict=True):
        linear, routed = getattr(layer, "is_linear", False), hasattr(layer.mlp, "switch_mlp")
        # A product comes before attention and one after it, then the router's or a dense block's.
        step = ["matvec", "gated_delta_step" if linear else "qk_norm_rope", "matvec", "add_norm"]
        step += ["matvec", "router", "gate_up", "down"] if routed else ["matvec"] * 3
        if "quantization" not in toy.config or mx.metal.is_available():
            # MLX computes the products.
            step = [name for name in step if name != "matvec"]
        launches.clear()
        x = activations(1, 1, HIDDEN).astype(layer.input_layernorm.weight.dtype)
        mx.eval(layer(x, None, c))
        assert launches == step
        if linear and routed and "matvec" in step:
            # A change of shape costs the host nearly as much as a launch, so there may be none.
            counts = operations(layer, x, None, c) - operations(layer.input_layernorm, x)
            assert counts == {"Depends": len(step)}
