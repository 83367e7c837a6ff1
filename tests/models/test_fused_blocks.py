"""Tests MoE blocks on the GPU kernels: waves, chunks of a pass, lazy results and the mailbox."""

import mlx.core as mx
import numpy as np
import pytest
from fake_device import HostMailboxes, post
from fused_toys import activations, load_all_experts, random_tokens, write
from launching import launched
from mlx_lm.utils import load_model
from toys import HIDDEN

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models import streaming_moe as models
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import logits, same
from flashmoe.ops.gpu import fused
from flashmoe.ops.reference import kernels as reference_kernels
from flashmoe.streaming.switch_glu import StreamingSwitchGLU
from flashmoe_metal import kernel

ON_GPU = kernel.available()
on_stand_in = pytest.mark.skipif(ON_GPU, reason="a GPU has its own memory and mailboxes")
#: More tokens than the kernels take.
MANY = 40


@pytest.fixture(scope="module", autouse=True)
def launches():
    with launched() as names:
        yield names


# One toy has a shared expert of another size than the routed ones, the other has none.
@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_moe"])
def toy(request, tmp_path_factory):
    return Checkpoint.open(write(tmp_path_factory.mktemp("toys"), request.param, dtype="bfloat16"))


@pytest.fixture
def load(toy):
    """A function that loads the toy with this number of slots, by default as few as possible."""
    loaded = []

    def load(slots=None):
        loaded.append(load_streaming(toy, slots=slots or toy.top_k + 2))
        return loaded[-1]

    yield load
    for model in loaded:
        model.close()


def numpy(xs) -> list[np.ndarray]:
    """Return arrays as NumPy float32."""
    return [np.array(x.astype(mx.float32)) for x in xs]


def chunks(*tokens: int) -> list[mx.array]:
    """Return the activations (1, tokens, hidden) of chunks of these lengths."""
    return [activations(1, n, HIDDEN, seed=i) for i, n in enumerate(tokens)]


@pytest.mark.parametrize("tokens", [5, 16])
@pytest.mark.parametrize("residual", [False, True])
def test_waves_do_not_change_a_bit(toy, load, launches, tokens, residual):
    x, r = chunks(tokens, tokens)
    results = []
    for slots in (toy.top_k + 2, toy.num_experts):
        block = next(iter(load(slots).blocks.values()))
        launches.clear()
        y = next(block.run([x], [r])) if residual else block(x)
        results += numpy([y])
        needed = len(np.unique(np.array(block.choose_experts(x[0])[0])))
        assert ("combine" in launches) == (needed > slots)
    assert same(*([f] for f in results))


@pytest.mark.parametrize(
    "tokens",
    [(5, MANY), (MANY, 5), (5, 16), (MANY, 1, 20)],
    ids=str,
)
def test_bits_of_a_chunk_do_not_depend_on_other_chunks(toy, load, tokens):
    xs = chunks(*tokens)
    resident = next(iter(load(toy.num_experts).blocks.values()))
    alone = numpy([resident(x) for x in xs])
    for block in (next(iter(load().blocks.values())), resident):
        together = list(block.run(xs, [None] * len(xs)))
        assert [y.shape for y in together] == [x.shape for x in xs]
        assert same(numpy(together), alone)


def test_each_chunk_gets_its_own_residual(toy, load):
    xs, rs = chunks(5, MANY, 2), [x * 2 for x in chunks(5, MANY, 2)]
    block = next(iter(load().blocks.values()))
    alone = [next(block.run([x], [r])) for x, r in zip(xs, rs, strict=True)]
    assert same(numpy(block.run(xs, rs)), numpy(alone))
    assert same(numpy(block.run(xs[::2], rs[::2])), numpy(alone[::2]))


@pytest.mark.parametrize("rows", [1, 16])
def test_slot_is_reused_only_after_lazy_results_have_read_it(load, monkeypatch, rows):
    """The stand-in computes at once, so here the lazy reference kernels replace the kernels."""
    if not ON_GPU:
        for name in ("gate_up", "down", "combine"):
            monkeypatch.setattr(fused, name, getattr(reference_kernels, name))
    switch = next(iter(load().blocks.values())).switch_mlp
    x, scores = activations(rows, HIDDEN), mx.full((rows, 2), 0.5)

    def call(first: int) -> mx.array:
        indices = mx.broadcast_to(mx.array([first, first + 1]), (rows, 2))
        return next(switch.start([(x, indices)]).finish([scores], [{}]))

    at_once = [np.array(call(first).astype(mx.float32)) for first in (0, 2, 4, 6)]
    evictions = switch._table.evictions
    lazy = [call(first) for first in (0, 2, 4, 6)]
    assert switch._table.evictions > evictions + 4
    assert same(numpy(lazy), at_once)


def test_router_and_shared_gate_of_many_rows_equal_mlx_lm(toy, load):
    """The router and the gate of the shared expert are one product."""
    stock, _ = load_model(toy.path)
    if not ON_GPU:
        stock.set_dtype(mx.float32)
    ours, theirs = next(iter(load().blocks.values())), stock.layers[0].mlp
    x = activations(2, MANY, HIDDEN)
    for name in ("gate", "shared_expert_gate"):
        if hasattr(theirs, name):
            a, b = numpy([getattr(ours, name)(x), getattr(theirs, name)(x)])
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=0.1 if ON_GPU else 1e-5)


@pytest.fixture
def posted(monkeypatch):
    """Let routers post to mailboxes.

    Yields:
        A dict: "garbage" is the copy of a choice that is wrong ("mailbox", "indices" or None), and
            "posts" counts the choices that were posted.
    """
    monkeypatch.setattr(models, "device_memory", HostMailboxes)
    settings = {"garbage": None, "posts": 0}
    run = kernel._launcher

    def launch(k, **call):
        outputs = run(k, **call)
        if k.name != "router" or not call["inputs"][1].item():
            return outputs
        settings["posts"] += 1
        indices, scores = outputs
        posted = np.zeros(indices.shape) if settings["garbage"] == "mailbox" else indices
        post(call["inputs"][1], np.array(posted))
        return [mx.zeros_like(indices) if settings["garbage"] == "indices" else indices, scores]

    with kernel.launched_by(launch):
        yield settings


@on_stand_in
def test_choice_is_read_from_the_mailbox(load, posted):
    tokens = random_tokens(16)
    calls = ((1, 1), (16, 5))
    model = load()
    expected = [logits(model, tokens[:n], chunk, decode=1) for n, chunk in calls]
    assert posted["posts"]
    posted["garbage"] = "indices"
    for (n, chunk), right in zip(calls, expected, strict=True):
        assert same(logits(model, tokens[:n], chunk, decode=1), right)


@on_stand_in
@pytest.mark.parametrize("tokens", [(5, 5), (1, 2, 3), (3, MANY)], ids=str)
def test_mailbox_is_not_read_for_several_chunks(load, posted, tokens):
    """The mailbox holds only the choice of the last chunk."""
    xs = chunks(*tokens)
    block = next(iter(load().blocks.values()))
    alone = numpy([block(x) for x in xs])
    posted["garbage"] = "mailbox"
    assert same(numpy(block.run(xs, [None] * len(xs))), alone)


@on_stand_in
def test_fully_resident_layer_does_not_read_the_mailbox(toy, load, posted, monkeypatch):
    model = load(toy.num_experts)
    expected = logits(model, random_tokens(4), 1, decode=1)
    load_all_experts(model)
    posted["garbage"] = "mailbox"
    monkeypatch.setattr(StreamingSwitchGLU, "start", None)
    assert same(logits(model, random_tokens(4), 1, decode=1), expected)
