"""Exchange the inputs and results of one expert block between machines, by sums of MLX.

A sum over all machines, where all but one have zeros, gives every machine what that one has, bit
for bit.

    request   from the lead: layer, K, number of tokens of each input (negative where each token
              belongs to a sequence of its own), then x and the router's choice
    results   of each input: (tokens * K, hidden), to which each machine adds those of its experts,
              and counts of what the machine did

A request is one sum when it has one token, as most have during decoding; otherwise two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import ClusterError

#: The most inputs of a request.
MAX_INPUTS = 96
#: Numbers that a machine adds to the results of an input: experts needed, experts loaded, whether
#: it failed.
COUNTS = 3

_REST, _WORK = 1, 2
_HEAD = 5 + MAX_INPUTS
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True, eq=False)
class ExpertRequest:
    """The inputs of one layer's experts.

    Attributes:
        layer: index of the layer.
        xs: (tokens, hidden) float32 of each input.
        indices: (tokens, K) int64 of each input.
        dtype: the dtype that the inputs had.
        separate: for each input, whether each of its tokens belongs to a sequence of its own.
    """

    layer: int
    xs: Sequence[np.ndarray]
    indices: Sequence[np.ndarray]
    dtype: mx.Dtype
    separate: Sequence[bool]


class Exchange:
    """Sends and receives requests and results over a group of MLX.

    Args:
        group: all machines.
        hidden: the hidden size of the model.
        top_k: the most experts of a token.
    """

    def __init__(self, group: mx.distributed.Group, hidden: int, top_k: int):
        self.group = group
        self.hidden = hidden
        self._most_k = top_k

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of what all machines give, float32.

        Raises:
            ClusterError: a machine is gone.
        """
        try:
            total = mx.distributed.all_sum(mx.array(values), group=self.group, stream=mx.cpu)
            mx.eval(total)
        except RuntimeError as e:
            raise ClusterError(f"a machine is gone: {e}") from e
        return np.array(total)

    def send(self, request: ExpertRequest) -> None:
        """Send a request from the lead to all workers."""
        k = request.indices[0].shape[1]
        parts = [np.hstack(pair) for pair in zip(request.xs, request.indices, strict=True)]
        separate = zip(parts, request.separate, strict=True)
        sizes = [-len(part) if s else len(part) for part, s in separate]
        rows = np.concatenate(parts).astype(np.float32)
        dtype = _DTYPES.index(request.dtype)
        first = self._first(_WORK, request.layer, k, dtype, len(sizes))
        first[5 : 5 + len(sizes)] = sizes
        first[_HEAD : _HEAD + rows.shape[1]] = rows[0]
        self.sum(first)
        if len(rows) > 1:
            self.sum(rows[1:].reshape(-1))

    def rest(self) -> None:
        """Tell all workers, from the lead, that there is nothing to do for a while."""
        self.sum(self._first(_REST))

    def receive(self) -> ExpertRequest | None:
        """Receive a request on a worker; None when there is nothing to do for a while."""
        first = self.sum(self._first())
        what, layer, k, dtype, inputs = first[:5].astype(int).tolist()
        if what == _REST:
            return None
        signed = first[5 : 5 + inputs].astype(int)
        separate, sizes = (signed < 0).tolist(), np.abs(signed)
        width = self.hidden + k
        rows = first[None, _HEAD : _HEAD + width]
        if (more := int(sizes.sum()) - 1) > 0:
            rest = self.sum(np.zeros(more * width, np.float32)).reshape(more, width)
            rows = np.concatenate([rows, rest])
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        xs = [np.ascontiguousarray(part[:, : self.hidden]) for part in parts]
        indices = [part[:, self.hidden :].astype(np.int64) for part in parts]
        return ExpertRequest(layer, xs, indices, _DTYPES[dtype], separate)

    def add_results(self, mine: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Add up the results of one input over all machines.

        Args:
            mine: (pairs, hidden) float32, zeros where another machine holds the expert.
            counts: see COUNTS.

        Returns:
            The results of all machines, and the sums of their counts.
        """
        both = np.concatenate([mine.reshape(-1), np.array(counts, np.float32)])
        total = self.sum(both)
        return total[:-COUNTS].reshape(mine.shape), total[-COUNTS:].astype(int).tolist()

    def _first(self, *head: int) -> np.ndarray:
        first = np.zeros(_HEAD + self.hidden + self._most_k, np.float32)
        first[: len(head)] = head
        return first


def own_pairs(request: ExpertRequest, owned: np.ndarray) -> list[np.ndarray]:
    """Return the pairs of each input whose experts this machine holds.

    Pairs are numbered as in `flashmoe.streaming.compute`.

    Args:
        owned: (experts,) bool.
    """
    return [np.flatnonzero(owned[indices]) for indices in request.indices]


def switch_inputs(
    request: ExpertRequest, pairs: Sequence[np.ndarray]
) -> list[tuple[mx.array, mx.array]]:
    """Return pairs as inputs of a `StreamingSwitchGLU`, one expert a token; empty ones left out.

    All pairs of an expert are on one machine, and in one input of its call as they are in one input
    without a cluster: so each pair has the bits that it would have there.
    """
    inputs = []
    parts = zip(request.xs, request.indices, pairs, request.separate, strict=True)
    for x, indices, chosen, separate in parts:
        if chosen.size:
            rows = mx.array(x[chosen // indices.shape[1]]).astype(request.dtype)
            experts = mx.array(indices.reshape(-1)[chosen][:, None])
            inputs.append((rows[:, None], experts[:, None]) if separate else (rows, experts))
    return inputs
