"""Compute GatedDeltaNet on the CPU: convolution, recurrence and norm of all tokens in one launch.

On the CPU mlx-lm runs a Python loop over tokens of operations on whole states: 3.6 ms a token and
layer for 64 heads of 128 x 128, and 1.6 ms around it. Everything is local to a head, so each
thread takes heads, and each row of a state stays in the CPU's cache while the tokens pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_next
from numba import njit, prange

from ..arrays import to_numpy
from .layers import project
from .matvec import launch_lock


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _convolve(x, w, channel, out):
    """Set out (T, D) to silu of the causal convolution of D channels of x from `channel` on.

    x: (taps - 1 + T, channels), w: (channels, taps).
    """
    taps = w.shape[1]
    for t in range(out.shape[0]):
        for d in range(out.shape[1]):
            total = np.float32(0)
            for j in range(taps):
                total += x[t + j, channel + d] * w[channel + d, j]
            out[t, d] = total / (np.float32(1) + np.exp(-total))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _normalise(x, eps, factor):
    """Divide each row of x, (T, D), by the root of its mean square plus eps; multiply by factor."""
    for t in range(x.shape[0]):
        total = np.float32(0)
        for d in range(x.shape[1]):
            total += x[t, d] * x[t, d]
        scale = factor / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for d in range(x.shape[1]):
            x[t, d] *= scale


@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _run_heads(x, w, a, b, z, decay, dt_bias, norm, eps, qk_eps, key_heads, before, after, out):
    """Take all T tokens of one sequence through the H heads of a layer.

    No value depends on another head, so the split over threads changes no bit. The arguments are
    plain arrays, since numba takes much longer to find the type of a named tuple.

    Args:
        x: (taps - 1 + T, channels), the convolution's inputs: queries, keys and values of all heads
            in turn.
        w: (channels, taps), the weights of the convolution.
        a, b: (T, H), the numbers that determine the decay and the share of what is new.
        z: (T, H, Dv), the gates of the output.
        decay: (H,), exp(A_log).
        dt_bias: (H,).
        norm: (Dv,), the weights of the norm.
        eps: what the norm adds to the mean of squares.
        qk_eps: what is added to the mean of squares of a query or key.
        key_heads: heads of queries and keys, which several heads of values share.
        before: (H, Dv, Dk), the state before the tokens.
        after: (H, Dv, Dk), set to the state after them.
        out: (T, H, Dv), set to the result.
    """
    tokens, heads, rows = z.shape
    width = before.shape[2]
    scale = np.float32(1) / np.sqrt(np.float32(width))
    for head in prange(heads):
        key_head = head // (heads // key_heads)
        q = np.empty((tokens, width), np.float32)
        k = np.empty((tokens, width), np.float32)
        v = np.empty((tokens, rows), np.float32)
        _convolve(x, w, key_head * width, q)
        _convolve(x, w, (key_heads + key_head) * width, k)
        _convolve(x, w, 2 * key_heads * width + head * rows, v)
        _normalise(q, qk_eps, scale * scale)
        _normalise(k, qk_eps, scale)
        g = np.empty(tokens, np.float32)
        beta = np.empty(tokens, np.float32)
        for t in range(tokens):
            step = a[t, head] + dt_bias[head]
            # softplus, without overflow
            step = max(step, np.float32(0)) + np.log1p(np.exp(-abs(step)))
            g[t] = np.exp(-decay[head] * step)
            beta[t] = np.float32(1) / (np.float32(1) + np.exp(-b[t, head]))
        for row in range(rows):
            s = after[head, row]
            s[:] = before[head, row]
            for t in range(tokens):
                memory = np.float32(0)
                for j in range(width):
                    s[j] *= g[t]
                    memory += s[j] * k[t, j]
                delta = (v[t, row] - memory) * beta[t]
                y = np.float32(0)
                for j in range(width):
                    s[j] += k[t, j] * delta
                    y += s[j] * q[t, j]
                v[t, row] = y
        _normalise(v, eps, np.float32(1))
        for t in range(tokens):
            for d in range(rows):
                gate = z[t, head, d]
                gate = gate / (np.float32(1) + np.exp(-gate))
                out[t, head, d] = v[t, d] * norm[d] * gate


class _GatedDeltaNet(nn.Module):
    """A GatedDeltaNet that computes batches without padding in numpy, and others by mlx-lm."""

    def __call__(self, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if mask is not None or (cache is not None and cache.lengths is not None):
            return super().__call__(inputs, mask, cache)  # type: ignore[misc]  # of the next class
        batch, tokens, _ = inputs.shape
        rows = to_numpy(inputs)[0].reshape(batch * tokens, -1)
        parts = [p.reshape(batch, tokens, -1) for p in self._project(rows, tokens)]
        out = self._recur(parts, cache)
        y = project(self.out_proj, out.reshape(batch * tokens, -1), tokens)
        return mx.array(y.reshape(inputs.shape))

    def attend_sequences(self, inputs: mx.array, caches: Sequence[Any]) -> mx.array:
        """Compute one token of each of several sequences, with the bits that each has alone.

        Args:
            inputs: (sequences, 1, hidden).
            caches: the cache of each sequence.

        Returns:
            (sequences, 1, hidden).
        """
        parts = self._project(to_numpy(inputs)[0].reshape(len(caches), -1), 1)
        outs = [
            self._recur([p[i : i + 1, None] for p in parts], cache)
            for i, cache in enumerate(caches)
        ]
        y = project(self.out_proj, np.concatenate(outs).reshape(len(caches), -1), 1)
        return mx.array(y.reshape(inputs.shape))

    def _project(self, x: np.ndarray, tokens: int) -> list[np.ndarray]:
        """Return the projections of rows x: queries, keys and values of all heads; z; b; a.

        tokens: the rows of one sequence.
        """
        raise NotImplementedError

    def _recur(self, parts: Sequence[np.ndarray], cache: Any) -> np.ndarray:
        """Compute what comes between the projections, and update the cache.

        Args:
            parts: what `_project` returned, (B, T, ...) each.

        Returns:
            (B, T, H, Dv).
        """
        mixed, z, b, a = parts
        batch, tokens = z.shape[:2]
        keep = self.conv_kernel_size - 1
        if cache is not None and cache[0] is not None:
            (before,) = to_numpy(cache[0])
        else:
            before = np.zeros((batch, keep, mixed.shape[2]), np.float32)
        x = np.concatenate([before, mixed], axis=1)
        if cache is not None and cache[1] is not None:
            (state,) = to_numpy(cache[1])
        else:
            state = np.zeros((batch, *self._state_shape), np.float32)
        # A new array: MLX's arrays must not change, and a snapshot of the cache may hold this one.
        after = np.empty_like(state)
        w, decay, dt_bias, norm = self._weights
        z = z.reshape(batch, tokens, self.num_v_heads, self.head_v_dim)
        out = np.empty_like(z)
        expected = (batch, keep, mixed.shape[2]), (batch, *self._state_shape)
        if (before.shape, state.shape) != expected:
            raise ValueError(
                f"the prompt cache is of another model: it has states {before.shape} and "
                f"{state.shape}, and this layer has {expected[0]} and {expected[1]}"
            )
        eps = np.float32(self.norm.eps)
        # mlx-lm adds 1e-6 to the sum of squares; the kernel adds this to their mean.
        qk_eps = np.float32(1e-6 / self.head_k_dim)
        for i in range(batch):
            sequence = x[i], w, a[i], b[i], z[i]
            weights = decay, dt_bias, norm, eps, qk_eps, self.num_k_heads
            with launch_lock:
                _run_heads(*sequence, *weights, state[i], after[i], out[i])
        if cache is not None:
            cache[0] = mx.array(x[:, -keep:])
            cache[1] = mx.array(after)
            cache.advance(tokens)
        return out

    @cached_property
    def _weights(self) -> list[np.ndarray]:
        """The arguments w, decay, dt_bias and norm of `_run_heads`."""
        return to_numpy(
            self.conv1d.weight.squeeze(-1), mx.exp(self.A_log), self.dt_bias, self.norm.weight
        )

    @property
    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_v_heads, self.head_v_dim, self.head_k_dim


class GatedDeltaNet(_GatedDeltaNet, qwen3_5.GatedDeltaNet):
    """The GatedDeltaNet of qwen3_5."""

    def _project(self, x: np.ndarray, tokens: int) -> list[np.ndarray]:
        layers = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        return [project(layer, x, tokens) for layer in layers]


class NextGatedDeltaNet(_GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet):
    """The GatedDeltaNet of qwen3_next, whose projections interleave their parts by key head."""

    def _project(self, x: np.ndarray, tokens: int) -> list[np.ndarray]:
        count, heads = x.shape[0], self.num_k_heads
        width, share = self.head_k_dim, self.num_v_heads // heads
        qkvz = project(self.in_proj_qkvz, x, tokens).reshape(count, heads, -1)
        ba = project(self.in_proj_ba, x, tokens).reshape(count, heads, -1)
        ends = np.cumsum([width, width, share * self.head_v_dim])
        q, k, v, z = (p.reshape(count, -1) for p in np.split(qkvz, ends, axis=-1))
        b, a = (np.ascontiguousarray(p).reshape(count, -1) for p in np.split(ba, [share], axis=-1))
        return [np.concatenate([q, k, v], axis=-1), np.ascontiguousarray(z), b, a]
