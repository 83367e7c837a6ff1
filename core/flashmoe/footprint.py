"""How many bytes a model takes besides its dense weights and its expert slots.

An estimate from config.json alone, made before anything is loaded. It errs on the high side: a
budget that is kept is worth more than a few more slots.
"""

from .checkpoint import Checkpoint

#: Tokens of a prompt that go through the model at one time. More tokens per chunk means that each
#: expert is read once for more of them, and more memory for their activations.
PREFILL_TOKENS = 512

#: Tokens of context that memory is kept for; a longer one grows past the plan.
PLANNED_CONTEXT = 8192

#: Tokenizer, compiled kernels, and what allocators keep: measured 0.2 GB on Linux.
RUNTIME_NBYTES = 256 * 2**20

#: Bytes of prompt states at least, also of a small model.
MIN_PROMPT_CACHE_NBYTES = 32 * 2**20

_F32 = 4


def working_nbytes(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Bytes for widened weights, caches, prefill activations and the runtime."""
    widened = 0 if on_gpu else widened_nbytes(checkpoint)
    return widened + cache_nbytes(checkpoint) + prefill_nbytes(checkpoint) + RUNTIME_NBYTES


def widened_nbytes(checkpoint: Checkpoint) -> int:
    """What float32 adds to the 16-bit dense weights that are not quantised. CPU only."""
    names = {t.name for t in checkpoint.dense}
    return sum(
        t.nbytes
        for t in checkpoint.dense
        if t.dtype in ("BF16", "F16")
        and f"{t.name.removesuffix('.weight')}.scales" not in names
        and not t.name.endswith((".scales", ".biases"))
    )


def cache_nbytes(checkpoint: Checkpoint) -> int:
    """Keys, values and recurrent states of one conversation of the planned length, float32."""
    config = checkpoint.text_config
    tokens = min(checkpoint.max_context, PLANNED_CONTEXT)
    # Every so many layers one has full attention; the others keep a recurrent state.
    interval = 1 if checkpoint.model_type == "qwen3_moe" else config["full_attention_interval"]
    full = checkpoint.num_layers // interval
    keys = config["num_key_value_heads"] * config["head_dim"] * tokens
    linear = checkpoint.num_layers - full
    state = conv = 0
    if linear:
        key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
        key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        state = value_heads * value_dim * key_dim
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        conv = channels * config["linear_conv_kernel_dim"]
    return _F32 * (2 * full * keys + linear * (state + conv))


def prompt_cache_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes for states of prompts that were read: of one conversation of the planned length, or of
    several short ones. They lie beside those of the conversation under way."""
    return max(cache_nbytes(checkpoint), MIN_PROMPT_CACHE_NBYTES)


def prefill_nbytes(checkpoint: Checkpoint) -> int:
    """Activations of one chunk: expert outputs, hidden states and attention scores, float32."""
    config = checkpoint.text_config
    tokens = min(checkpoint.max_context, PREFILL_TOKENS)
    context = min(checkpoint.max_context, PLANNED_CONTEXT)
    # Expert outputs, the same weighted, and the sums.
    experts = 3 * checkpoint.top_k * config["hidden_size"]
    # Projections of one layer and their copies: measured about 16 hidden states.
    hidden = 16 * config["hidden_size"]
    scores = 2 * config["num_attention_heads"] * context
    # One expert's matrix, dequantised.
    matrix = config["hidden_size"] * config["moe_intermediate_size"]
    return _F32 * (tokens * (experts + hidden + scores) + matrix)
