"""Tests that models of other types, whose layers go through the CPU's kernels, stay themselves."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model
from moe_types import write_moe

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import logits
from flashmoe.ops import backend as ops

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="the kernels are for the CPU")

# Biases of experts, latent attention, routers with a matrix of their own, a head with a bias,
# SwitchMLP, tied embeddings and plain weights are among them.
TYPES = {
    "gpt_oss": 4,
    "deepseek_v2": 4,
    "deepseek_v3": 4,
    "glm4_moe": 4,
    "phimoe": 4,
    "nemotron_h": 4,
    "gemma4": 4,
    "kimi_linear": None,
}


@pytest.mark.parametrize("name", TYPES)
def test_logits_are_those_of_stock_mlx_lm_and_no_matrix_is_left_to_mlx(name, tmp_path):
    checkpoint = Checkpoint.open(write_moe(tmp_path / name, name, bits=TYPES[name]))
    model = load_streaming(checkpoint, slots=checkpoint.num_experts, prompt_cache=0)
    stock, _ = load_model(checkpoint.path)
    stock.set_dtype(mx.float32)
    tokens = np.random.default_rng(0).integers(0, 150, 24).tolist()
    try:
        for ours, theirs in zip(logits(model, tokens, 16), logits(stock, tokens, 16), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
        for path, module in model.named_modules():
            matrix = module.get("weight")
            if isinstance(matrix, mx.array) and matrix.ndim > 1 and not _is_stock(module):
                assert "flashmoe" in type(module).__module__, path
    finally:
        model.close()


def _is_stock(module: nn.Module) -> bool:
    """Return whether a module is meant to be mlx-lm's: it looks up rows, or convolves."""
    return isinstance(module, nn.Embedding | nn.Conv1d)
