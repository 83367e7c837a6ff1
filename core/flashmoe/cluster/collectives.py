"""What the hosts of a cluster say to each other for one expert block, by sums of MLX.

A sum over all hosts, where all but one have zeros, gives everybody what that one has, bit for bit.

    request   from the lead: layer, K, sizes of the pieces (below 0 where rows are of sequences of
              their own), then x and the router's choice
    results   of each piece: (rows * K, hidden), where each host has those of its experts, and what
              the host did

A request is one sum when it has one row, as most have while an answer is generated; else two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import ClusterError

#: Pieces of a request.
MAX_CHUNKS = 96
#: What a host adds to the results of a piece: experts needed, of these loaded, whether it failed.
NOTES = 3

_REST, _WORK = 1, 2
_HEAD = 5 + MAX_CHUNKS
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True, eq=False)
class Request:
    """The rows of one layer.

    Attributes:
        xs: of each piece (rows, hidden) float32.
        indices: of each piece (rows, K) int64.
        dtype: that the rows had.
        alone: of each piece, whether its rows are of sequences of their own.
    """

    layer: int
    xs: Sequence[np.ndarray]
    indices: Sequence[np.ndarray]
    dtype: mx.Dtype
    alone: Sequence[bool]


class Exchange:
    """
    Args:
        group: of MLX.
        hidden: size of a row. top_k: the most experts of a row.
    """

    def __init__(self, group: mx.distributed.Group, hidden: int, top_k: int):
        self.group = group
        self.hidden = hidden
        self._most_k = top_k

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Of all hosts, float32.

        Raises:
            ClusterError: a host is gone.
        """
        try:
            total = mx.distributed.all_sum(mx.array(values), group=self.group, stream=mx.cpu)
            mx.eval(total)
        except RuntimeError as e:
            raise ClusterError(f"a host is gone: {e}") from e
        return np.array(total)

    def send(self, request: Request) -> None:
        """From the lead, to all."""
        k = request.indices[0].shape[1]
        rows = [np.hstack(pair) for pair in zip(request.xs, request.indices, strict=True)]
        sizes = [-len(r) if alone else len(r) for r, alone in zip(rows, request.alone, strict=True)]
        rows = np.concatenate(rows).astype(np.float32)
        dtype = _DTYPES.index(request.dtype)
        first = self._first(_WORK, request.layer, k, dtype, len(sizes))
        first[5 : 5 + len(sizes)] = sizes
        first[_HEAD : _HEAD + rows.shape[1]] = rows[0]
        self.sum(first)
        if len(rows) > 1:
            self.sum(rows[1:].reshape(-1))

    def rest(self) -> None:
        """From the lead: there is nothing to do for a while."""
        self.sum(self._first(_REST))

    def receive(self) -> Request | None:
        """On the others; None: to rest."""
        first = self.sum(self._first())
        what, layer, k, dtype, pieces = first[:5].astype(int).tolist()
        if what == _REST:
            return None
        sizes = first[5 : 5 + pieces].astype(int)
        alone, sizes = (sizes < 0).tolist(), np.abs(sizes)
        width = self.hidden + k
        rows = first[None, _HEAD : _HEAD + width]
        if (more := int(sizes.sum()) - 1) > 0:
            rest = self.sum(np.zeros(more * width, np.float32)).reshape(more, width)
            rows = np.concatenate([rows, rest])
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        xs = [np.ascontiguousarray(part[:, : self.hidden]) for part in parts]
        indices = [part[:, self.hidden :].astype(np.int64) for part in parts]
        return Request(layer, xs, indices, _DTYPES[dtype], alone)

    def results(self, mine: np.ndarray, notes: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Of one piece, from and to all. mine: (pairs, hidden) float32, zeros where others have
        the expert. What all have, and the sums of their notes."""
        both = np.concatenate([mine.reshape(-1), np.array(notes, np.float32)])
        total = self.sum(both)
        return total[:-NOTES].reshape(mine.shape), total[-NOTES:].astype(int).tolist()

    def _first(self, *head: int) -> np.ndarray:
        first = np.zeros(_HEAD + self.hidden + self._most_k, np.float32)
        first[: len(head)] = head
        return first


def mine(request: Request, owned: np.ndarray) -> list[np.ndarray]:
    """Of each piece, the pairs whose experts this host has. owned: (experts,) bool. A pair is
    numbered as in `flashmoe.ops`."""
    return [np.flatnonzero(owned[indices]) for indices in request.indices]


def inputs(request: Request, pairs: Sequence[np.ndarray]) -> list[tuple[mx.array, mx.array]]:
    """Those pairs as inputs of a `StreamingSwitchGLU`, one expert a row; without empty pieces.

    All pairs of an expert are on one host, and in one piece of its call as they are in one piece
    without a cluster: so each has the bits that it would have there.
    """
    found = []
    pieces = zip(request.xs, request.indices, pairs, request.alone, strict=True)
    for x, indices, chosen, alone in pieces:
        if chosen.size:
            rows = mx.array(x[chosen // indices.shape[1]]).astype(request.dtype)
            experts = mx.array(indices.reshape(-1)[chosen][:, None])
            found.append((rows[:, None], experts[:, None]) if alone else (rows, experts))
    return found
