"""Softmax attention on the CPU, in float32, over mlx-lm's prompt cache.

MLX's matrix product on x86 is scalar: the scores and sums of 512 tokens with 32 heads of 256 took
3.7 s a layer, and those of one token after 2,048 others 25 ms. Here a prompt goes through BLAS, in
blocks of queries that bound the memory of its scores, and a few tokens through a loop that reads
keys and values once for all heads that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention as mlx_attention
from mlx_lm.models.cache import KVCache
from numba import njit, prange

from ...memory.footprint import BLOCK_QUERIES
from ..arrays import to_numpy
from .matvec import launching

#: Up to so many queries the loop beats BLAS.
FEW_QUERIES = 8

# Keys of one task: the split into tasks, and so each sum, depends on the number of keys alone.
_TASK_KEYS = 256


@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _partial(q, k, v, count, scale, top, total, sums):
    """Attention of one query to each _TASK_KEYS of the first `count` keys.

    q: (H, D); k, v: (kv heads, capacity, D). Out, by task: the highest score top and the sum of
    exponentials total, (tasks, H), and the weighted sum of values sums, (tasks, H, D).
    """
    heads, width = q.shape
    groups = k.shape[0]
    shared = heads // groups
    tasks = top.shape[0]
    for task in prange(tasks * groups):
        part, group = task // groups, task % groups
        first = part * _TASK_KEYS
        keys = min(_TASK_KEYS, count - first)
        scores = np.empty((shared, keys), np.float32)
        for s in range(keys):
            for h in range(shared):
                dot = np.float32(0)
                for d in range(width):
                    dot += q[group * shared + h, d] * k[group, first + s, d]
                scores[h, s] = dot * scale
        for h in range(shared):
            highest = scores[h, 0]
            for s in range(1, keys):
                highest = max(highest, scores[h, s])
            weight = np.float32(0)
            for s in range(keys):
                scores[h, s] = np.exp(scores[h, s] - highest)
                weight += scores[h, s]
            top[part, group * shared + h] = highest
            total[part, group * shared + h] = weight
            for d in range(width):
                sums[part, group * shared + h, d] = 0
        for s in range(keys):
            for h in range(shared):
                for d in range(width):
                    sums[part, group * shared + h, d] += scores[h, s] * v[group, first + s, d]


@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _softmax(scores, queries, seen, scale):
    """Softmax of scale * each row, in place. Row r is query r % queries, which sees the first
    seen + r % queries + 1 keys."""
    rows, keys = scores.shape
    for r in prange(rows):
        row = scores[r]
        count = seen + r % queries + 1
        highest = row[0]
        for s in range(1, count):
            highest = max(highest, row[s])
        total = np.float32(0)
        for s in range(count):
            row[s] = np.exp((row[s] - highest) * scale)
            total += row[s]
        for s in range(count):
            row[s] /= total
        for s in range(count, keys):
            row[s] = 0


def _few(q, k, v, count: int, scale: np.float32, out) -> None:
    """Each query alone. Shapes as in `_many`."""
    heads, queries, width = q.shape
    for i in range(queries):
        seen = count - queries + i + 1
        tasks = -(-seen // _TASK_KEYS)
        top = np.empty((tasks, heads), np.float32)
        total, sums = np.empty_like(top), np.empty((tasks, heads, width), np.float32)
        one = np.ascontiguousarray(q[:, i])
        with launching:
            _partial(one, k, v, seen, scale, top, total, sums)
        weight = np.exp(top - top.max(axis=0))
        out[i] = (weight[..., None] * sums).sum(axis=0) / (weight * total).sum(axis=0)[:, None]


def _many(q, k, v, count: int, scale: np.float32, out) -> None:
    """q: (H, L, D), the last L of `count` tokens; k, v: (kv heads, capacity, D), C-contiguous.
    out: (L, H, D)."""
    heads, queries, width = q.shape
    groups = k.shape[0]
    shared = heads // groups
    for first in range(0, queries, BLOCK_QUERIES):
        n = min(BLOCK_QUERIES, queries - first)
        seen = count - queries + first
        for group in range(groups):
            mine = slice(group * shared, (group + 1) * shared)
            rows = q[mine, first : first + n].reshape(shared * n, width)
            scores = rows @ k[group, : seen + n].T
            with launching:
                _softmax(scores, n, seen, scale)
            values = (scores @ v[group, : seen + n]).reshape(shared, n, width)
            out[first : first + n, mine] = values.swapaxes(0, 1)


def attend(queries, keys, values, cache, scale, mask, **others) -> mx.array:
    """In place of mlx-lm's `scaled_dot_product_attention`; its arguments and result.

    queries: (1, H, L, D), the last L tokens; keys, values: (1, kv heads, S, D). What mlx-lm does
    not ask for here goes to its own: batches, masks of another form, quantised caches.
    """
    batch, heads, length, width = queries.shape
    causal = length == 1 if mask is None else isinstance(mask, str) and mask == "causal"
    if batch != 1 or not causal or others or hasattr(cache, "bits"):
        return mlx_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
    count = keys.shape[2]
    if type(cache) is KVCache:
        # All that it has room for, so that no key is copied.
        keys, values = cache.keys, cache.values
    q, k, v = (x[0] for x in to_numpy(queries, keys, values))
    out = np.empty((length, heads, width), np.float32)
    how = _few if length <= FEW_QUERIES else _many
    how(q, k, v, count, np.float32(scale), out)
    return mx.array(out)[None].swapaxes(1, 2)


class _OneRow:
    """A module of attention whose projections of one row were made with those of others."""

    def __init__(self, module: nn.Module, **given: mx.array):
        self._module = module
        for name, value in given.items():
            setattr(self, name, lambda _, value=value: value)

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    @staticmethod
    def o_proj(x: mx.array) -> mx.array:
        return x  # made with those of others, too


def _attend_sequences(self, inputs: mx.array, caches: Sequence) -> mx.array:
    """A token of each of several sequences, with the bits that it has alone.

    inputs: (R, 1, hidden) -> (R, 1, hidden). caches: of each.
    """
    made = {name: getattr(self, name)(inputs) for name in ("q_proj", "k_proj", "v_proj")}
    outs = []
    for i, cache in enumerate(caches):
        mine = slice(i, i + 1)
        row = _OneRow(self, **{name: y[mine] for name, y in made.items()})
        outs.append(type(self).__call__(row, inputs[mine], None, cache))
    return self.o_proj(mx.concatenate(outs))


def _with_ours(attention: type[nn.Module]) -> type[nn.Module]:
    """mlx-lm's module, its forward unchanged, which finds `attend` under the name that it calls."""
    forward = attention.__call__
    names = {**forward.__globals__, "scaled_dot_product_attention": attend}
    ours = FunctionType(forward.__code__, names, argdefs=forward.__defaults__)
    return type(
        attention.__name__, (attention,), {"__call__": ours, "attend_sequences": _attend_sequences}
    )


NextAttention = _with_ours(qwen3_next.Qwen3NextAttention)
Attention = _with_ours(qwen3_moe.Attention)
