"""Take the tokens of a chunk through GatedDeltaNet's recurrence in one launch.

mlx-lm has such a kernel for Metal only; elsewhere it launches some ten operations a token.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from .kernel import Kernel

_kernel = Kernel(
    "gated_delta_prompt",
    inputs=["q", "k", "v", "decay", "beta", "state", "length"],
    outputs=["y", "new_state"],
)

#: The widest key: a lane holds five times an eighth of it in registers.
_WIDEST = 256


def supports(*, value_heads: int, key_heads: int, width: int) -> bool:
    """Return whether the kernel takes heads whose keys have this width."""
    return value_heads % key_heads == 0 and width % 4 == 0 and width <= _WIDEST


def gated_delta_prompt(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> list[mx.array]:
    """Return what mlx-lm's `gated_delta_ops` returns for one sequence, summed in float32.

    Args:
        q, k: (1, tokens, Hk, Dk), normed; they are read as float32.
        v: (1, tokens, Hv, Dv).
        decay, beta: (1, tokens, Hv).
        state: (1, Hv, Dv, Dk) float32.

    Returns:
        y, of the shape and dtype of v, and the state after the last token.
    """
    _, tokens, heads, rows = v.shape
    tiles = -(-rows // 16)
    q, k, decay, beta = (x.astype(mx.float32) for x in (q, k, decay, beta))
    return _kernel(
        inputs=[q, k, v, decay, beta, state, _length(tokens)],
        template=[
            ("T", v.dtype),
            ("HK", q.shape[2]),
            ("HV", heads),
            ("DK", q.shape[3]),
            ("DV", rows),
        ],
        grid=(heads * tiles * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[v.dtype, mx.float32],
    )


@lru_cache(maxsize=16)
def _length(tokens: int) -> mx.array:
    return mx.array([tokens, 0, 0, 0], mx.int32)
