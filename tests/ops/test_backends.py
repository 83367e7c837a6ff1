"""Tests that the backends compute the same, and that only a backend of the device is chosen."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.utils import load_model
from toys import HIDDEN, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.models.loading import load_streaming
from flashmoe.ops import backend as ops
from flashmoe.ops.gpu.gather import BACKEND as GATHER
from flashmoe.ops.reference.experts import BACKEND as REFERENCE
from flashmoe.streaming.reader import Reader
from flashmoe.streaming.slot_memory import SlotMemory

EXPERTS, TOP_K = 6, 3


@pytest.fixture(scope="module", params=[4, None], ids=["4bit", "bf16"])
def layer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ops")
    path = write_toy(directory, num_experts=EXPERTS, top_k=TOP_K, bits=request.param)
    return Checkpoint.open(path).expert_layers[0]


def filled_slots(layer, *, on_gpu: bool) -> SlotMemory:
    """Return slot memory that holds each expert of a layer in the slot of its number."""
    slots = SlotMemory(layer, EXPERTS, on_gpu=on_gpu)
    with Reader() as reader:
        for expert in range(EXPERTS):
            reader.submit(slots.requests(expert, expert)).wait()
    return slots


def case(tokens: int, dtype=mx.float32):
    """Return activations (tokens, hidden), and for each chosen expert the indices of its pairs."""
    rng = np.random.default_rng(tokens)
    x = mx.array(rng.normal(size=(tokens, HIDDEN)).astype(np.float32)).astype(dtype)
    chosen = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).reshape(-1)
    return x, {int(e): np.flatnonzero(chosen == e) for e in np.unique(chosen)}


def run(backend, slots, x, experts, waves=1) -> np.ndarray:
    """Return the outputs of a backend that computes the experts in this many waves."""
    work = backend.start(slots, x, TOP_K)
    names = list(experts)
    for wave in range(waves):
        part = {e: experts[e] for e in names[wave::waves]}
        if part:
            work.run(part)
    return np.array(work.result().astype(mx.float32))


@pytest.mark.parametrize("tokens", [1, 3, 25, 70])
def test_cpu_backend_equals_the_reference(layer, tokens):
    if ops.on_gpu():
        pytest.skip("the cpu backend is for the CPU device")
    from flashmoe.ops.cpu.experts import BACKEND as CPU

    x, experts = case(tokens)
    expected = run(REFERENCE, filled_slots(layer, on_gpu=False), x, experts)
    outputs = run(CPU, filled_slots(layer, on_gpu=False), x, experts)
    np.testing.assert_allclose(outputs, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("tokens", "waves"), list(itertools.product([1, 3, 40], [2, 3, 6])))
def test_gather_gives_the_same_bits_in_any_number_of_waves(layer, tokens, waves):
    """It runs gather_qmm over the slots, on the GPU or the CPU."""
    slots = filled_slots(layer, on_gpu=True)
    # MLX's gather_mm supports bfloat16 on GPUs only.
    x, experts = case(tokens, mx.bfloat16 if ops.on_gpu() else mx.float32)
    whole = run(GATHER, slots, x, experts)
    assert (run(GATHER, slots, x, experts, waves) == whole).all()


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gather_equals_the_reference(layer, tokens):
    slots = filled_slots(layer, on_gpu=True)
    x, experts = case(tokens)
    expected = run(REFERENCE, slots, x, experts)
    np.testing.assert_allclose(run(GATHER, slots, x, experts), expected, rtol=1e-2, atol=1e-2)


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(ops.ENV, "fast")
    with pytest.raises(SettingError, match="'fast' is not one of cpu, fused, gather, reference"):
        ops.pick()


def test_backend_of_another_device_is_refused(monkeypatch):
    monkeypatch.setenv(ops.ENV, "cpu" if ops.on_gpu() else "gather")
    with pytest.raises(SettingError, match="does not run on"):
        ops.pick()


def test_int8_activations_are_refused_outside_the_cpu_backend(monkeypatch, tmp_path):
    checkpoint = Checkpoint.open(write_toy(tmp_path / "toy"))
    with pytest.raises(SettingError, match="activations='int4' must be one of float32, int8"):
        load_streaming(checkpoint, slots=5, activations="int4")
    monkeypatch.setenv(ops.ENV, "reference")
    with pytest.raises(SettingError, match="'int8' is for the CPU.*'reference'"):
        load_streaming(checkpoint, slots=5, activations="int8")


def test_reference_backend_can_be_selected(monkeypatch, tmp_path):
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
def test_batch_equals_stock_mlx_lm(tmp_path, family, padding):
    """The two sequences, with and without left padding, are two chunks and a decode step."""
    path = write_toy(tmp_path / "toy", family)
    stock, _ = load_model(path)
    stock.set_dtype(mx.float32)
    ours = load_streaming(Checkpoint.open(path), slots=5)
    tokens = np.random.default_rng(0).integers(0, 160, (2, 12))
    results = []
    for model in (ours, stock):
        cache = [
            ArraysCache(size=2, left_padding=padding) if layer.is_linear else KVCache()
            for layer in model.layers
        ]
        outs = [
            model(mx.array(tokens[:, a:b]), cache=cache) for a, b in ((0, 7), (7, 11), (11, 12))
        ]
        results.append(np.concatenate([np.array(out) for out in outs], axis=1))
    np.testing.assert_allclose(*results, atol=1e-3, rtol=0)


@pytest.mark.skipif(ops.on_gpu(), reason="mlx-lm checks its own shapes")
def test_cache_of_another_model_is_refused(tmp_path):
    small = write_toy(tmp_path / "small")
    large = write_toy(tmp_path / "large", linear_key_head_dim=64, linear_num_key_heads=1)
    model, other = (load_streaming(Checkpoint.open(p), slots=5) for p in (small, large))
    cache = other.make_cache()
    mx.eval(other(mx.array([[1, 2, 3]]), cache=cache))
    with pytest.raises(ValueError, match="prompt cache is of another model"):
        model(mx.array([[4]]), cache=cache)
