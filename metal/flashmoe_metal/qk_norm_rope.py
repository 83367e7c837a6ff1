"""What an attention does to one token's queries and keys before it attends, in one launch."""

from __future__ import annotations

import mlx.core as mx

from .kernel import Kernel

_kernel = Kernel(
    "qk_norm_rope",
    inputs=("queries", "keys", "q_weight", "k_weight", "eps", "rope", "offset"),
    outputs=("q", "k", "gate"),
)


def supports(*, width: int, rotated: int) -> bool:
    """Whether the kernel takes heads of this width, of which so much is rotated."""
    return width <= 2048 and 0 < rotated <= width and rotated % 2 == 0


def qk_norm_rope(
    queries: mx.array,
    keys: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    eps: mx.array,
    rope: mx.array,
    offset: mx.array,
    *,
    heads: int,
    key_heads: int,
    rotated: int,
    gated: bool,
    at: tuple[int, int] = (0, 0),
) -> list[mx.array]:
    """The queries and keys of one token, normed and rotated, and the sigmoid of its gates.

    Args:
        queries, keys: (1, 1, ...), of one dtype. They may be one array: `at` says where the
            queries and the keys of all heads begin in theirs. Gated, each head has its query
            and then its gate.
        q_weight, k_weight: (D,), of their norms.
        eps: (2,) float32, of the norms.
        rope: (2,) float32: log2 of the base, and the scale of positions. See `mx.fast.rope`,
            which rotates the first `rotated` of the D with traditional=False.
        offset: (1,) int32, the token's position.

    Returns:
        queries (1, heads, 1, D), keys (1, key_heads, 1, D) and gates (1, 1, heads * D); no gates
        but an array of no use when there are none.
    """
    width = q_weight.shape[0]
    dtype = queries.dtype
    return _kernel(
        inputs=[queries, keys, q_weight, k_weight, eps, rope, offset],
        template=[
            ("T", dtype),
            ("H", heads),
            ("D", width),
            ("ROPE", rotated),
            ("GATED", int(gated)),
            ("Q_AT", at[0]),
            ("K_AT", at[1]),
        ],
        grid=((heads + key_heads) * 32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[
            (1, heads, 1, width),
            (1, key_heads, 1, width),
            (1, 1, heads * width) if gated else (1,),
        ],
        output_dtypes=[dtype] * 3,
    )
