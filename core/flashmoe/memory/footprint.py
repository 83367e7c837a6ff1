"""Estimate the bytes that a model takes besides its dense weights and its expert slots.

The estimates come from config.json alone, before anything is loaded. They are rather too high: it
matters more that a budget is kept than that there are a few more slots. Of the three Qwen families
the caches are computed; of others they are measured (`dry_run`).
"""

from ..checkpoint.checkpoint import Checkpoint

#: Tokens of a chunk of a prompt, which goes through attention at one time. The bits of what comes
#: out depend on it.
CHUNK_TOKENS = 512

#: Tokens of context that memory is kept for, in the plan and in the prompt cache. A longer context
#: grows past the plan, or takes memory from slots where their number can change.
PLANNED_CONTEXT = 8192

#: Tokens of a prompt that share the reads of experts where the number of slots cannot change.
GPU_PASS_TOKENS = 2048

#: Queries whose attention scores are in memory at one time on the CPU, for all heads that share
#: keys.
BLOCK_QUERIES = 128

#: The lengths of context that are tried for a plan where nobody asked for one; the first that fits
#: is taken. Where the number of slots cannot change, a longer prompt would grow past the budget, so
#: there it is not one of the two last.
PLANNED_CONTEXTS = (PLANNED_CONTEXT, 4096, 2048, 1024, CHUNK_TOKENS)

#: Bytes of compiled kernels, and what allocators keep; 0.2 GB were measured on Linux.
RUNTIME_NBYTES = 256 * 2**20

#: Bytes of the program and of its libraries when a model is loaded; `flashmoe run` had 85 MB.
PROGRAM_NBYTES = 130 * 10**6

#: Bytes of the tokenizer for each token of the vocabulary; 1,190 were measured for 248,077 tokens.
TOKENIZER_TOKEN_NBYTES = 1350

#: Bytes that the first grammar takes for each token of the vocabulary; 1,060 were measured.
GRAMMAR_TOKEN_NBYTES = 1100

#: The least bytes of a prompt cache, also of a small model.
MIN_PROMPT_CACHE_NBYTES = 32 * 2**20

_F32 = 4


def lasting_nbytes(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Return the bytes of widened weights, of the runtime, and of a vocabulary for grammars."""
    grammar = GRAMMAR_TOKEN_NBYTES * checkpoint.text_config["vocab_size"]
    return RUNTIME_NBYTES + grammar + (0 if on_gpu else widened_nbytes(checkpoint))


def program_nbytes(checkpoint: Checkpoint) -> int:
    """Return the bytes that a process holds, with the tokenizer, before it loads the weights.

    They are rather too many, so that what was planned in a smaller process fits in a larger one.
    """
    return PROGRAM_NBYTES + TOKENIZER_TOKEN_NBYTES * checkpoint.text_config["vocab_size"]


def prompt_nbytes(
    checkpoint: Checkpoint, experts: int, *, on_gpu: bool, context: int = PLANNED_CONTEXT
) -> int:
    """Return the bytes that are planned for the prompt under way and its KV cache.

    Args:
        experts: K.
    """
    tokens = min(checkpoint.max_context, GPU_PASS_TOKENS if on_gpu else CHUNK_TOKENS)
    return (
        cache_nbytes(checkpoint, context, on_gpu=on_gpu)
        + chunk_nbytes(checkpoint, tokens, context, experts, on_gpu=on_gpu)
        + tokens * pass_token_nbytes(checkpoint, experts)
    )


def widened_nbytes(checkpoint: Checkpoint) -> int:
    """Return the bytes that float32 adds to dense weights of 16 bits. CPU only."""
    names = {t.name for t in checkpoint.dense}
    return sum(
        t.nbytes
        for t in checkpoint.dense
        if t.dtype in ("BF16", "F16")
        and f"{t.name.removesuffix('.weight')}.scales" not in names
        and not t.name.endswith((".scales", ".biases"))
    )


def cache_nbytes(
    checkpoint: Checkpoint, context: int = PLANNED_CONTEXT, *, on_gpu: bool = False
) -> int:
    """Return the bytes of keys, values and recurrent states of `context` tokens.

    States are float32. Keys and values are too on the CPU; on a GPU they have the dtype of the
    embedding.
    """
    config = checkpoint.text_config
    # mlx-lm allocates 256 tokens at a time.
    tokens = min(checkpoint.max_context, -(-context // 256) * 256)
    if not checkpoint.is_checked_type:
        from .dry_run import cache_sizes  # late: it imports MLX

        return cache_sizes(checkpoint.config).nbytes(tokens)
    each = 2 if on_gpu and _has_16_bits(checkpoint) else _F32
    # One of `interval` layers has full attention; the others keep a recurrent state.
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
    return 2 * each * full * keys + _F32 * linear * (state + conv)


def _has_16_bits(checkpoint: Checkpoint) -> bool:
    """Return whether the embedding gives numbers of 16 bits."""
    dtypes = {t.dtype for t in checkpoint.dense if "embed_tokens." in t.name}
    return bool(dtypes) and "F32" not in dtypes


def prompt_cache_nbytes(
    checkpoint: Checkpoint, context: int = PLANNED_CONTEXT, *, on_gpu: bool = False
) -> int:
    """Return the bytes of a prompt cache for one conversation of the planned length.

    It holds several short ones too. The cache of the conversation under way is not included.
    """
    return max(cache_nbytes(checkpoint, context, on_gpu=on_gpu), MIN_PROMPT_CACHE_NBYTES)


def chunk_nbytes(
    checkpoint: Checkpoint, tokens: int, context: int, experts: int, *, on_gpu: bool
) -> int:
    """Return the bytes of activations while a chunk goes through a layer, float32.

    Args:
        tokens: of the prompt; a chunk has CHUNK_TOKENS at most.
        context: tokens that its attention sees.
        experts: K.
    """
    config = checkpoint.text_config
    context, tokens = min(checkpoint.max_context, context), min(tokens, CHUNK_TOKENS)
    # Projections of one layer and their copies: measured about 16 hidden states. On a GPU, expert
    # outputs as they are weighted and summed.
    each = (16 + (2 * experts if on_gpu else 0)) * config["hidden_size"]
    heads = config["num_attention_heads"]
    if on_gpu or not checkpoint.is_checked_type:
        scores = 2 * heads * tokens * context
    else:
        shared = heads // config["num_key_value_heads"]
        scores = shared * min(tokens, BLOCK_QUERIES) * context
    # One expert's matrix, dequantised.
    matrix = config["hidden_size"] * config["moe_intermediate_size"]
    return _F32 * (tokens * each + scores + matrix)


def pass_token_nbytes(checkpoint: Checkpoint, experts: int) -> int:
    """Return the bytes that a pass holds of each token, float32.

    These are the outputs of its K experts, and the hidden states before and after the norm and from
    the shared expert.
    """
    return _F32 * (experts + 4) * checkpoint.text_config["hidden_size"]
