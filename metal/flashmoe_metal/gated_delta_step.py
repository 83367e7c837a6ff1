"""One token of GatedDeltaNet in one launch: convolution, recurrence and gated norm of all heads."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .kernel import Kernel

#: Floats of a state that a simdgroup holds in registers, 32 a lane, and how many simdgroups a
#: threadgroup has. More threads of so many registers are more than an M-series core has, or an SM.
_HELD, _MOST_SIMDGROUPS = 1024, 16

_kernel = Kernel(
    "gated_delta_step",
    inputs=(
        *("qkv", "z", "b", "a", "conv_state", "conv_weight", "a_log", "dt_bias"),
        *("norm_weight", "eps", "state"),
    ),
    outputs=("out", "new_conv", "new_state"),
)


def supports(*, taps: int, value_heads: int, key_heads: int, rows: int, width: int) -> bool:
    """Whether the kernel takes heads whose states are (rows, width).

    A state lies in the registers of one threadgroup, and is read four columns at a time.
    """
    return (
        taps > 1
        and value_heads % key_heads == 0
        and 8 <= width <= _HELD // 4
        and width % 4 == 0
        and simdgroups(rows, width) <= _MOST_SIMDGROUPS
    )


def simdgroups(rows: int, width: int) -> int:
    """How many simdgroups take the state of a head, each four rows of it at a time."""
    passes = _HELD // (4 * -(-width // 32) * 32)
    return -(-rows // (4 * passes))


def gated_delta_step(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv_state: mx.array,
    conv_weight: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    eps: mx.array,
    state: mx.array,
    *,
    key_heads: int,
    at: Sequence[int] = (0, 0, 0, 0),
) -> list[mx.array]:
    """One token, from its projections to what the output projection takes.

    Args:
        qkv, z, b, a: (1, 1, ...), of one dtype. They may be one array: `at` says where the
            queries, keys and values of all heads (conv_dim of them), the gates (Hv * Dv), and the
            two numbers of each head begin in theirs.
        conv_state: (1, taps - 1, conv_dim), of their dtype.
        conv_weight: (conv_dim, taps, 1). a_log, dt_bias: (Hv,). norm_weight: (Dv,).
        eps: (2,) float32: what the norm adds to the mean of squares, and what is added to the sum
            of squares of a query or key.
        state: (1, Hv, Dv, Dk) float32.

    Returns:
        out (1, 1, Hv * Dv), conv_state and state after it.
    """
    _, heads, rows, width = state.shape
    simds = simdgroups(rows, width)
    return _kernel(
        inputs=[
            *(qkv, z, b, a, conv_state, conv_weight, a_log, dt_bias),
            *(norm_weight, eps, state),
        ],
        template=[
            ("T", qkv.dtype),
            ("HK", key_heads),
            ("HV", heads),
            ("DK", width),
            ("DV", rows),
            ("TAPS", conv_weight.shape[1]),
            ("QKV_AT", at[0]),
            ("Z_AT", at[1]),
            ("B_AT", at[2]),
            ("A_AT", at[3]),
            ("SIMDS", simds),
        ],
        grid=(heads * simds * 32, 1, 1),
        threadgroup=(simds * 32, 1, 1),
        output_shapes=[(1, 1, heads * rows), conv_state.shape, state.shape],
        output_dtypes=[qkv.dtype, qkv.dtype, mx.float32],
    )
