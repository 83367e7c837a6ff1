"""Tests the parts of mlx-lm that this project relies on.

When an upgrade of mlx-lm changes one of them, these tests fail first and say what changed.
"""

import importlib
import inspect

import llguidance
import mlx.core as mx
import pytest
from mlx_lm import sample_utils, tokenizer_utils, utils
from mlx_lm.models import cache, qwen3_5, qwen3_5_moe, qwen3_moe, qwen3_next, switch_layers
from mlx_lm.models.activations import swiglu

# As an attribute, `mlx_lm.generate` is the function and not the module.
generate = importlib.import_module("mlx_lm.generate")


def parameters(function) -> list[str]:
    """Return the names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def source(definition) -> str:
    """Return the source of a class or function."""
    return inspect.getsource(definition)


def test_moe_block_of_qwen3_next_is_unchanged():
    """SharedExpertBlock repeats the block's forward pass and starts the reads earlier."""
    block = qwen3_next.Qwen3NextSparseMoeBlock
    assert qwen3_5.SparseMoeBlock is block
    text = source(block)
    for line in (
        "gates = self.gate(x)",
        "gates = mx.softmax(gates, axis=-1, precise=True)",
        "inds = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]",
        "scores = mx.take_along_axis(gates, inds, axis=-1)",
        "if self.norm_topk_prob:",
        "y = self.switch_mlp(x, inds)",
        "y = (y * scores[..., None]).sum(axis=-2)",
        "shared_y = mx.sigmoid(self.shared_expert_gate(x)) * shared_y",
    ):
        assert line in text, f"mlx-lm changed {block.__name__}: {line!r} is gone"


def test_moe_block_of_qwen3_moe_is_unchanged():
    text = source(qwen3_moe.Qwen3MoeSparseMoeBlock)
    for line in (
        "gates = self.gate(x)",
        "gates = mx.softmax(gates, axis=-1, precise=True)",
        "inds = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]",
        "y = self.switch_mlp(x, inds)",
        "y = (y * scores[..., None]).sum(axis=-2)",
    ):
        assert line in text, f"mlx-lm changed Qwen3MoeSparseMoeBlock: {line!r} is gone"


@pytest.mark.parametrize("module", [qwen3_5_moe, qwen3_next, qwen3_moe])
def test_model_classes_are_unchanged(module):
    assert parameters(module.Model.__init__) == ["self", "args"]
    assert parameters(module.Model.sanitize) == ["self", "weights"]
    assert isinstance(inspect.getattr_static(module.Model, "layers"), property)
    assert hasattr(module.ModelArgs, "from_dict")


def test_switch_glu_is_unchanged():
    assert parameters(switch_layers.SwitchGLU.__call__) == ["self", "x", "indices"]
    # The backends call swiglu(gate, up).
    gate, up = mx.array([1.0]), mx.array([3.0])
    assert swiglu(gate, up).item() == pytest.approx(3 / (1 + 2.718281828**-1))


def test_loading_functions_are_unchanged():
    assert {"lazy", "get_model_classes"} <= set(parameters(utils.load_model))
    assert "eos_token_ids" in parameters(utils.load_tokenizer)
    assert parameters(utils.load_config)[0] == "model_path"
    assert 'glob.glob(str(model_path / "model*.safetensors"))' in source(utils.load_model)


def test_generation_functions_are_unchanged():
    assert {"prompt", "max_tokens"} <= set(parameters(generate.stream_generate))
    assert {"sampler", "prefill_step_size", "prompt_progress_callback", "prompt_cache"} <= set(
        parameters(generate.generate_step)
    )
    assert {"temp", "top_p", "min_p", "top_k"} <= set(parameters(sample_utils.make_sampler))
    for name in ("has_thinking", "think_start", "think_end", "think_start_tokens"):
        assert hasattr(tokenizer_utils.TokenizerWrapper, name)
    for name in ("tool_call_start_tokens", "tool_call_end_tokens", "tool_parser", "detokenizer"):
        assert hasattr(tokenizer_utils.TokenizerWrapper, name)
    assert {"repetition_penalty", "repetition_context_size"} <= set(
        parameters(sample_utils.make_logits_processors)
    )
    assert parameters(generate.wired_limit)[0] == "model"


def test_prompt_caches_are_unchanged():
    assert parameters(cache.save_prompt_cache) == ["file_name", "cache", "metadata"]
    assert "return_metadata" in parameters(cache.load_prompt_cache)
    for kind in (cache.KVCache, cache.ArraysCache):
        assert isinstance(inspect.getattr_static(kind, "nbytes"), property)
        assert isinstance(inspect.getattr_static(kind, "state"), property)


@pytest.mark.parametrize("module", [qwen3_5, qwen3_next, qwen3_moe])
def test_head_is_unchanged(module):
    """StreamingMoE.next_logits applies the head to the last position alone."""
    text = source(getattr(module, "TextModel", None) or module.Model)
    for line in (
        "out = self.model(inputs, cache",
        "if self.args.tie_word_embeddings:",
        "out = self.model.embed_tokens.as_linear(out)",
        "out = self.lm_head(out)",
    ):
        assert line in text, f"mlx-lm changed {module.__name__}: {line!r} is gone"


def test_grammar_functions_are_unchanged():
    for name in ("grammar_from_lark", "validate_grammar_with_warnings", "compute_ff_tokens"):
        assert hasattr(llguidance.LLMatcher, name)
    for name in ("consume_token", "consume_tokens", "is_stopped", "is_error", "get_error"):
        assert hasattr(llguidance.LLMatcher, name)


def test_mlx_can_clear_streams():
    assert hasattr(mx, "clear_streams"), "the engine thread calls it at its end"


@pytest.mark.parametrize(
    "layer",
    [qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer, qwen3_moe.Qwen3MoeDecoderLayer],
)
def test_decoder_layers_are_unchanged(layer):
    """flashmoe.ops.gpu.layers repeats the forward pass with a sum and a norm in one kernel."""
    text = source(layer)
    for line in ("self.input_layernorm(x), mask, cache)", "h = x + r", "out = h + "):
        assert line in text, f"mlx-lm changed {layer.__name__}: {line!r} is gone"
    assert "self.mlp(self.post_attention_layernorm(h))" in text


@pytest.mark.parametrize("net", [qwen3_5.GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet])
def test_gated_delta_nets_are_unchanged(net):
    """flashmoe.ops.gpu.linear_attention repeats the forward pass for one token.

    It takes parts of joined projections.
    """
    text = source(net.__call__)
    for line in (
        "cache[0] = mx.contiguous(conv_input[:, -n_keep:, :])",
        "conv_out = nn.silu(self.conv1d(conv_input))",
        "cache[1] = state",
        "cache.advance(S)",
        "out = self.norm(out, z)",
    ):
        assert line in text, f"mlx-lm changed {net.__name__}: {line!r} is gone"
    joined = "self.fix_query_key_value_ordering(" if "Next" in net.__name__ else "in_proj_a(inputs)"
    assert joined in text


@pytest.mark.parametrize("attention", [qwen3_next.Qwen3NextAttention, qwen3_moe.Attention])
def test_attention_is_unchanged(attention):
    """flashmoe.ops.gpu.attention repeats the forward pass for one token.

    It takes parts of joined projections.
    """
    text = source(attention.__call__)
    for line in (
        "self.k_proj(x), self.v_proj(x)",
        "queries = self.q_norm(queries",
        "queries = self.rope(queries, offset=cache.offset)",
        "keys, values = cache.update_and_fetch(keys, values)",
        "queries, keys, values, cache=cache, scale=self.scale, mask=mask",
    ):
        assert line in text, f"mlx-lm changed {attention.__name__}: {line!r} is gone"
    if "Next" in attention.__name__:
        assert "return self.o_proj(output * mx.sigmoid(gate))" in text
