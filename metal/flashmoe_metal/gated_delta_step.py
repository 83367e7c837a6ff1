"""Run one token through GatedDeltaNet in one launch, from its projections to the gated norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .kernel import Kernel

#: Floats of a state that a simdgroup holds in registers, 32 a lane, and the most simdgroups of a
#: threadgroup: neither a core of an M-series GPU nor an SM can run more threads with that many
#: registers.
_HELD, _MOST_SIMDGROUPS = 1024, 16


class GatedDeltaInputs(NamedTuple):
    """The arrays that one step reads, for Hk key heads and Hv value heads.

    Attributes:
        qkv, z, b, a: (1, 1, ...), of one dtype: the queries, keys and values of all heads (conv_dim
            of them), the gates (Hv * Dv), and two numbers of each head (Hv, Hv). They may be one
            array: see `starts` of `gated_delta_step`.
        conv_state: (1, taps - 1, conv_dim), of the dtype of qkv.
        conv_weight: (conv_dim, taps, 1).
        a_log, dt_bias: (Hv,).
        norm_weight: (Dv,).
        eps: (2,) float32: what the norm adds to the mean of squares, and what is added to the sum
            of squares of a query or key.
        state: (1, Hv, Dv, Dk) float32.
    """

    qkv: mx.array
    z: mx.array
    b: mx.array
    a: mx.array
    conv_state: mx.array
    conv_weight: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm_weight: mx.array
    eps: mx.array
    state: mx.array


_kernel = Kernel(
    "gated_delta_step",
    inputs=GatedDeltaInputs._fields,
    outputs=("out", "new_conv", "new_state"),
)


def supports(*, taps: int, value_heads: int, key_heads: int, rows: int, width: int) -> bool:
    """Return whether the kernel takes heads whose states are (rows, width).

    A state is held in the registers of one threadgroup, and is read four columns at a time.
    """
    return (
        taps > 1
        and value_heads % key_heads == 0
        and 8 <= width <= _HELD // 4
        and width % 4 == 0
        and simdgroups(rows, width) <= _MOST_SIMDGROUPS
    )


def simdgroups(rows: int, width: int) -> int:
    """Return how many simdgroups share the state of a head; each takes four rows at a time."""
    passes = _HELD // (4 * -(-width // 32) * 32)
    return -(-rows // (4 * passes))


def gated_delta_step(
    inputs: GatedDeltaInputs, *, key_heads: int, starts: Sequence[int] = (0, 0, 0, 0)
) -> list[mx.array]:
    """Take one token through all heads; return the output projection's input and the new states.

    Args:
        key_heads: Hk.
        starts: the positions in qkv, z, b and a at which their values begin.

    Returns:
        out (1, 1, Hv * Dv), conv_state and state after the token.
    """
    _, heads, rows, width = inputs.state.shape
    dtype = inputs.qkv.dtype
    simds = simdgroups(rows, width)
    return _kernel(
        inputs=inputs,
        template=[
            ("T", dtype),
            ("HK", key_heads),
            ("HV", heads),
            ("DK", width),
            ("DV", rows),
            ("TAPS", inputs.conv_weight.shape[1]),
            ("QKV_AT", starts[0]),
            ("Z_AT", starts[1]),
            ("B_AT", starts[2]),
            ("A_AT", starts[3]),
            ("SIMDS", simds),
        ],
        grid=(heads * simds * 32, 1, 1),
        threadgroup=(simds * 32, 1, 1),
        output_shapes=[(1, 1, heads * rows), inputs.conv_state.shape, inputs.state.shape],
        output_dtypes=[dtype, dtype, mx.float32],
    )
