"""Tests the GPU versions of the layers around the experts against mlx-lm's layers."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from launching import launched
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_next
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from toys import FAMILIES, HIDDEN, write_toy

from flashmoe.ops.gpu.joined import join_layers
from flashmoe.ops.gpu.layers import recast_layers
from flashmoe.ops.recast import recast
from flashmoe.ops.reference import kernels as reference_kernels
from flashmoe.streaming.block import ExpertBlock
from flashmoe_metal.add_norm import add_norm, supports
from flashmoe_metal.qk_norm_rope import HeadLayout, QkInputs, qk_norm_rope

#: The largest relative distance between neighbouring numbers of a type.
SPACING = {mx.float32: 1e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}


def numpy(x: mx.array) -> np.ndarray:
    """Return an array as NumPy float32."""
    return np.array(x.astype(mx.float32))


@pytest.mark.parametrize("dtype", SPACING, ids=str)
@pytest.mark.parametrize(("rows", "width"), list(itertools.product([1, 3, 16], [5, 64, 100, 4200])))
def test_add_norm_equals_its_reference(dtype, rows, width):
    mx.random.seed(rows * width)
    x, r = (mx.random.normal((1, rows, width)).astype(dtype) for _ in range(2))
    weight = mx.random.normal((width,)).astype(dtype)
    eps = mx.array([1e-6])
    assert supports(x, r, weight)
    with launched():
        h, normed = add_norm(x, r, weight, eps)
    expected = reference_kernels.add_norm(x, r, weight, eps)
    np.testing.assert_array_equal(numpy(h), numpy(expected[0]))
    # The reference rounds twice, and each time the last bit may differ.
    np.testing.assert_allclose(numpy(normed), numpy(expected[1]), rtol=2 * SPACING[dtype])


@pytest.mark.parametrize("dtype", SPACING, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (32, 8), (50, 20), (256, 64)])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1.0), (7, 0.25), (40_000, 1.0)])
def test_qk_norm_rope_equals_its_reference(dtype, gated, width, rotated, offset, scale):
    heads, key_heads = 3, 2
    mx.random.seed(width + offset)
    sizes = heads * width * (2 if gated else 1), key_heads * width
    both = mx.random.normal((1, 1, sum(sizes) + 5)).astype(dtype)
    weights = [mx.random.normal((width,)).astype(dtype) for _ in range(2)]
    eps, rope = mx.array([1e-6, 1e-5]), mx.array([np.log2(1e7), scale])
    inputs = QkInputs(both, both, *weights, eps, rope, mx.array([offset], mx.int32))
    layout = HeadLayout(heads, key_heads, rotated, gated, starts=(5, 5 + sizes[0]))
    with launched():
        outputs = qk_norm_rope(inputs, layout)
    expected = reference_kernels.qk_norm_rope(inputs, layout)
    # The error of an angle grows with the position, of which a float has only so many digits.
    angle = 1e-7 * offset * 4
    for x, y in list(zip(outputs, expected, strict=True))[: 2 + gated]:
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        atol = (2 * SPACING[dtype] + angle) * np.abs(numpy(y)).max()
        np.testing.assert_allclose(numpy(x), numpy(y), rtol=0, atol=atol)


def test_add_norm_supports_few_rows_of_one_dtype():
    x, weight = mx.zeros((1, 17, 8)), mx.ones(8)
    assert not supports(x, x, weight)
    one = x[:, :1]
    assert supports(one, one, weight)
    assert not supports(one, one.astype(mx.float16), weight)
    assert not supports(one, one, weight.astype(mx.bfloat16))


def stock(path) -> nn.Module:
    """Return the model of mlx-lm in float32."""
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, None])
def test_model_with_gpu_layers_equals_mlx_lm(tmp_path, family, bits):
    """The calls are a prompt, steps, a longer chunk and a batch."""
    path = write_toy(tmp_path / "toy", family, bits=bits)
    tokens = np.random.default_rng(0).integers(0, 160, (1, 10))
    theirs, ours = stock(path), stock(path)
    recast_layers(ours)
    results = []
    for model in (theirs, ours):
        cache = make_prompt_cache(model)
        with launched() as launches:
            outs = [
                model(mx.array(tokens[:, a:b]), cache=cache)
                for a, b in ((0, 5), (5, 6), (6, 7), (7, 10))
            ]
            outs.append(model(mx.array(np.repeat(tokens, 2, axis=0))))
        results.append([numpy(out) for out in outs])
    for a, b in zip(*results, strict=True):
        # Logits of up to 4; each layer sums in another order than mlx-lm.
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)
    linear = sum(getattr(layer, "is_linear", False) for layer in ours.layers)
    assert launches.count("gated_delta_step") == 2 * linear
    assert launches.count("qk_norm_rope") == 2 * (len(ours.layers) - linear)
    assert launches.count("add_norm") == 4 * len(ours.layers)


def test_residual_is_added_once(tmp_path):
    """A block that has `fuses_residual` adds the residual itself."""
    path = write_toy(tmp_path / "toy", "qwen3_next", dense_layer=True)
    theirs, ours = stock(path), stock(path)
    recast_layers(ours)

    block = qwen3_next.Qwen3NextSparseMoeBlock

    class Whole(ExpertBlock, block):
        fuses_residual = True

        def run(self, xs, residuals):
            return (h + block.__call__(self, x) for x, h in zip(xs, residuals, strict=True))

    assert recast(ours, lambda path, module: Whole if type(module) is block else None)
    tokens = mx.array([[1, 2, 3]])
    with launched():
        logits = ours(tokens)
    np.testing.assert_allclose(numpy(logits), numpy(theirs(tokens)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_weights_replace_the_separate_ones(tmp_path, family):
    path = write_toy(tmp_path / "toy", family)
    theirs, ours = stock(path), stock(path)
    recast_layers(ours)
    recast_layers(ours)  # changes nothing
    before, after = (dict(tree_flatten(m.parameters())) for m in (theirs, ours))
    replaced = ("_proj_qkv", "_proj_z", "_proj_b", "_proj_a", "_proj_qkvz", "_proj_ba", "k_proj")
    assert not [name for name in after if any(f"{r}." in name for r in replaced)]
    added = sum(v.nbytes for v in after.values()) - sum(v.nbytes for v in before.values())
    assert 0 <= added < 127 * HIDDEN * len(ours.layers)


def test_only_layers_of_one_kind_are_joined():
    def linear(rows, **quantised):
        layer = nn.Linear(64, rows, bias=quantised.pop("bias", False))
        return nn.QuantizedLinear.from_linear(layer, **quantised) if quantised else layer

    x = mx.random.normal((1, 64))
    four = {"group_size": 32, "bits": 4}
    for layers, products in (
        ([linear(8, **four), linear(16, **four)], 1),
        ([linear(8, **four), linear(16, **four | {"bits": 8})], 2),
        ([linear(8, **four), linear(16, **four | {"group_size": 64})], 2),
        ([linear(8, mode="mxfp4"), linear(16, mode="mxfp4"), linear(8)], 2),
        ([linear(8), linear(16, bias=True), linear(5, bias=True)], 2),
    ):
        expected = [layer(x) for layer in layers]
        mx.eval(expected)
        joined, slices = join_layers(layers)
        assert len(joined) == products
        outputs = [layer(x) for layer in joined]
        for part, y in zip(slices, expected, strict=True):
            np.testing.assert_allclose(numpy(part.select_from(outputs)), numpy(y), atol=1e-5)


@pytest.mark.parametrize("changed", ["rope", "offset", "dtype", "training"])
def test_unsupported_attention_does_not_use_the_kernel(tmp_path, changed):
    model = stock(write_toy(tmp_path / "toy", "qwen3_moe", layers=1))
    recast_layers(model)
    cache = make_prompt_cache(model)
    attention = model.layers[0].self_attn
    mx.eval(model(mx.array([[1, 2]]), cache=cache))
    if changed == "rope":
        attention.rope = nn.RoPE(32, traditional=True)
    elif changed == "offset":
        cache[0].offset = mx.array([2])
    elif changed == "dtype":
        attention.q_norm.weight = attention.q_norm.weight.astype(mx.float16)
    else:
        model.train()
    x = mx.random.normal((1, 1, HIDDEN))
    with launched() as launches:
        if changed == "offset":
            # Only the cache of a batch can advance such an offset.
            assert not attention.can_use_kernel(x, x.dtype, cache[0])
        else:
            mx.eval(attention(x, None, cache[0]))
    assert set(launches) <= {"matvec"}
