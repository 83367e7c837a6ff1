"""Tests that experts of each form and quantisation are what mlx-lm's own modules compute."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.checkpoint.safetensors_header import read_tensors
from flashmoe.checkpoint.stacked_experts import find_stacked_experts
from flashmoe.ops import backend as ops
from flashmoe.ops.gpu.gather import BACKEND as GATHER
from flashmoe.ops.reference.experts import BACKEND as REFERENCE
from flashmoe.streaming.expert_form import ExpertForm
from flashmoe.streaming.reader import Reader
from flashmoe.streaming.slot_memory import SlotMemory

EXPERTS, TOP_K, HIDDEN, INNER = 5, 3, 64, 96
PREFIX = "model.layers.0.mlp.experts"
AFFINE = {"group_size": 32, "bits": 4}

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="the cpu backend is for the CPU device")


FORMS = {
    "swiglu": lambda: SwitchGLU(HIDDEN, INNER, EXPERTS),
    "swiglu with biases": lambda: SwitchGLU(HIDDEN, INNER, EXPERTS, bias=True),
    "gpt_oss": lambda: SwitchGLU(HIDDEN, INNER, EXPERTS, SwigluOAI(), bias=True),
    "geglu": lambda: SwitchGLU(HIDDEN, INNER, EXPERTS, GeGLU()),
    "mlp": lambda: SwitchMLP(HIDDEN, INNER, EXPERTS, bias=True),
}
MODES = {"plain": None, "affine": AFFINE} | {
    mode: {"group_size": q.group_size, "bits": q.bits, "mode": mode}
    for mode, q in FLOAT_MODES.items()
}


def build(form, how, dtype=mx.bfloat16):
    """Return a module of mlx-lm with random values."""
    mx.random.seed(0)
    module = FORMS[form]()
    for name, array in tree_flatten(module.parameters()):
        part = module[name.split(".")[0]]
        scale = 0.5 if array.ndim == 2 else array.shape[-1] ** -0.5
        part[name.split(".")[1]] = (scale * mx.random.normal(array.shape)).astype(dtype)
    if how:
        nn.quantize(module, **how)
    return module


def slots_of(module, how, directory, activations="float32", on_gpu=False) -> SlotMemory:
    """Save a module as a checkpoint has it, and read all of its experts into slots."""
    arrays = {f"{PREFIX}.{name}": a for name, a in tree_flatten(module.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    tensors, _ = read_tensors(directory)
    layers = find_stacked_experts({"num_hidden_layers": 1}, how, tensors, directory)
    form = ExpertForm.of(module)
    slots = SlotMemory(layers[0], EXPERTS, on_gpu=on_gpu, activations=activations, form=form)
    with Reader() as reader:
        for expert in range(EXPERTS):
            reader.submit(slots.requests(expert, expert)).wait()
    return slots


def case(tokens):
    """Return x (tokens, hidden) and the choices of each token (tokens, TOP_K)."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return x, np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])


def run(backend, slots, x, chosen, waves=1):
    """Return what a backend computes, (tokens, TOP_K, hidden), its experts in some waves."""
    work = backend.start(slots, mx.array(x), TOP_K)
    pairs = {int(e): np.flatnonzero(chosen.reshape(-1) == e) for e in np.unique(chosen)}
    names = list(pairs)
    for wave in range(waves):
        if part := {e: pairs[e] for e in names[wave::waves]}:
            work.run(part)
    return np.array(work.result())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_each_form_in_each_mode_is_what_mlx_lm_computes(form, mode, tmp_path):
    from flashmoe.ops.cpu.experts import BACKEND as CPU

    module = build(form, MODES[mode])
    slots = slots_of(module, MODES[mode], tmp_path)
    module.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    for tokens in (1, 2, 9, 40):
        x, chosen = case(tokens)
        expected = np.array(module(mx.array(x), mx.array(chosen)))
        for backend in (CPU, REFERENCE):
            y = run(backend, slots, x, chosen)
            np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
        for waves in (2, 3):
            np.testing.assert_array_equal(
                run(CPU, slots, x, chosen, waves), run(CPU, slots, x, chosen)
            )


@pytest.mark.parametrize("form", ["gpt_oss", "mlp"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_gathered_products_are_what_mlx_lm_computes(form, mode, tmp_path):
    module = build(form, MODES[mode], mx.float32)
    slots = slots_of(module, MODES[mode], tmp_path, on_gpu=True)
    for tokens in (1, 40):
        x, chosen = case(tokens)
        expected = np.array(module(mx.array(x), mx.array(chosen)))
        np.testing.assert_allclose(run(GATHER, slots, x, chosen), expected, atol=1e-4)


def test_rows_of_many_pairs_are_those_of_each_pair_alone(tmp_path):
    from flashmoe.ops.cpu.experts import BACKEND as CPU

    module = build("gpt_oss", MODES["mxfp4"])
    slots = slots_of(module, MODES["mxfp4"], tmp_path)
    x, chosen = case(12)
    works = [CPU.start(slots, mx.array(x[i : i + 1]), TOP_K) for i in range(12)]
    experts = [{int(e): np.array([k]) for k, e in enumerate(row)} for row in chosen]
    CPU.run_all(works, experts)
    for i, work in enumerate(works):
        alone = run(CPU, slots, x[i : i + 1], chosen[i : i + 1])
        np.testing.assert_array_equal(np.array(work.result()), alone)


@pytest.mark.parametrize("form", ["swiglu", "gpt_oss"])
def test_global_scales_of_nvfp4_multiply_the_products(form, tmp_path):
    from flashmoe.ops.cpu.experts import BACKEND as CPU

    how = MODES["nvfp4"] | {"global_scale": True}
    module = build(form, None, mx.float32)
    plain = {name: module[name].weight for name in ("gate_proj", "up_proj", "down_proj")}
    for name in plain:
        module[name] = module[name].to_quantized(**how)
        part = module[name]
        plain[name] = mx.stack(
            [
                mx.dequantize(
                    part.weight[e],
                    part.scales[e],
                    group_size=16,
                    bits=4,
                    mode="nvfp4",
                    global_scale=part.global_scale[e],
                    dtype=mx.float32,
                )
                for e in range(EXPERTS)
            ]
        )
    slots = slots_of(module, MODES["nvfp4"], tmp_path)
    wide = build(form, None, mx.float32)  # MLX's products on a CPU have no global scale
    for name, weight in plain.items():
        wide[name].weight = weight
    for tokens in (1, 40):
        x, chosen = case(tokens)
        expected = np.array(wide(mx.array(x), mx.array(chosen)))
        for backend in (CPU, REFERENCE):
            y = run(backend, slots, x, chosen)
            np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transpose", [True, False])
def test_matrices_of_heads_are_what_mlx_computes(mode, transpose):
    from flashmoe.ops.cpu import layers
    from flashmoe.ops.recast import recast

    how = MODES[mode]
    stock = MultiLinear(64, 96, 3)
    stock = stock.to_quantized(**how) if how else stock
    kind = layers.QuantizedMultiLinear if how else layers.MultiLinear
    (ours,) = recast(nn.Sequential(stock), lambda path, m: kind if m is stock else None)
    for shape in ((1, 3, 1), (2, 3, 1), (2, 3, 5), (1, 1, 7)):
        x = mx.random.normal((*shape, 64 if transpose else 96))
        expected = np.array(stock(x, transpose))
        np.testing.assert_allclose(np.array(ours(x, transpose)), expected, atol=1e-5, rtol=0)
