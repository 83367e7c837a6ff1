"""Compute softmax attention on the CPU, in float32, over mlx-lm's prompt cache.

MLX's matrix product on x86 is scalar: the scores and sums of 512 tokens with 32 heads of 256 took
3.7 s a layer, and those of one token after 2,048 others 25 ms. Here a prompt goes through BLAS, in
blocks of queries that bound the memory of its scores, and a few tokens go through a loop that reads
keys and values once for all heads that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention as mlx_attention
from mlx_lm.models.cache import KVCache
from numba import njit, prange

from ...memory.footprint import BLOCK_QUERIES
from ..arrays import to_numpy
from .matvec import launch_lock

#: The most queries for which the loop is faster than BLAS.
FEW_QUERIES = 8

# Keys of one task. The split into tasks, and so each sum, depends on the number of keys alone.
_TASK_KEYS = 256


@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _attend_in_tasks(q, k, v, count, scale, top, total, sums):
    """Compute one query's attention to the first `count` keys, apart for each _TASK_KEYS of them.

    Args:
        q: (H, D).
        k, v: (kv heads, capacity, D).
        scale: the factor of the scores.
        top, total: (tasks, H), set to the highest score and to the sum of exponentials of a task.
        sums: (tasks, H, D), set to the weighted sum of values of a task.
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
    """Replace each row of scores, (rows, keys), by the softmax of scale * the row.

    Row r belongs to query r % queries, which sees the first seen + r % queries + 1 keys.
    """
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


def _attend_few(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, count: int, scale: np.float32, out: np.ndarray
) -> None:
    """Compute the attention of each query alone; the arguments are those of `_attend_many`."""
    heads, queries, width = q.shape
    for i in range(queries):
        seen = count - queries + i + 1
        tasks = -(-seen // _TASK_KEYS)
        top = np.empty((tasks, heads), np.float32)
        total, sums = np.empty_like(top), np.empty((tasks, heads, width), np.float32)
        one = np.ascontiguousarray(q[:, i])
        with launch_lock:
            _attend_in_tasks(one, k, v, seen, scale, top, total, sums)
        weight = np.exp(top - top.max(axis=0))
        out[i] = (weight[..., None] * sums).sum(axis=0) / (weight * total).sum(axis=0)[:, None]


def _attend_many(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, count: int, scale: np.float32, out: np.ndarray
) -> None:
    """Compute the attention of a block of queries at a time, by BLAS.

    Args:
        q: (H, L, D), the queries of the last L of `count` tokens.
        k, v: (kv heads, capacity, D), C-contiguous.
        count: the tokens that k and v hold.
        scale: the factor of the scores.
        out: (L, H, D), set to the result.
    """
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
            with launch_lock:
                _softmax(scores, n, seen, scale)
            values = (scores @ v[group, : seen + n]).reshape(shared, n, width)
            out[first : first + n, mine] = values.swapaxes(0, 1)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    **others: Any,
) -> mx.array:
    """Compute attention in place of mlx-lm's `scaled_dot_product_attention`, with its arguments.

    Calls that the models here do not make go to mlx-lm's own function: batches, masks of another
    form, quantised caches.

    Args:
        queries: (1, H, L, D), of the last L tokens.
        keys, values: (1, kv heads, S, D).
        mask: None or "causal".

    Returns:
        (1, H, L, D).
    """
    batch, heads, length, width = queries.shape
    causal = length == 1 if mask is None else isinstance(mask, str) and mask == "causal"
    if batch != 1 or not causal or others or hasattr(cache, "bits"):
        return mlx_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, **others)
    count = keys.shape[2]
    if type(cache) is KVCache:
        # The whole arrays, unused positions included, so that no key is copied.
        keys, values = cache.keys, cache.values
    q, k, v = (x[0] for x in to_numpy(queries, keys, values))
    out = np.empty((length, heads, width), np.float32)
    compute = _attend_few if length <= FEW_QUERIES else _attend_many
    compute(q, k, v, count, np.float32(scale), out)
    return mx.array(out)[None].swapaxes(1, 2)


class _OneSequence:
    """An attention module for one sequence, whose projections were computed with those of others.

    Args:
        module: the attention module.
        projected: the output of each projection for this sequence, by the projection's name.
    """

    def __init__(self, module: nn.Module, **projected: mx.array):
        self._module = module
        for name, value in projected.items():
            setattr(self, name, lambda _, value=value: value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def o_proj(x: mx.array) -> mx.array:
        return x  # `_attend_sequences` projects the outputs of all sequences together


def _attend_sequences(self: Any, inputs: mx.array, caches: Sequence[Any]) -> mx.array:
    """Compute one token of each of several sequences, with the bits that each has alone.

    Args:
        inputs: (sequences, 1, hidden).
        caches: the cache of each sequence.

    Returns:
        (sequences, 1, hidden).
    """
    projected = {name: getattr(self, name)(inputs) for name in ("q_proj", "k_proj", "v_proj")}
    outs = []
    for i, cache in enumerate(caches):
        mine = slice(i, i + 1)
        one = _OneSequence(self, **{name: y[mine] for name, y in projected.items()})
        outs.append(type(self).__call__(one, inputs[mine], None, cache))
    return self.o_proj(mx.concatenate(outs))


def _with_attend(attention: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of mlx-lm's module whose unchanged forward calls `attend`.

    The forward's code gets globals in which `scaled_dot_product_attention` is `attend`.
    """
    forward: Any = attention.__call__
    names = {**forward.__globals__, "scaled_dot_product_attention": attend}
    patched = FunctionType(forward.__code__, names, argdefs=forward.__defaults__)
    return type(
        attention.__name__,
        (attention,),
        {"__call__": patched, "attend_sequences": _attend_sequences},
    )


NextAttention = _with_attend(qwen3_next.Qwen3NextAttention)
Attention = _with_attend(qwen3_moe.Attention)
