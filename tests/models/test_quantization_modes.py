"""Tests that models in each mode of MLX's quantisation stream exactly, alone and mixed."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from toys import FAMILIES, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops

AFFINE = {"group_size": 32, "bits": 5, "mode": "affine"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}


def mixed(path: str) -> dict | None:
    """Return the mode of some modules: down projections in 5 bits, attention in mxfp8."""
    if path.endswith("down_proj"):
        return AFFINE
    return MXFP8 if "attn" in path else None


TOYS = {mode: {"mode": mode} for mode in FLOAT_MODES} | {
    "mixed": {"mode": "mxfp4", "choose": mixed},
    "tied": {"mode": "nvfp4", "tie": True},
}


@pytest.fixture(scope="module", params=list(TOYS))
def toy(request, tmp_path_factory):
    settings = TOYS[request.param]
    form = FLOAT_MODES[settings["mode"]]
    number = list(TOYS).index(request.param)
    path = write_toy(
        tmp_path_factory.mktemp(request.param),
        FAMILIES[number % 3],
        bits=form.bits,
        group_size=form.group_size,
        layers=2 if number % 3 == 2 else 4,
        **settings,
    )
    return Checkpoint.open(path)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_streamed_logits_equal_resident_ones(toy, activations):
    if ops.on_gpu() and activations == "int8":
        pytest.skip("activations are rounded on a CPU")
    tokens = np.random.default_rng(0).integers(0, 160, 40).tolist()
    resident = load_resident(toy.path, activations)
    model = load_streaming(toy, slots=toy.top_k + 2, activations=activations)
    try:
        assert same(logits(model, tokens, 30), logits(resident, tokens, 30))
        assert sum(block.switch_mlp.evictions for block in model.blocks.values()) > 0
    finally:
        model.close()
        resident.close()


@pytest.mark.skipif(ops.on_gpu(), reason="on a GPU the model computes in bfloat16")
def test_logits_are_those_of_stock_mlx_lm(toy):
    stock, _ = load_model(toy.path)
    stock.set_dtype(mx.float32)
    model = load_streaming(toy, slots=toy.num_experts)
    tokens = np.random.default_rng(1).integers(0, 160, 24).tolist()
    try:
        for ours, theirs in zip(logits(model, tokens, 16), logits(stock, tokens, 16), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    finally:
        model.close()
