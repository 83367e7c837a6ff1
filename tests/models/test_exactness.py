"""Tests that streamed logits equal resident ones bit for bit, and stock mlx-lm's within 1e-4."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model
from toys import write_toy

import flashmoe
from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops
from flashmoe.streaming.io_modes import IO_MODES, Direct

on_cpu = pytest.mark.skipif(ops.on_gpu(), reason="on a GPU the model computes in bfloat16")

# The numbers of experts are no multiples of K. There are all kinds of expert weights, and
# dense layers where the family has them.
TOYS = {
    "qwen3_5_moe": {"family": "qwen3_5_moe", "num_experts": 13, "top_k": 3, "bits": 4},
    "qwen3_next": {
        "family": "qwen3_next",
        "num_experts": 9,
        "top_k": 4,
        "bits": 3,
        "dense_layer": True,
        "shards": 3,
    },
    "qwen3_moe": {
        "family": "qwen3_moe",
        "num_experts": 11,
        "top_k": 2,
        "bits": 6,
        "group_size": 64,
        "moe_intermediate_size": 64,
        "dense_layer": True,
        "dtype": "float16",
    },
    "tied": {"family": "qwen3_5_moe", "num_experts": 7, "top_k": 2, "bits": 8, "tie": True},
    "bf16": {"family": "qwen3_moe", "num_experts": 7, "top_k": 3, "bits": None},
    "f32": {"family": "qwen3_next", "num_experts": 7, "top_k": 3, "bits": None, "dtype": "float32"},
}
# Random networks amplify rounding: with noise of 1e-7 on the weights, the logits that stock mlx-lm
# computes for a toy change by 5e-4. The trained demo model must be within 1e-4.
TOY_TOLERANCE = 1e-3
# (tokens of the prompt, tokens of a chunk)
PROMPTS = [(1, 1), (7, 7), (7, 3), (64, 64), (64, 20), (700, 700), (700, 256)]


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


@pytest.fixture(scope="module", params=list(TOYS))
def toy(request, tmp_path_factory):
    path = write_toy(tmp_path_factory.mktemp(request.param), **TOYS[request.param])
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def resident(toy):
    return load_resident(toy.path)


@pytest.fixture(scope="module")
def demo():
    return Checkpoint.open(find(DEMO))


@pytest.fixture(scope="module")
def demo_resident(demo):
    return load_resident(demo.path)


def check(checkpoint, resident, slots, length, chunk, vocab, **settings):
    model = load_streaming(checkpoint, slots=slots, **settings)
    tokens = prompt(length, vocab)
    try:
        streamed = logits(model, tokens, chunk)
    finally:
        model.close()
    assert same(streamed, logits(resident, tokens, chunk))
    return model


@pytest.mark.parametrize(("length", "chunk"), PROMPTS)
def test_streamed_logits_equal_resident_ones(toy, resident, length, chunk):
    vocab = toy.text_config["vocab_size"]
    fewest, most = toy.top_k + 2, toy.num_experts
    for slots in sorted({fewest, (fewest + most) // 2, most}):
        model = check(toy, resident, slots, length, chunk, vocab)
        evictions = sum(b.switch_mlp._table.evictions for b in model.blocks.values())
        if slots == fewest and length >= 7:
            assert evictions > 0, "this case was meant to evict"


@pytest.mark.slow
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (7, 7), (64, 20), (700, 256)])
@pytest.mark.parametrize("slots", [12, 30, 64])
def test_streamed_demo_equals_the_resident_one(demo, demo_resident, slots, length, chunk):
    check(demo, demo_resident, slots, length, chunk, 8192)


@pytest.mark.parametrize("io", [mode for mode in IO_MODES if mode != "buffered"])
def test_io_mode_does_not_change_a_bit(toy, resident, io):
    check(toy, resident, toy.top_k + 2, 64, 20, toy.text_config["vocab_size"], io=io)


@on_cpu
@pytest.mark.parametrize(("length", "chunk"), [(7, 7), (64, 20)])
def test_int8_activations_do_not_depend_on_slots(toy, length, chunk):
    resident = load_resident(toy.path, "int8")
    vocab = toy.text_config["vocab_size"]
    for slots in (toy.top_k + 2, toy.num_experts):
        check(toy, resident, slots, length, chunk, vocab, activations="int8")


@on_cpu
def test_int8_activations_change_the_logits_a_little(demo, demo_resident):
    """Only the logits of the demo model may change, by little; the router is not rounded."""
    model = load_streaming(demo, slots=64, activations="int8")
    tokens = prompt(20, 8192)
    exact, rounded = (logits(m, tokens, 20, decode=0)[0] for m in (demo_resident, model))
    assert 0 < np.abs(rounded - exact).mean() < 0.2
    activations = {
        name.rpartition(".")[2]: module.activations
        for name, module in model.named_modules()
        if hasattr(module, "activations") and hasattr(module, "bits")
    }
    model.close()
    routers = {"gate": "float32", "shared_expert_gate": "float32"}
    assert {k: v for k, v in activations.items() if v == "float32"} == routers
    assert {"q_proj", "down_proj", "in_proj_qkv", "out_proj"} <= activations.keys()


def test_direct_reads_into_slots_do_not_change_a_bit(tmp_path, monkeypatch):
    """Experts here fill whole blocks, as in real models; those of the other toys need a copy."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 12}
    toy = Checkpoint.open(write_toy(tmp_path, bits=None, **sizes))
    in_place, read = [], Direct._read_in_place

    def counted(*args):
        in_place.append(read(*args))
        return in_place[-1]

    monkeypatch.setattr(Direct, "_read_in_place", counted)
    vocab = toy.text_config["vocab_size"]
    model = check(toy, load_resident(tmp_path), toy.top_k + 2, 64, 20, vocab, io="direct")
    assert sum(in_place) == model.stats.reads.bytes > 0


@pytest.mark.parametrize("experts", [1, 2])
def test_pruned_logits_do_not_depend_on_slots(toy, resident, experts):
    tokens = prompt(40, toy.text_config["vocab_size"])
    with resident.pruned_to(experts):
        expected = logits(resident, tokens, 16)
    model = load_streaming(toy, slots=toy.top_k + 2, experts=experts)
    assert model.experts == experts
    assert same(logits(model, tokens, 16), expected)
    model.close()


@on_cpu
def test_toy_equals_stock_mlx_lm(toy):
    stock, _ = load_model(toy.path)
    stock.set_dtype(mx.float32)
    model = load_streaming(toy, slots=toy.top_k + 2)
    tokens = prompt(33, toy.text_config["vocab_size"])
    for ours, theirs in zip(logits(model, tokens, 16), logits(stock, tokens, 16), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOY_TOLERANCE, rtol=0)
    model.close()


@on_cpu
def test_pruned_toy_equals_stock_mlx_lm_with_the_same_top_k(toy):
    stock, _ = load_model(toy.path)
    stock.set_dtype(mx.float32)
    for layer in stock.layers:
        if hasattr(layer.mlp, "switch_mlp"):
            layer.mlp.top_k = 1
    model = load_streaming(toy, slots=toy.top_k + 2, experts=1)
    tokens = prompt(20, toy.text_config["vocab_size"])
    for ours, theirs in zip(logits(model, tokens, 20), logits(stock, tokens, 20), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOY_TOLERANCE, rtol=0)
    model.close()


SUBJECTS = "a cat|the sea|a lost key|two friends|the moon|a small garden|rain|an old clock|bread"
QUESTIONS = [f"Tell me a short story about {x}." for x in SUBJECTS.split("|")] + [
    "What is a friend?",
    "Why do leaves fall?",
    "Name three colours.",
    "How do I make tea?",
    "Write a poem about snow.",
    "My name is Ada. What is my name?",
    "Explain why the sky is blue.",
    "Give me a tip for sleeping well.",
    "What can I cook with eggs?",
    "Describe a forest.",
    "Say hello in a kind way.",
]


@pytest.mark.slow
@on_cpu
def test_demo_writes_the_greedy_text_of_stock_mlx_lm():
    """For 10 prompts and 16 tokens each, the text is the same and logits are within 1e-4."""
    stock, tokenizer = mlx_lm.load(str(find(DEMO)))
    stock.set_dtype(mx.float32)
    model, _ = flashmoe.load(find(DEMO), slots=16)
    for question in QUESTIONS[::2]:
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        steps = [
            mlx_lm.stream_generate(m, tokenizer, tokens, max_tokens=16) for m in (model, stock)
        ]
        for ours, theirs in zip(*steps, strict=True):
            assert ours.token == theirs.token, question
            assert mx.abs(ours.logprobs - theirs.logprobs).max().item() <= 1e-4, question
    model.close()
