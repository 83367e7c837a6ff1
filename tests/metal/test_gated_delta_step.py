"""Tests the kernel of one GatedDeltaNet step against float64 and against mlx-lm's module."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gated_delta_problems import SHAPES, case, check, in_float64, numpy
from launching import launched
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache

from flashmoe.ops.gpu.layers import recast_layers
from flashmoe.ops.reference import kernels as reference_kernels
from flashmoe_metal import kernel
from flashmoe_metal.gated_delta_step import GatedDeltaInputs, gated_delta_step, supports

DTYPES = [mx.float32, mx.bfloat16, mx.float16]

net = pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["kernel", "reference"])
def test_step_equals_float64_within_rounding(shape, dtype, how):
    inputs, rest = case(shape, dtype)
    with launched():
        implementation = gated_delta_step if how == "kernel" else reference_kernels.gated_delta_step
        outputs = implementation(inputs, **rest)
    check(outputs, inputs, **rest)


@pytest.mark.skipif(kernel.available(), reason="a GPU chooses the order")
def test_result_does_not_depend_on_the_order_of_lanes():
    for shape in (SHAPES["plain"], SHAPES["three_to_one"]):
        inputs, rest = case(shape, mx.bfloat16)
        results = []
        for seed in (0, 1, 2):
            with launched(seed=seed):
                results.append(numpy(gated_delta_step(inputs, **rest)))
        for other in results[1:]:
            for x, y in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(x, y)


def test_separate_projections_give_the_result_of_joined_ones():
    inputs, rest = case(SHAPES["three_to_one"], mx.float32)
    sizes = [132, 60, 3, 3]
    assert sum(sizes) == inputs.qkv.shape[-1]
    pieces = zip(rest["starts"], sizes, strict=True)
    parts = GatedDeltaInputs(*(inputs.qkv[..., s : s + n] for s, n in pieces), *inputs[4:])
    with launched():
        joined = numpy(gated_delta_step(inputs, **rest))
        separate = numpy(gated_delta_step(parts, key_heads=1))
    for x, y in zip(separate, joined, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("extreme", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_gates_do_not_overflow(extreme):
    """Their exponential is 0 or infinite in float32."""
    inputs, rest = case(SHAPES["plain"], mx.float32)
    inputs = GatedDeltaInputs(*(x * extreme for x in inputs[:4]), *inputs[4:])
    with launched():
        outputs = numpy(gated_delta_step(inputs, **rest))
    with np.errstate(over="ignore"):
        expected = in_float64(inputs, **rest)
    for x, y in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).mean())


def test_supports_refuses_heads_that_do_not_fit():
    fits = {"taps": 4, "value_heads": 4, "key_heads": 2, "rows": 128, "width": 128}
    assert supports(**fits)
    for name, value in {"taps": 1, "width": 30, "rows": 129, "key_heads": 3}.items():
        assert not supports(**fits | {name: value}), name
    assert not supports(**fits | {"width": 4})


def module(family: str, dtype: mx.Dtype, *, bits: int | None, mixed: bool = False):
    """Return a GatedDeltaNet of mlx-lm with random weights.

    Args:
        mixed: quantise the small projections to 8 bits, so that not all projections can be joined.
    """
    shape = {
        "hidden_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
    }
    mx.random.seed(3)
    if family == "qwen3_5":
        net = qwen3_5.GatedDeltaNet(qwen3_5.TextModelArgs(**shape))
    else:
        defaults = dict.fromkeys(qwen3_next.ModelArgs.__dataclass_fields__, 1)
        net = qwen3_next.Qwen3NextGatedDeltaNet(qwen3_next.ModelArgs(**defaults | shape))
    net.dt_bias = mx.random.normal(net.dt_bias.shape)
    net.norm.weight = mx.random.uniform(0.5, 1.5, net.norm.weight.shape)
    net.conv1d.weight = mx.random.normal(net.conv1d.weight.shape) * 0.5
    net.set_dtype(dtype)
    net.A_log = net.A_log.astype(mx.float32)
    if bits is not None:

        def settings(path, layer):
            if not hasattr(layer, "to_quantized"):
                return False
            small = path.endswith(("in_proj_b", "in_proj_a", "in_proj_ba"))
            return {"group_size": 32, "bits": 8 if mixed and small else bits}

        nn.quantize(net, class_predicate=settings)
    net.eval()
    return net


def recast(net):
    """Return the version of a net of mlx-lm that uses the kernel."""
    model = nn.Sequential(net)
    recast_layers(model)
    return model.layers[0]


def run(net, chunks, x: mx.array) -> tuple[list[np.ndarray], ArraysCache]:
    """Return the outputs of a net for chunks of x of these lengths, and its cache."""
    cache, outs, start = ArraysCache(size=2), [], 0
    for n in chunks:
        outs.append(net(x[:, start : start + n], None, cache))
        mx.eval(outs[-1], cache.state[0])
        start += n
    return numpy(outs), cache


@net
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_equal_mlx_lm(family, bits, mixed):
    """The steps follow a prompt and each other, with another chunk of a prompt in between."""
    chunks = [5, 1, 1, 1, 3, 1]
    x = mx.random.normal((1, sum(chunks), 64), key=mx.random.key(1))
    expected, theirs = run(module(family, mx.float32, bits=bits, mixed=mixed), chunks, x)
    ours = recast(module(family, mx.float32, bits=bits, mixed=mixed))
    assert len(ours.joined) == (2 if bits and mixed else 1)
    with launched() as launches:
        outputs, cache = run(ours, chunks, x)
    # On Metal, MLX's own products serve one row, as they do for unquantised matrices everywhere.
    matvecs = len(ours.joined) if bits and not mx.metal.is_available() else 0
    step = ["matvec"] * matvecs + ["gated_delta_step"] + ["matvec"] * bool(matvecs)
    prompts = 0 if mx.metal.is_available() else 2
    assert [name for name in launches if name != "gated_delta_prompt"] == step * 4
    assert launches.count("gated_delta_prompt") == prompts
    for a, b in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    for a, b in zip(numpy(cache.cache), numpy(theirs.cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@net
def test_bfloat16_is_about_as_exact_as_mlx_lm(family):
    """Errors are against float32. What the kernel does not round in between may only help."""
    x = mx.random.normal((1, 9, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    chunks = [3] + [1] * 6
    exact = module(family, mx.bfloat16, bits=None)
    exact.set_dtype(mx.float32)
    expected, _ = run(exact, chunks, x.astype(mx.float32))
    theirs, _ = run(module(family, mx.bfloat16, bits=None), chunks, x)
    ours = recast(module(family, mx.bfloat16, bits=None))
    with launched():
        outputs, _ = run(ours, chunks, x)

    def error(outs):
        return sum(np.square(a - b).sum() for a, b in zip(outs, expected, strict=True))

    assert error(outputs) <= 1.5 * error(theirs)


@net
def test_padded_and_batched_calls_do_not_use_the_kernel(family):
    theirs = module(family, mx.float32, bits=None)
    ours = recast(module(family, mx.float32, bits=None))
    x = mx.random.normal((2, 4, 64), key=mx.random.key(4))
    mask = mx.array([[False, True, True, True], [True] * 4])
    with launched() as launches:
        for rows, m in ((2, None), (2, mask), (1, mask[:1])):
            results = []
            for net in (ours, theirs):
                cache = ArraysCache(size=2)
                outs = [net(x[:rows, :3], None if m is None else m[:, :3], cache)]
                outs.append(net(x[:rows, 3:], None if m is None else m[:, 3:], cache))
                results.append(numpy(outs))
            for a, b in zip(*results, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
        lengths = ArraysCache(size=2)
        ours(x[:1, :1], None, lengths)
        lengths.prepare(lengths=[1])
        ours(x[:1, 3:], None, lengths)
        # Calls without a cache, and with a cache that has no state.
        ours(x[:1, :1])
        ours(x[:1, :1], None, ArraysCache(size=2))
    assert launches == []


@net
def test_cache_of_another_model_raises_without_a_launch(family):
    net = recast(module(family, mx.float32, bits=None))
    cache = ArraysCache(size=2)
    cache[0], cache[1] = mx.zeros((1, 3, 8)), mx.zeros((1, 1, 8, 8))
    with launched() as launches, pytest.raises(ValueError, match="shape|concatenate"):
        mx.eval(net(mx.zeros((1, 1, 64)), None, cache))
    assert launches == []
