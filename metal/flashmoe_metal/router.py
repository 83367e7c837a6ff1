"""Choose the experts of each token from the router's logits."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from .kernel import Kernel

_kernel = Kernel("router", ["logits", "mailbox"], ["indices", "scores"])


def router(
    logits: mx.array,
    top_k: int,
    *,
    experts: int,
    normalise: bool,
    mailbox: mx.array | None = None,
) -> list[mx.array]:
    """Compute softmax, top-k and the weights of the chosen experts, in one launch.

    Args:
        logits: (..., at least `experts`); further columns are ignored.
        top_k: 1..experts.
        experts: the number of experts.
        normalise: divide the weights by their sum.
        mailbox: (1,) uint64, an address of page-locked memory where the indices are written too,
            for a GPU with memory of its own: there a look at an array costs the host more than the
            whole block. Address 0 writes nothing, and so does None.

    Returns:
        Indices (..., top_k) uint32 and scores (..., top_k) float32, ascending; of equal
        probabilities, the lower index comes first.
    """
    *lead, stride = logits.shape
    return _kernel(
        inputs=[logits, _no_mailbox() if mailbox is None else mailbox],
        template=[
            ("T", logits.dtype),
            ("E", experts),
            ("STRIDE", stride),
            ("TOP_K", top_k),
            ("NORMALISE", normalise),
        ],
        grid=(32 * (logits.size // stride), 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(*lead, top_k)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
    )


@cache
def _no_mailbox() -> mx.array:
    # Not of 8 bytes: MLX places such arrays where the host writes too.
    return mx.zeros((2,), mx.uint64)
