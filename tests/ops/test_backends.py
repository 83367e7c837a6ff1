"""The ops modules against each other: one definition, several speeds, and no trace of the split."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.utils import load_model
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.models.loading import load_streaming
from flashmoe.ops import backend as ops
from flashmoe.ops.gpu import gather
from flashmoe.ops.reference import experts as reference
from flashmoe.streaming.reader import Reader
from flashmoe.streaming.slot_memory import SlotMemory

EXPERTS, TOP_K = 6, 3


@pytest.fixture(scope="module", params=[4, None], ids=["4bit", "bf16"])
def layer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ops")
    path = write_toy(directory, num_experts=EXPERTS, top_k=TOP_K, bits=request.param)
    return Checkpoint.open(path).expert_layers[0]


def filled(layer, *, on_gpu: bool) -> SlotMemory:
    bank = SlotMemory(layer, EXPERTS, on_gpu=on_gpu)
    with Reader() as reader:
        for expert in range(EXPERTS):
            reader.submit(bank.requests(expert, expert)).wait()
    return bank


def case(tokens: int, dtype=mx.float32):
    rng = np.random.default_rng(tokens)
    x = mx.array(rng.normal(size=(tokens, 64)).astype(np.float32)).astype(dtype)
    chosen = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).reshape(-1)
    return x, {int(e): np.flatnonzero(chosen == e) for e in np.unique(chosen)}


def run(module, bank, x, experts, waves=1) -> np.ndarray:
    work = module.Work(bank, x, TOP_K)
    names = list(experts)
    for wave in range(waves):
        part = {e: experts[e] for e in names[wave::waves]}
        if part:
            work.run(part)
    return np.array(work.result().astype(mx.float32))


@pytest.mark.parametrize("tokens", [1, 3, 25, 70])
def test_cpu_ops_differ_from_reference(layer, tokens):
    if ops.on_gpu():
        pytest.skip("the CPU ops are for the CPU device")
    from flashmoe.ops.cpu import experts as cpu

    x, experts = case(tokens)
    expected = run(reference, filled(layer, on_gpu=False), x, experts)
    found = run(cpu, filled(layer, on_gpu=False), x, experts)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("tokens", "waves"), list(itertools.product([1, 3, 40], [2, 3, 6])))
def test_gather_depends_on_the_waves(layer, tokens, waves):
    """gather_qmm over the slots, on whatever device there is."""
    bank = filled(layer, on_gpu=True)
    # MLX's gather_mm takes bfloat16 on GPUs only.
    x, experts = case(tokens, mx.bfloat16 if ops.on_gpu() else mx.float32)
    whole = run(gather, bank, x, experts)
    assert (run(gather, bank, x, experts, waves) == whole).all()


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gather_differs_from_reference(layer, tokens):
    bank = filled(layer, on_gpu=True)
    x, experts = case(tokens)
    expected = run(reference, bank, x, experts)
    np.testing.assert_allclose(run(gather, bank, x, experts), expected, rtol=1e-2, atol=1e-2)


def test_unknown_ops_are_picked(monkeypatch):
    monkeypatch.setenv(ops.ENV, "fast")
    with pytest.raises(SettingError, match="'fast' is not one of cpu, fused, gather, reference"):
        ops.pick()


def test_ops_of_another_device_are_picked(monkeypatch):
    monkeypatch.setenv(ops.ENV, "cpu" if ops.on_gpu() else "gather")
    with pytest.raises(SettingError, match="does not run on"):
        ops.pick()


def test_ops_without_rounded_activations_take_them(monkeypatch, tmp_path):
    checkpoint = Checkpoint.open(write_toy(tmp_path / "toy"))
    with pytest.raises(SettingError, match="activations='int4' must be one of float32, int8"):
        load_streaming(checkpoint, slots=5, activations="int4")
    monkeypatch.setenv(ops.ENV, "reference")
    with pytest.raises(SettingError, match="'int8' is for the CPU.*'reference'"):
        load_streaming(checkpoint, slots=5, activations="int8")


def test_reference_cannot_be_selected(monkeypatch, tmp_path):
    path = write_toy(tmp_path / "toy")
    tokens = mx.array([[1, 2, 3, 4, 5]])
    fast = load_streaming(Checkpoint.open(path), slots=5)(tokens)
    monkeypatch.setenv(ops.ENV, "reference")
    model = load_streaming(Checkpoint.open(path), slots=5)
    assert type(model.language_model.lm_head) is nn.QuantizedLinear
    np.testing.assert_allclose(np.array(model(tokens)), np.array(fast), atol=1e-3)


@pytest.mark.skipif(ops.on_gpu(), reason="the model computes in float32 on the CPU")
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("padding", [None, [0, 3]])
def test_batch_differs_from_stock_mlx_lm(tmp_path, family, padding):
    """Two rows, with and without left padding, in two chunks and a decode step."""
    path = write_toy(tmp_path / "toy", family)
    stock, _ = load_model(path)
    stock.set_dtype(mx.float32)
    ours = load_streaming(Checkpoint.open(path), slots=5)
    rows = np.random.default_rng(0).integers(0, 160, (2, 12))
    found = []
    for model in (ours, stock):
        cache = [
            ArraysCache(size=2, left_padding=padding) if layer.is_linear else KVCache()
            for layer in model.layers
        ]
        outs = [model(mx.array(rows[:, a:b]), cache=cache) for a, b in ((0, 7), (7, 11), (11, 12))]
        found.append(np.concatenate([np.array(out) for out in outs], axis=1))
    np.testing.assert_allclose(*found, atol=1e-3, rtol=0)


@pytest.mark.skipif(ops.on_gpu(), reason="mlx-lm checks its own shapes")
def test_cache_of_another_model_is_read_out_of_bounds(tmp_path):
    small = write_toy(tmp_path / "small")
    large = write_toy(tmp_path / "large", linear_key_head_dim=64, linear_num_key_heads=1)
    model, other = (load_streaming(Checkpoint.open(p), slots=5) for p in (small, large))
    cache = other.make_cache()
    mx.eval(other(mx.array([[1, 2, 3]]), cache=cache))
    with pytest.raises(ValueError, match="prompt cache is of another model"):
        model(mx.array([[4]]), cache=cache)
