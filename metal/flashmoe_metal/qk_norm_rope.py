"""Norm and rotate one token's queries and keys before attention, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .kernel import Kernel


class QkInputs(NamedTuple):
    """The arrays that a call of `qk_norm_rope` reads, for heads of width D.

    Attributes:
        queries, keys: (1, 1, ...), of one dtype. They may be one array: see `HeadLayout`.
        q_weight, k_weight: (D,), the weights of the norms.
        eps: (2,) float32, of the norms of queries and of keys.
        rope: (2,) float32: log2 of the base, and the scale of positions.
        offset: (1,) int32, the token's position.
    """

    queries: mx.array
    keys: mx.array
    q_weight: mx.array
    k_weight: mx.array
    eps: mx.array
    rope: mx.array
    offset: mx.array


class HeadLayout(NamedTuple):
    """The heads of an attention, and where `QkInputs` has them.

    Attributes:
        heads, key_heads: how many heads queries and keys have.
        rotated: how many of the D values are rotated, the first ones, as `mx.fast.rope` does it
            with traditional=False.
        gated: whether each head of `queries` has its query and then its gate.
        starts: where the values of all heads begin in `queries` and in `keys`.
    """

    heads: int
    key_heads: int
    rotated: int
    gated: bool
    starts: tuple[int, int] = (0, 0)


_kernel = Kernel("qk_norm_rope", inputs=QkInputs._fields, outputs=("q", "k", "gate"))


def supports(*, width: int, rotated: int) -> bool:
    """Return whether the kernel takes heads of this width, with this many rotated values."""
    return width <= 2048 and 0 < rotated <= width and rotated % 2 == 0


def qk_norm_rope(inputs: QkInputs, layout: HeadLayout) -> list[mx.array]:
    """Return one token's queries and keys, normed and rotated, and the sigmoid of its gates.

    Returns:
        Queries (1, heads, 1, D), keys (1, key_heads, 1, D) and gates (1, 1, heads * D); without
        gates, the last is an array that nobody may use.
    """
    heads, key_heads, rotated, gated, starts = layout
    width = inputs.q_weight.shape[0]
    dtype = inputs.queries.dtype
    return _kernel(
        inputs=inputs,
        template=[
            ("T", dtype),
            ("H", heads),
            ("D", width),
            ("ROPE", rotated),
            ("GATED", int(gated)),
            ("Q_AT", starts[0]),
            ("K_AT", starts[1]),
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
