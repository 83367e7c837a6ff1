"""Check the numbers of config.json and generation_config.json before MLX sees one of them.

MLX trusts its caller: a group of 0 weights ends the process, an embedding of a token beyond its
rows is other memory, NaN as an epsilon is an answer of "!!!!!!". So each number that mlx-lm or
flashmoe reads is here, with the range that it may have; no real model comes near the wide ones.
`c` is the part of config.json that describes the language model, `n..m` includes both.

| field                                  | kind    | range          | because                     |
|----------------------------------------|---------|----------------|-----------------------------|
| c.num_hidden_layers                    | int     | 1..2^9         | time and memory of a model  |
| c.hidden_size, moe_intermediate_size,  | int     | 1..2^18        | shapes are int32 in MLX     |
|   shared_expert_intermediate_size,     |         |                |                             |
|   intermediate_size                    |         |                |                             |
| c.num_experts, num_experts_per_tok     | int     | 1..2^16        | K is at most num_experts    |
| c.vocab_size                           | int     | 1..2^24        | rows of embedding and head  |
| c.num_attention_heads                  | int     | 1..2^14        | a multiple of               |
| c.num_key_value_heads                  | int     | 1..2^14        |   num_key_value_heads       |
| c.head_dim                             | int     | 1..2^14        | see the rotation below      |
| c.max_position_embeddings              | int     | 1..2^31        | positions are int32 in MLX  |
| c.full_attention_interval              | int     | 1..2^12        | at most num_hidden_layers   |
| c.linear_num_value_heads               | int     | 1..2^14        | a multiple of               |
| c.linear_num_key_heads                 | int     | 1..2^14        |   linear_num_key_heads      |
| c.linear_key_head_dim                  | int     | 32..2^14       | kernels take 32 at a time   |
| c.linear_value_head_dim                | int     | 1..2^14        |                             |
| c.linear_conv_kernel_dim               | int     | 2..2^10        | a state of 0 steps grows    |
| c.decoder_sparse_step                  | int     | 1..2^12        | a divisor                   |
| c.mlp_only_layers                      | ints    | 0..2^12        |                             |
| c.tie_word_embeddings, norm_topk_prob, | bool    |                | a text counts as true       |
|   attention_bias                       |         |                |                             |
| c.rms_norm_eps                         | number  | 1e-12..0.1     | 0 or NaN makes NaN          |
| c.rope_theta                           | number  | 2..1e15        | a base; its logarithm       |
| c.partial_rotary_factor                | number  | 1e-6..1        | head_dim times it is even,  |
|                                        |         |                |   and 2 or more             |
| c.rope_scaling, rope_parameters        | object  | type: TYPES    | others are not in mlx-lm    |
|   factor                               | number  | 1..1e6         | a divisor                   |
|   low_freq_factor, high_freq_factor    | number  | 1e-6..1e6      | divisors; low below high    |
|   beta_fast, beta_slow                 | number  | 1e-6..1e6      | a logarithm                 |
|   mscale, mscale_all_dim               | number  | 0..1e6         |                             |
|   original_max_position_embeddings     | int     | 2..2^31        | a divisor; its logarithm    |
|   short_factor, long_factor            | numbers | 1e-6..1e6      | one for each pair rotated   |
|   mrope_section                        | ints    | 0..2^14        | three                       |
| eos_token_id of c, config.json and     | int(s)  | 0..vocab_size-1| written past the logits     |
|   generation_config.json               |         |                |                             |
| generation_config.json: temperature    | number  | 0, 1e-5..100   | a divisor                   |
|   top_p, min_p                         | number  | 0..1           |                             |
|   top_k                                | int     | 0..2^31-1      |                             |
|   do_sample                            | bool    |                |                             |

A field that is absent has mlx-lm's default, or is refused where there is none. null is as absent
where mlx-lm takes it so: eos_token_id, the objects of a rotation, and all of generation_config.
JSON's true and false are not numbers, 64.0 is not an int. Unknown fields may hold anything.

The sizes of quantised matrices and the dtypes of tensors are in `dense_tensors` and
`expert_layers`, the tokens of a vocabulary in `tokenizer`, the sizes of files in `json_files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import is_int, show

#: Sizes that each supported model has, and their ranges.
SIZES = {
    "num_hidden_layers": (1, 2**9),
    "hidden_size": (1, 2**18),
    "moe_intermediate_size": (1, 2**18),
    "num_experts": (1, 2**16),
    "num_experts_per_tok": (1, 2**16),
    "vocab_size": (1, 2**24),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "max_position_embeddings": (1, 2**31),
}
#: Sizes that the models with linear attention and a shared expert have as well.
LINEAR_SIZES = {
    "full_attention_interval": (1, 2**12),
    "linear_num_key_heads": (1, 2**14),
    "linear_num_value_heads": (1, 2**14),
    "linear_key_head_dim": (32, 2**14),
    "linear_value_head_dim": (1, 2**14),
    "linear_conv_kernel_dim": (2, 2**10),
    "shared_expert_intermediate_size": (1, 2**18),
}
#: Sizes of the models that may have layers without experts.
DENSE_LAYER_SIZES = {"decoder_sparse_step": (1, 2**12), "intermediate_size": (1, 2**18)}
HEAD_DIM = {"head_dim": (1, 2**14)}
FLAGS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias")
EPSILON = (1e-12, 0.1)
SAMPLING = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1)}
MAX_TOP_K = 2**31 - 1
MIN_TEMPERATURE = 1e-5

_AGAIN = "download it again"


def check_sizes(c: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], where: Path) -> None:
    """Check that fields are ints in their ranges; an absent field is refused.

    Args:
        c: the part of config.json that describes the language model.
        where: the file, for errors, as in all functions of this module.

    Raises:
        CheckpointError: names file, field and value, as do all functions of this module.
    """
    for name, (low, high) in sizes.items():
        if not is_int(c.get(name), low, high):
            raise CheckpointError(
                f"{where} has {name} {show(c.get(name))}: a whole number in {low}..{high} is "
                f"needed; {_AGAIN}"
            )


def check_relations(c: Mapping[str, Any], where: Path) -> None:
    """Check sizes against each other.

    Args:
        c: the sizes of this family, which `check_sizes` has accepted.
    """
    for part, whole in (
        ("num_experts_per_tok", "num_experts"),
        # mlx-lm uses the mask of the first layer of full attention: there must be one.
        ("full_attention_interval", "num_hidden_layers"),
    ):
        if c.get(part, 1) > c[whole]:
            raise CheckpointError(
                f"{where} has {part} {c[part]}, more than {whole} {c[whole]}; {_AGAIN}"
            )
    kv_heads, key_heads = c["num_key_value_heads"], c.get("linear_num_key_heads", 1)
    for whole, divisor, name in (
        ("num_attention_heads", kv_heads, f"num_key_value_heads {kv_heads}"),
        ("linear_num_value_heads", key_heads, f"linear_num_key_heads {key_heads}"),
        ("linear_key_head_dim", 32, "32"),
    ):
        if c.get(whole, 0) % divisor:
            raise CheckpointError(
                f"{where} has {whole} {c[whole]}: a multiple of {name} is needed; {_AGAIN}"
            )


def check_layer_list(layers: object, where: Path) -> None:
    """Check mlp_only_layers, the layers without experts."""
    if not isinstance(layers, list) or not all(is_int(n, 0, 2**12) for n in layers):
        raise CheckpointError(
            f"{where} has mlp_only_layers {show(layers)}: it must be a list of layer numbers"
        )


def check_flags(c: Mapping[str, Any], where: Path) -> None:
    """Check the fields that are true or false."""
    for name in FLAGS:
        if not isinstance(c.get(name), bool):
            raise CheckpointError(
                f"{where} has {name} {show(c.get(name))}: true or false is needed; {_AGAIN}"
            )


def check_number(name: str, value: object, limits: tuple[float, float], where: Path) -> None:
    """Check one number. NaN and the infinities are in no range."""
    low, high = limits
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(
            f"{where} has {name} {show(value)}: a number in {low}..{high} is needed; {_AGAIN}"
        )


def end_tokens(value: object, rows: int, where: Path) -> list[int]:
    """Return the tokens of an eos_token_id: an int or a list of ints, none for null.

    Args:
        rows: of the embedding and the head.
    """
    tokens: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for token in tokens:
        if not is_int(token, 0, rows - 1):
            raise CheckpointError(
                f"{where} has eos_token_id {show(value)}: a whole number in 0..{rows - 1}, or a "
                f"list of them, is needed, because vocab_size is {rows}; {_AGAIN}"
            )
    return tokens


def check_sampling(config: Mapping[str, Any], where: Path) -> None:
    """Check the fields of generation_config.json that set how tokens are sampled."""
    sampled = config.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise CheckpointError(f"{where} has do_sample {show(sampled)}: true or false is needed")
    for name, limits in SAMPLING.items():
        if config.get(name) is not None:
            check_number(name, config[name], limits, where)
    temperature = config.get("temperature")
    if temperature and temperature < MIN_TEMPERATURE:
        raise CheckpointError(
            f"{where} has temperature {temperature}: 0 or a number in {MIN_TEMPERATURE}..100 is "
            f"needed; {_AGAIN}"
        )
    top_k = config.get("top_k")
    if top_k is not None and not is_int(top_k, 0, MAX_TOP_K):
        raise CheckpointError(
            f"{where} has top_k {show(top_k)}: a whole number in 0..{MAX_TOP_K} is needed; 0 is no "
            "limit"
        )
