"""Test that caches are measured, and blocks looked at, without computing anything."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from moe_types import config_of, write_moe

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.memory.dry_run import DryModel, cache_sizes
from flashmoe.models.loading import load_streaming
from flashmoe.ops.reference.experts import BACKEND as REFERENCE


def test_model_of_true_size_takes_no_memory():
    """One layer of DeepSeek-V3: 22 GB of experts in float32."""
    config = config_of("deepseek_v3") | {
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "num_hidden_layers": 2,
    }
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    dry = DryModel(config)
    logits = dry.run(512, dry.new_cache())
    assert logits.shape == (1, 512, 129280)
    assert [call.top_k for call in dry.calls.values()] == [8]
    assert mx.get_peak_memory() - before < 10**6


@pytest.mark.parametrize(
    "name", ["gpt_oss", "deepseek_v32", "granitemoehybrid", "llama4", "longcat_flash_ngram"]
)
@pytest.mark.parametrize("tokens", [40, 600])
def test_measured_caches_are_not_smaller_than_real_ones(tmp_path, name, tokens):
    checkpoint = Checkpoint.open(write_moe(tmp_path / "toy", name))
    model = load_streaming(checkpoint, slots=8, prompt_cache=0, backend=REFERENCE)
    cache = make_prompt_cache(model)
    for start in range(0, tokens, 512):
        count = min(512, tokens - start)
        mx.eval(model(mx.zeros((1, count), mx.int32), cache=cache))
    model.close()
    real = sum(entry.nbytes for entry in cache)
    planned = cache_sizes(checkpoint.config).nbytes(-(-tokens // 256) * 256)
    assert real <= planned < 30 * real


def test_shared_expert_that_gets_the_input_of_the_experts_after_them_is_found():
    for name, found in [("glm4_moe", 1), ("laguna", 0), ("nemotron_h", 0), ("gpt_oss", 0)]:
        dry = DryModel(config_of(name))
        dry.run(1, dry.new_cache())
        assert len(dry.shared) == found, name
