"""Rounds weights to few bits: finds for each group the scale and bias that cost the least.

A group of weights in a row is stored as codes q, integers in 0..2**bits - 1, and is read as
scale * q + bias. Plain rounding spreads the codes from the smallest weight to the largest, so one
outlier makes the steps of all its neighbours coarse. The cost of a rounded weight is the square of
its error times the importance of its column: how large the inputs are that it is multiplied with.

The search treats each group on its own:

1. Both ends of the range are pulled towards the mean by several fractions. Each pair of ends is one
   try.
2. The weights are rounded to that range. With fixed codes, the cost is a quadratic function of
   scale and bias, so the best two follow in closed form: a weighted line fit of the weights over
   their codes. The sums of the fit also give its remaining cost, so a try is one pass over the
   group.
3. From the best try on, scale and bias are rounded to the dtype that they are stored in, the
   weights are rounded to the nearest codes again, and the line is fitted again, as long as the cost
   falls.
4. Plain rounding in the way of MLX is one of the candidates, so no group is worse than with it.

The idea is that of llama.cpp's importance matrices and of "least squares after clipping" in the
literature: fit the scale to the codes instead of to the extremes, weighted by squared inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..ops.cpu.matvec import launch_lock

#: Fractions by which an end of the range is pulled in, by bits. With half as many fractions more,
#: the error falls by a thousandth and the time doubles. With more bits than these, the steps are
#: fine enough and only the line fit is done.
PULLS = {
    2: (0.0, 0.15, 0.3, 0.45),
    3: (0.0, 0.1, 0.2, 0.3),
    4: (0.0, 0.08, 0.16),
    5: (0.0, 0.05, 0.1),
}

#: Maximum number of line fits after the best try.
FITS = 6

_F32, _F16, _BF16 = range(3)
_KINDS = {"F32": _F32, "F16": _F16, "BF16": _BF16}


class Rounded(NamedTuple):
    """Rounded weights.

    Attributes:
        weight: uint32 (rows, cols * bits / 32), the packed codes.
        scales, biases: float32 (rows, groups), values that the requested dtype represents exactly.
        error: sum of importance * error squared.
        plain: the same sum for plain rounding.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    error: float
    plain: float


def round_weights(
    w: np.ndarray, importance: np.ndarray, bits: int, group_size: int, dtype: str
) -> Rounded:
    """Round a matrix.

    Args:
        w: float32 (rows, cols).
        importance: (cols,), the importance of each column.
        dtype: safetensors dtype that scales and biases will be stored in.
    """
    rows, cols = w.shape
    weight = np.empty((rows, cols * bits // 32), np.uint32)
    scales = np.empty((rows, cols // group_size), np.float32)
    biases = np.empty_like(scales)
    errors = np.empty((rows, 2), np.float64)
    pulls = np.array(PULLS.get(bits, (0.0,)), np.float32)
    importance = np.ascontiguousarray(importance, np.float32)
    kind = _KINDS[dtype]
    with launch_lock:
        _round_rows(w, importance, bits, group_size, kind, pulls, weight, scales, biases, errors)
    error, plain = errors.sum(axis=0).tolist()
    return Rounded(weight, scales, biases, error, plain)


def weighted_squares(
    w: np.ndarray, importance: np.ndarray, other: np.ndarray
) -> tuple[float, float]:
    """Return two sums of importance * square over all weights: of w - other, and of w."""
    sums = np.empty((len(w), 2), np.float64)
    with launch_lock:
        _weighted_squares(w, np.ascontiguousarray(importance, np.float32), other, sums)
    error, energy = sums.sum(axis=0).tolist()
    return error, energy


@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _weighted_squares(w, h, other, sums):
    for row in prange(w.shape[0]):
        error = energy = np.float32(0)
        for i in range(w.shape[1]):
            off = w[row, i] - other[row, i]
            error += h[i] * off * off
            energy += h[i] * w[row, i] * w[row, i]
        sums[row, 0], sums[row, 1] = error, energy


@njit(parallel=True, cache=True, nogil=True)
def _round_rows(w, importance, bits, size, kind, pulls, weight, scales, biases, errors):
    top = np.float32(2**bits - 1)
    for row in prange(w.shape[0]):
        codes = np.empty(w.shape[1], np.uint32)
        errors[row] = 0
        for group in range(scales.shape[1]):
            part = slice(group * size, (group + 1) * size)
            x, h = w[row, part], importance[part]
            scale, bias, plain = _plain(x, h, top, kind)
            best, scale, bias = _search(x, h, top, kind, pulls, scale, bias, plain)
            _encode(x, scale, bias, top, codes[part])
            scales[row, group], biases[row, group] = scale, bias
            errors[row, 0] += best
            errors[row, 1] += plain
        _pack(codes, bits, weight[row])


@njit(cache=True, nogil=True)
def _plain(x, h, top, kind):
    """Return (scale, bias, error) of MLX's rounding: one end of the range and 0 are exact."""
    low, high = x.min(), x.max()
    scale = max((high - low) / top, np.float32(1e-7))
    edge = high
    if abs(low) > abs(high):
        edge = low
    else:
        scale = -scale
    code = np.rint(edge / scale)
    bias = np.float32(0)
    if code != 0:
        scale, bias = edge / code, edge
    scale, bias = _stored(scale, kind), _stored(bias, kind)
    return scale, bias, _error(x, h, top, scale, bias)


@njit(cache=True, nogil=True)
def _search(x, h, top, kind, pulls, scale, bias, plain):
    """Return (error, scale, bias) of the best candidate, plain rounding included."""
    mean = x.mean()
    low, high = x.min() - mean, x.max() - mean
    least, s, b = np.float32(np.inf), np.float32(0), np.float32(0)
    for pull_low in pulls:
        for pull_high in pulls:
            start = low * (1 - pull_low)
            step = (high * (1 - pull_high) - start) / top
            if step > 0:
                fit = _fit(x, h, top, mean, step, start + mean)
                if fit[0] < least:
                    least, s, b = fit
    best = plain
    for _ in range(FITS):
        if s == 0:
            break
        s, b = _stored(s, kind), _stored(b, kind)
        error = _error(x, h, top, s, b)
        if not error < best:
            break
        best, scale, bias = error, s, b
        _, s, b = _fit(x, h, top, mean, s, b)
    return best, scale, bias


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _fit(x, h, top, mean, scale, bias):
    """Return (error, scale, bias) of the line through the weights over their codes.

    The scale is 0 if all codes that have any importance are the same.
    """
    one, zero = np.float32(1), np.float32(0)
    inverse, middle = one / scale, top / np.float32(2)
    sh = sq = sqq = sx = sqx = sxx = zero
    for i in range(x.size):
        # Codes and weights are relative to their middles, so that the differences of float32 sums
        # below keep their digits.
        q = min(max((x[i] - bias) * inverse + np.float32(0.5), zero), top)
        q = np.float32(np.int32(q)) - middle
        y = x[i] - mean
        sh += h[i]
        sq += h[i] * q
        sqq += h[i] * q * q
        sx += h[i] * y
        sqx += h[i] * q * y
        sxx += h[i] * y * y
    spread = sqq * sh - sq * sq
    if not spread > np.float32(1e-6) * sqq * sh:
        return np.float32(np.inf), zero, zero
    slope = (sqx * sh - sq * sx) / spread
    level = (sx - slope * sq) / sh
    return sxx - slope * sqx - level * sx, slope, level - slope * middle + mean


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _error(x, h, top, scale, bias):
    zero = np.float32(0)
    inverse = zero if scale == 0 else np.float32(1) / scale
    total = zero
    for i in range(x.size):
        q = min(max((x[i] - bias) * inverse + np.float32(0.5), zero), top)
        off = x[i] - bias - scale * np.float32(np.int32(q))
        total += h[i] * off * off
    return total


@njit(cache=True, nogil=True)
def _encode(x, scale, bias, top, codes):
    for i in range(x.size):
        q = np.float32(0)
        if scale != 0:
            q = (x[i] - bias) * (np.float32(1) / scale) + np.float32(0.5)
        codes[i] = np.uint32(min(max(q, np.float32(0)), top))


@njit(cache=True, nogil=True)
def _pack(codes, bits, words):
    """Pack a row of codes as a stream of bits, lowest first, into little-endian words."""
    held, count, at = np.uint64(0), 0, 0
    for code in codes:
        held |= np.uint64(code) << np.uint64(count)
        count += bits
        if count >= 32:
            words[at] = np.uint32(held & np.uint64(0xFFFFFFFF))
            held >>= np.uint64(32)
            count -= 32
            at += 1


@njit(cache=True, nogil=True)
def _stored(value, kind):
    """Return the nearest float of the dtype that scales and biases are stored in."""
    value = np.float32(value)
    if kind == _F32:
        return value
    if kind == _F16 and abs(value) < np.float32(2**-14):
        unit = np.float32(2**24)
        return np.float32(np.rint(value * unit)) / unit
    drop = np.uint32(16) if kind == _BF16 else np.uint32(13)
    word = np.uint32(value.view(np.uint32))
    half = np.uint32((1 << (drop - 1)) - 1) + ((word >> drop) & np.uint32(1))
    word = np.uint32(((word + half) >> drop) << drop)
    return word.view(np.float32)
