"""One token of GatedDeltaNet in one kernel, against mlx-lm's module and against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gated_delta_problems import SHAPES, case, check, in_float64, numpy
from launching import launched
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache

from flashmoe.ops.gpu import layers as gpu_layers
from flashmoe.ops.reference import kernels as kernel_twins
from flashmoe_metal import kernel
from flashmoe_metal.gated_delta_step import gated_delta_step, supports

DTYPES = [mx.float32, mx.bfloat16, mx.float16]

net = pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["kernel", "twin"])
def test_step_differs_from_float64(shape, dtype, how):
    arguments, rest = case(shape, dtype)
    with launched():
        ours = gated_delta_step if how == "kernel" else kernel_twins.gated_delta_step
        found = ours(*arguments, **rest)
    check(found, arguments, **rest)


@pytest.mark.skipif(kernel.available(), reason="a GPU has an order of its own")
def test_order_of_lanes_changes_the_result():
    for shape in (SHAPES["plain"], SHAPES["three_to_one"]):
        arguments, rest = case(shape, mx.bfloat16)
        results = []
        for seed in (0, 1, 2):
            with launched(seed=seed):
                results.append(numpy(gated_delta_step(*arguments, **rest)))
        for other in results[1:]:
            for x, y in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(x, y)


def test_projections_apart_differ_from_joined():
    arguments, rest = case(SHAPES["three_to_one"], mx.float32)
    sizes = [132, 60, 3, 3]
    assert sum(sizes) == arguments[0].shape[-1]
    apart = [arguments[0][..., s : s + n] for s, n in zip(rest["at"], sizes, strict=True)]
    with launched():
        joined = numpy(gated_delta_step(*arguments, **rest))
        found = numpy(gated_delta_step(*apart, *arguments[4:], key_heads=1))
    for x, y in zip(found, joined, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("extreme", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_gates_overflow(extreme):
    """exp of them is 0 or infinite in float32."""
    arguments, rest = case(SHAPES["plain"], mx.float32)
    arguments[:4] = [x * extreme for x in arguments[:4]]
    with launched():
        found = numpy(gated_delta_step(*arguments, **rest))
    with np.errstate(over="ignore"):
        expected = in_float64(arguments, **rest)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).mean())


def test_heads_that_the_kernel_cannot_hold_are_taken():
    fits = {"taps": 4, "value_heads": 4, "key_heads": 2, "rows": 128, "width": 128}
    assert supports(**fits)
    for name, value in {"taps": 1, "width": 30, "rows": 129, "key_heads": 3}.items():
        assert not supports(**fits | {name: value}), name
    assert not supports(**fits | {"width": 4})


def module(family: str, dtype: mx.Dtype, *, bits: int | None, mixed: bool = False):
    """A GatedDeltaNet of mlx-lm with random weights.

    mixed: the small projections in 8 bits, so that not all can be joined.
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
        others = dict.fromkeys(qwen3_next.ModelArgs.__dataclass_fields__, 1)
        net = qwen3_next.Qwen3NextGatedDeltaNet(qwen3_next.ModelArgs(**others | shape))
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


def run(net, pieces, x: mx.array) -> tuple[list[np.ndarray], ArraysCache]:
    cache, outs, start = ArraysCache(size=2), [], 0
    for n in pieces:
        outs.append(net(x[:, start : start + n], None, cache))
        mx.eval(outs[-1], cache.state[0])
        start += n
    return numpy(outs), cache


@net
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_differ_from_mlx_lm(family, bits, mixed):
    """A prompt, several steps, more of the prompt and a step again."""
    pieces = [5, 1, 1, 1, 3, 1]
    x = mx.random.normal((1, sum(pieces), 64), key=mx.random.key(1))
    expected, theirs = run(module(family, mx.float32, bits=bits, mixed=mixed), pieces, x)
    ours = module(family, mx.float32, bits=bits, mixed=mixed)
    gpu_layers.prepare(ours)
    assert len(ours.joined) == (2 if bits and mixed else 1)
    with launched() as launches:
        found, cache = run(ours, pieces, x)
    # Metal has products of its own for one row, as unquantised matrices have everywhere.
    matvecs = len(ours.joined) if bits and not mx.metal.is_available() else 0
    step = ["matvec"] * matvecs + ["gated_delta_step"] + ["matvec"] * bool(matvecs)
    assert launches == step * 4
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    for a, b in zip(numpy(cache.cache), numpy(theirs.cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@net
def test_bfloat16_is_less_exact_than_mlx_lm(family):
    """Against float32, over steps: what the kernel does not round in between may only help."""
    x = mx.random.normal((1, 9, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    pieces = [3] + [1] * 6
    exact = module(family, mx.bfloat16, bits=None)
    exact.set_dtype(mx.float32)
    expected, _ = run(exact, pieces, x.astype(mx.float32))
    theirs, _ = run(module(family, mx.bfloat16, bits=None), pieces, x)
    ours = module(family, mx.bfloat16, bits=None)
    gpu_layers.prepare(ours)
    with launched():
        found, _ = run(ours, pieces, x)

    def error(outs):
        return sum(np.square(a - b).sum() for a, b in zip(outs, expected, strict=True))

    assert error(found) <= 1.5 * error(theirs)


@net
def test_padded_or_batched_calls_reach_the_kernel(family):
    theirs, ours = (module(family, mx.float32, bits=None) for _ in range(2))
    gpu_layers.prepare(ours)
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
        ours(x[:1, :3], None, lengths)
        lengths.prepare(lengths=[1])
        ours(x[:1, 3:], None, lengths)
        # No cache, and one without a state.
        ours(x[:1, :1])
        ours(x[:1, :1], None, ArraysCache(size=2))
    assert launches == []


@net
def test_cache_of_another_model_is_read_out_of_bounds(family):
    net = module(family, mx.float32, bits=None)
    gpu_layers.prepare(net)
    cache = ArraysCache(size=2)
    cache[0], cache[1] = mx.zeros((1, 3, 8)), mx.zeros((1, 1, 8, 8))
    with launched() as launches, pytest.raises(ValueError, match="shape|concatenate"):
        mx.eval(net(mx.zeros((1, 1, 64)), None, cache))
    assert launches == []
