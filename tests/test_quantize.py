"""`flashmoe quantize`, through the real command."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import rounding
from flashmoe.checkpoint import Checkpoint
from flashmoe.cli import cli
from flashmoe.loading import load_streaming
from toys import FAMILIES, write_toy

TEXT = "The cat sat by the sea. It asked a friend what bread is made of, and why leaves fall. "


def run(*args, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["quantize", *map(str, args)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def run_json(*args) -> dict:
    return json.loads(run(*args, "--json"))


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def tensors(directory: Path) -> dict[str, mx.array]:
    found = {}
    for file in directory.glob("model*.safetensors"):
        found |= mx.load(str(file))
    return found


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_result_is_not_the_model_that_mlx_lm_loads(tmp_path, family, bits):
    """Stock mlx-lm in float32 and flashmoe compute the same from it."""
    path = write_toy(tmp_path / "toy", family, bits=bits, shards=2)
    out = tmp_path / "out"
    run(path, out, "--gate-up", 3, "--down", 4, "--dense", 6, "--group-size", 32)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.expert_bits == pytest.approx(10 / 3)
    stock, config = mlx_lm.utils.load_model(out)
    assert config["quantization"] == checkpoint.config["quantization_config"]
    stock.set_dtype(mx.float32)
    ids = mx.array([[5, 17, 3, 90, 41, 8]])
    ours = load_streaming(checkpoint, slots=5)
    try:
        np.testing.assert_allclose(np.array(ours(ids)), np.array(stock(ids)), atol=2e-4)
    finally:
        ours.close()
    before, after = tensors(path), tensors(out)
    for name, tensor in before.items():
        if "norm" in name or ".mlp.gate." in name or "shared_expert_gate" in name:
            assert same(tensor, after[name]), name


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_same_bits_are_other_bits(tmp_path, bits, group_size):
    sizes = {"moe_intermediate_size": 128, "layers": 4}
    path = write_toy(tmp_path / "toy", bits=bits, group_size=group_size, num_experts=3, **sizes)
    run(path, tmp_path / "out", "--bits", bits, "--group-size", group_size)
    before, after = tensors(path), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    kind=st.sampled_from(["normal", "outliers", "constant", "zero", "positive", "one column"]),
)
def test_search_is_worse_than_plain_rounding(seed, bits, group_size, dtype, kind):
    random = np.random.default_rng(seed)
    w = random.standard_normal((3, 256)).astype(np.float32) * np.float32(0.02)
    h = np.square(random.standard_normal(256)).astype(np.float32)
    if kind == "outliers":
        w[:, ::50] *= 30
    elif kind == "constant":
        w[:] = w[0, 0]
    elif kind == "zero":
        w[:] = 0
    elif kind == "positive":
        w = abs(w) + np.float32(0.1)
    elif kind == "one column":
        h[:] = 0
        h[7] = 1
    found = rounding.search(w, h, bits, group_size, dtype)
    stored = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    for values in (found.scales, found.biases):
        assert same(mx.array(values), mx.array(values).astype(stored).astype(mx.float32))
    packed = (mx.array(a) for a in (found.weight, found.scales, found.biases))
    back = np.array(mx.dequantize(*packed, group_size, bits))
    slack = 1e-12 * float((np.square(w) @ h).sum())
    assert float((np.square(back - w) @ h).sum()) <= found.error * 1.001 + slack
    assert found.error <= found.plain
    weight, *both = mx.quantize(mx.array(w), group_size, bits)
    both = (a.astype(stored).astype(mx.float32) for a in both)
    mlx = np.array(mx.dequantize(weight, *both, group_size, bits))
    # MLX takes codes before it rounds the scale: ours are the nearest for the scale that is kept.
    assert found.error <= float((np.square(mlx - w) @ h).sum()) * 1.001 + slack


def test_weights_of_the_error_are_not_used():
    random = np.random.default_rng(0)
    w = random.standard_normal((64, 256)).astype(np.float32)
    h = np.exp(2 * random.standard_normal(256)).astype(np.float32)
    h /= h.mean()
    weighed = rounding.search(w, h, 2, 64, "BF16")
    flat = rounding.search(w, np.ones_like(h), 2, 64, "BF16")
    packed = (mx.array(a) for a in (flat.weight, flat.scales, flat.biases))
    error = float((np.square(np.array(mx.dequantize(*packed, 64, 2)) - w) @ h).sum())
    assert weighed.error < 0.8 * error
    assert weighed.error < 0.5 * weighed.plain
