"""Compute the expert block that run.py times: with our kernels, with stock MLX, and in float64."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.models.activations import swiglu
from mlx_lm.models.switch_layers import _gather_sort, _scatter_unsort

from flashmoe_metal.down import DownInputs, SharedExpertInputs, down
from flashmoe_metal.gate_up import GateUpInputs, gate_up
from flashmoe_metal.matrix import Matrix

HIDDEN, EXPERT, SLOTS, CHAIN = 4096, 1024, 64, 240


def stack(slots: int, rows: int, columns: int, bits: int = 4, group: int = 64) -> Matrix:
    """Return random matrices, scaled so that a product keeps the size of its input."""
    words = mx.random.randint(0, 1 << 16, (slots, rows, columns * bits // 16)).astype(mx.uint16)
    low = columns**-0.5 * 12**0.5 / 2**bits
    scales = mx.random.uniform(0.75 * low, 1.25 * low, (slots, rows, columns // group))
    scales = scales.astype(mx.bfloat16)
    biases = (scales.astype(mx.float32) * (-(2**bits - 1) / 2)).astype(mx.bfloat16)
    matrix = Matrix(words.view(mx.uint32), scales, biases, bits, group)
    mx.eval(matrix.arrays)
    return matrix


class Block:
    """The experts of one layer, and a shared expert."""

    def __init__(self, slots: int, hidden: int, expert: int, bits: int = 4, group: int = 64):
        shapes = (expert, hidden), (expert, hidden), (hidden, expert)
        self.gate, self.up, self.down = (stack(slots, *s, bits, group) for s in shapes)
        self.shared = [first(stack(1, *s, bits, group)) for s in shapes]
        # A compiled function would compute lazy arrays again in each call.
        mx.eval([m.arrays for m in self.shared])

    def ours(self, x, slots, scores, logits=None):
        """Run flashmoe's kernels.

        Args:
            x: (rows, hidden).
            slots, scores: (rows, k).
            logits: of the shared expert's gate, in their first column. None: no shared expert.
        """
        gate, up, last = self.shared
        with_shared = logits is not None
        shared = (gate, up) if with_shared else None
        h, *shared_h = gate_up(GateUpInputs(x, slots, self.gate, self.up, shared))
        own = SharedExpertInputs(*shared_h, last, logits) if with_shared else None
        return down(DownInputs(h, slots, scores, self.down, x.dtype, own))

    def stock(self, x, slots, scores, logits=None):
        """Compute as mlx-lm's blocks do, which sort many pairs by their experts."""
        rows, at, back = x[:, None, None], slots, None
        if slots.size >= 64:
            rows, at, back = _gather_sort(rows, slots)
        h = swiglu(_gather(rows, self.gate, at, back), _gather(rows, self.up, at, back))
        y = _gather(h, self.down, at, back)
        if back is not None:
            y = _scatter_unsort(y, back, slots.shape)
        y = (y.squeeze(-2) * scores[..., None]).sum(-2)
        if logits is not None:
            gate, up, last = self.shared
            shared = product(swiglu(product(x, gate), product(x, up)), last)
            y = y + mx.sigmoid(logits) * shared
        return y

    def exact(self, x, slots, scores, logits) -> tuple[np.ndarray, np.ndarray]:
        """Return the result in float64, and for each element the sum of its terms without signs."""
        x, scores, logits = map(float64, (x, scores, logits))
        total, size = np.zeros_like(x), np.zeros_like(x)
        for t, row in enumerate(np.array(slots)):
            experts = [[_dense(m, int(s)) for m in (self.gate, self.up, self.down)] for s in row]
            terms = list(zip(experts, scores[t], strict=True))
            terms.append(([_dense(m) for m in self.shared], 1 / (1 + np.exp(-logits[t, 0]))))
            for (gate, up, last), weight in terms:
                g = gate @ x[t]
                h = g / (1 + np.exp(-g)) * (up @ x[t])
                total[t] += weight * (last @ h)
                size[t] += np.abs(weight) * (np.abs(last) @ np.abs(h))
        return total, size


def expert_nbytes(bits: int = 4, group: int = 64) -> int:
    """Return the bytes of the expert that is timed."""
    return 3 * HIDDEN * EXPERT * bits // 8 + 3 * HIDDEN * EXPERT // group * 4


def first(m: Matrix) -> Matrix:
    """Return the first matrix of a quantized stack."""
    assert m.scales is not None
    assert m.biases is not None
    return Matrix(m.weight[0], m.scales[0], m.biases[0], m.bits, m.group_size)


def _gather(x, m: Matrix, slots, back):
    kind = {"transpose": True, "group_size": m.group_size, "bits": m.bits}
    kind |= {"rhs_indices": slots, "sorted_indices": back is not None}
    return mx.gather_qmm(x, m.weight, m.scales, m.biases, **kind)


def product(x, m: Matrix):
    """Return x @ m.T as stock MLX computes it."""
    kind = {"transpose": True, "group_size": m.group_size, "bits": m.bits}
    return mx.quantized_matmul(x, m.weight, m.scales, m.biases, **kind)


def float64(x: mx.array) -> np.ndarray:
    """Return an array of any float dtype as float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _dense(m: Matrix, slot: int | None = None) -> np.ndarray:
    w, s, b = m.arrays if slot is None else (a[slot] for a in m.arrays)
    s, b = s.astype(mx.float32), b.astype(mx.float32)
    return float64(mx.dequantize(w, s, b, group_size=m.group_size, bits=m.bits))


def choices(rows: int, k: int, slots: int, count: int = 16) -> list[mx.array]:
    """Return random slots of `count` calls, (rows, k) each."""
    rng = np.random.default_rng(0)
    draws = [[rng.permutation(slots)[:k] for _ in range(rows)] for _ in range(count)]
    return [mx.array(np.array(d, np.uint32)) for d in draws]


class Chains:
    """Chains of blocks, each of which takes the result of the one before it, as in a model.

    Args:
        k: experts of a token.
        calls: blocks of a chain.
    """

    def __init__(self, layer: Block, k: int, calls: int = CHAIN):
        self.k, self.calls, self._layer = k, calls, layer
        self._x = mx.random.normal((1, HIDDEN)).astype(mx.bfloat16)
        # As in a model, where one product computes these logits and the router's: MLX places an
        # array of at most 8 bytes on a page that the host writes too, and the GPU waits for it.
        self._logits = mx.random.normal((1, SLOTS)).astype(mx.bfloat16)
        self._own = self._logits[:, :1]
        self._scores = mx.full((1, k), 1 / k)
        self._low = self._scores.astype(mx.bfloat16)
        self._chosen = choices(1, k, SLOTS)
        mx.eval(self._x, self._logits, self._own, self._scores, self._low, self._chosen)

    def chain(self, side: str, way: str = "", shared: bool = False) -> Callable[[], None]:
        """Return a function that runs a chain.

        Args:
            side: "stock" or "ours".
            way: "" compiles a block, "one piece" the whole chain, "not compiled" nothing.
            shared: whether the blocks have a shared expert.
        """
        block = getattr(self._layer, side)
        scores, logits = (self._scores, self._logits) if side == "ours" else (self._low, self._own)
        rest = (scores, logits) if shared else (scores,)
        step = mx.compile(block) if not way else block

        def chain(y):
            for i in range(self.calls):
                y = step(y, self._chosen[i % len(self._chosen)], *rest)
            return y

        whole = mx.compile(chain) if way == "one piece" else chain
        return lambda: mx.eval(whole(self._x))


#: How chains run: with and without the shared expert, compiled block by block, as one, or not.
KINDS: dict[str, dict] = {
    "": {},
    ", shared": {"shared": True},
    ", one piece": {"way": "one piece"},
    ", not compiled": {"way": "not compiled"},
}


def chains(side: str) -> dict[str, Callable[[], None]]:
    """Return all chains of "stock" or "ours", for K = 4 and 10."""
    layer = Block(SLOTS, HIDDEN, EXPERT)
    functions = {}
    for k in (4, 10):
        runs = Chains(layer, k)
        functions |= {f"K={k}{name}": runs.chain(side, **kind) for name, kind in KINDS.items()}
    return functions
