"""The expert block on the CPU by the numba kernels, and what makes a loaded model use them.

MLX's quantised matmul on x86 is scalar and runs on one thread (0.08 to 0.7 GB/s of weights), so
every quantised matrix, and GatedDeltaNet, is computed by numba here, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next
from numba import njit, prange

from ..arrays import host
from . import (
    attention,
)
from . import (
    layers as dense,
)
from . import (
    linear_attention as gated_delta,
)
from . import (
    matvec as kernels,
)
from . import (
    swiglu as glu,
)

if TYPE_CHECKING:
    from ...streaming.slot_memory import SlotMemory

NAME = "cpu"

#: Each expert is computed as soon as it has landed, while the others are still being read.
computes_as_loaded = True

#: One token of each of several sequences can go through a layer as one array, (R, 1, hidden), with
#: the bits that each has alone.
stacks_sequences = True

#: Values of the setting that these ops have. See `flashmoe.ops.activations`.
ACTIVATIONS = ("float32", "int8")

#: Pairs that go through the kernels in one call; it bounds the scratch memory of prefill.
PAIRS_AT_ONCE = 512

# Rounded activations must not change which experts are picked more than the hidden state does.
_ROUTERS = ("gate", "shared_expert_gate")

_CLASSES = {
    nn.Linear: dense.Linear,
    nn.QuantizedLinear: dense.QuantizedLinear,
    nn.QuantizedEmbedding: dense.QuantizedEmbedding,
    qwen3_next.Qwen3NextMLP: dense.NextMLP,
    qwen3_moe.MLP: dense.MLP,
    qwen3_next.Qwen3NextAttention: attention.NextAttention,
    qwen3_moe.Attention: attention.Attention,
    qwen3_5.GatedDeltaNet: gated_delta.GatedDeltaNet,
    qwen3_next.Qwen3NextGatedDeltaNet: gated_delta.NextGatedDeltaNet,
}


class Work:
    """The expert block of one layer for one call. See `flashmoe.ops`."""

    lazy = False

    def __init__(self, bank: SlotMemory, x: mx.array, top_k: int, alone: bool = False):
        (self.x,) = host(x)
        self.top_k = top_k
        self._alone = alone
        self.matrices = [bank.packed(p) for p in ("gate_proj", "up_proj", "down_proj")]
        self.y = np.empty((x.shape[0] * top_k, x.shape[1]), np.float32)

    def run(self, experts: dict[int, np.ndarray]) -> None:
        """Compute the pairs of resident experts: slot -> pairs. Ends when the slots were read."""
        run_all([self], [experts])

    def few(self, pairs: np.ndarray) -> bool:
        """Whether the pairs of one expert are computed one by one."""
        return self._alone or pairs.size <= glu.few(self.matrices)

    def rows(self, pairs: np.ndarray) -> np.ndarray:
        """x of pairs."""
        return self.x[pairs // self.top_k]

    def settle(self) -> None:
        """Nothing that was run reads a slot after this."""

    def result(self) -> mx.array:
        """(tokens, top_k, hidden), float32."""
        return mx.array(self.y.reshape(self.x.shape[0], self.top_k, -1))

    def combined(self, scores: mx.array) -> mx.array:
        """The sum over a token's choices, each times its score: (tokens, hidden), float32."""
        return _weighed(self.y, scores)


def run_all(works: Sequence[Work], experts: Sequence[dict[int, np.ndarray]]) -> None:
    """`run` of works of one bank, each its experts. A slot is multiplied by what all want of it: no
    bit of a pair depends on whose other pairs there are, see `glu`."""
    few: list[tuple[int, Work, np.ndarray]] = []
    many: dict[int, list[tuple[Work, np.ndarray]]] = {}
    for work, mine in zip(works, experts, strict=True):
        for slot, pairs in mine.items():
            if work.few(pairs):
                few.append((slot, work, pairs))
            else:
                many.setdefault(slot, []).append((work, pairs))
    few.sort(key=lambda part: part[0])
    for group in _at_most(PAIRS_AT_ONCE, few):
        sizes = [pairs.size for _, _, pairs in group]
        slots = np.repeat([slot for slot, _, _ in group], sizes)
        x = np.concatenate([work.rows(pairs) for _, work, pairs in group])
        y = glu.few_rows(*works[0].matrices, slots, x, np.arange(len(x)))
        _hand_out(y, [part[1:] for part in group])
    for slot, parts in many.items():
        for group in _at_most(PAIRS_AT_ONCE, parts):
            x = np.concatenate([work.rows(pairs) for work, pairs in group])
            _hand_out(glu.many_rows(*works[0].matrices, slot, x), group)


def _at_most(count: int, parts: Sequence[tuple]) -> Iterator[Sequence[tuple]]:
    """Neighbours that have so many pairs together, or one that has more. It bounds the memory."""
    group: list[tuple] = []
    for part in parts:
        if group and sum(p[-1].size for p in group) + part[-1].size > count:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _hand_out(y: np.ndarray, parts: Sequence[tuple[Work, np.ndarray]]) -> None:
    start = 0
    for work, pairs in parts:
        work.y[pairs] = y[start : start + pairs.size]
        start += pairs.size


def weighted_sum(y: mx.array, scores: mx.array) -> mx.array:
    """y: (tokens, top_k, hidden), scores: (tokens, top_k) -> (tokens, hidden), as `combined`."""
    return _weighed(host(y)[0].reshape(-1, y.shape[-1]), scores)


def _weighed(y: np.ndarray, scores: mx.array) -> mx.array:
    out = np.empty((scores.shape[0], y.shape[1]), np.float32)
    with kernels.launching:
        _weigh(y, *host(scores), out)
    return mx.array(out)


@njit(parallel=True, cache=True, nogil=True)
def _weigh(y, scores, out):
    """out (T, D) = the sum over k, in their order, of scores (T, K) * y (T * K, D)."""
    tokens, top_k = scores.shape
    for t in prange(tokens):
        out[t] = 0
        for k in range(top_k):
            score = scores[t, k]
            for d in range(out.shape[1]):
                out[t, d] += score * y[t * top_k + k, d]


def prepare(model: nn.Module, head: nn.Module | None) -> None:
    """Let the model's layers compute through the kernels; its other weights go to float32.

    Args:
        model: a `StreamingMoE` with its dense weights, evaluated or not.
        head: its output projection when that is a layer of its own, None when tied.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            # The scales of quantised layers stay as they are: the kernels widen them exactly.
            for name, value in list(module.items()):
                if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                    module[name] = value.astype(mx.float32)
        # An unquantised head stays lazy, as `Head` does.
        if type(module) in _CLASSES and not (module is head and type(module) is nn.Linear):
            module.__class__ = _CLASSES[type(module)]
        quantised = isinstance(module, dense.QuantizedLinear | dense.QuantizedEmbedding)
        if quantised and path.rpartition(".")[2] not in _ROUTERS:
            module.activations = model.activations
    if isinstance(head, dense.QuantizedLinear):
        head.__class__ = dense.Head
