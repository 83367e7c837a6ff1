"""Random calls of the expert kernels, with their results in float64 and the errors allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from flashmoe.ops.reference import kernels as reference_kernels
from flashmoe_metal.down import (
    CombineInputs,
    DownInputs,
    SharedExpertInputs,
    SharedExpertTerm,
    combine,
    down,
)
from flashmoe_metal.gate_up import GateUpInputs, gate_up
from flashmoe_metal.matrix import Matrix
from flashmoe_metal.matvec import matvec
from flashmoe_metal.router import router

#: The implementations that are tested. Each has a function with the name of each kernel.
IMPLEMENTATIONS = {
    "kernel": SimpleNamespace(
        combine=combine, down=down, gate_up=gate_up, matvec=matvec, router=router
    ),
    "reference": reference_kernels,
}

#: The relative error of rounding to a type.
ROUNDING = {mx.float32: 2**-24, mx.bfloat16: 2**-8, mx.float16: 2**-11}
#: The absolute error of rounding a subnormal number to a type.
SMALLEST = {mx.float32: 0, mx.bfloat16: 0, mx.float16: 2**-25}


def dot_error(columns: int, size: np.ndarray) -> np.ndarray:
    """Return the error allowed for a sum of `columns` products in float32, in any order.

    Roundings are as often up as down, so they add up as the root of their number. Four times
    that is allowed, since codes are larger than weights.

    Args:
        size: the sum of the magnitudes of the products.
    """
    return 4 * ROUNDING[mx.float32] * columns**0.5 * size


@dataclass(frozen=True)
class Kind:
    """How a matrix is stored. With 0 bits it holds unquantised floats of dtype."""

    bits: int = 4
    group: int = 64
    dtype: mx.Dtype = mx.bfloat16


@dataclass(frozen=True)
class Case:
    """Sizes and types of a call.

    Attributes:
        rows: tokens.
        out, columns: rows and columns of the matrices.
        dtype: the type of x and of the outputs.
        shared: how the shared expert is stored; None if there is none.
        shared_size: the shared expert's rows of gate and up, and its columns of down.
        residual, gate: the types of these inputs of down and combine; None for no residual.
    """

    kind: Kind = Kind()
    rows: int = 2
    out: int = 37
    columns: int = 128
    dtype: mx.Dtype = mx.bfloat16
    top_k: int = 2
    slots: int = 4
    shared: Kind | None = None
    shared_size: int = 64
    residual: mx.Dtype | None = None
    gate: mx.Dtype = mx.bfloat16


@dataclass
class Problem:
    """A call of the function `name` and its results. errors: the largest ones before rounding."""

    name: str
    arguments: list
    exact: list[np.ndarray]
    errors: list[np.ndarray]
    dtypes: list[mx.Dtype]
    options: dict = field(default_factory=dict)

    def call(self, how: str = "kernel") -> list[mx.array]:
        """Return the outputs of one of the implementations in `IMPLEMENTATIONS`."""
        outputs = getattr(IMPLEMENTATIONS[how], self.name)(*self.arguments, **self.options)
        return [outputs] if isinstance(outputs, mx.array) else list(outputs)

    def check(self, how: str = "kernel"):
        """Assert that the outputs are within the errors of the exact results."""
        outputs = self.call(how)[: len(self.exact)]
        expected = zip(outputs, self.exact, self.errors, self.dtypes, strict=True)
        for i, (x, exact, error, dtype) in enumerate(expected):
            assert (x.shape, x.dtype) == (exact.shape, dtype)
            allowed = error + ROUNDING.get(dtype, 0) * (np.abs(exact) + error)
            allowed = allowed + SMALLEST.get(dtype, 0)
            wrong = ~(np.abs(numpy(x) - exact) <= allowed)  # also true of NaN
            assert not wrong.any(), f"{self.name}: {wrong.sum()} of {wrong.size} of output {i}"


def numpy(x: mx.array) -> np.ndarray:
    """Return an array as NumPy float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


class Random:
    """A source of random inputs."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1) -> mx.array:
        return mx.array(self.rng.normal(0, scale, shape).astype(np.float32)).astype(dtype)

    def matrix(self, kind: Kind, *shape: int) -> tuple[Matrix, np.ndarray]:
        """Return a matrix of shape ([slots,] rows, columns) and its weights in float64."""
        if not kind.bits:
            weight = self.normal(*shape, dtype=kind.dtype, scale=0.2)
            return Matrix(weight), numpy(weight)
        *stack, columns = shape
        words = self.rng.integers(0, 2**32, (*stack, columns * kind.bits // 32), np.uint32)
        scales, biases = (
            self.normal(*stack, columns // kind.group, dtype=kind.dtype, scale=0.5 / 2**n)
            for n in (kind.bits, 0)
        )
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        codes = bits.reshape(*shape, kind.bits) @ (1 << np.arange(kind.bits))
        scale, bias = (np.repeat(numpy(x), kind.group, axis=-1) for x in (scales, biases))
        matrix = Matrix(mx.array(words), scales, biases, kind.bits, kind.group)
        return matrix, scale * codes + bias

    def slots(self, case: Case) -> mx.array:
        """Return slots of shape (rows, top_k); the first two of each token are the same."""
        slots = self.rng.integers(0, case.slots, (case.rows, case.top_k), np.uint32)
        slots[:, 1:2] = slots[:, :1]
        return mx.array(slots)

    def scores(self, case: Case) -> mx.array:
        """Return positive scores of shape (rows, top_k)."""
        return mx.array(self.rng.uniform(0.1, 1, (case.rows, case.top_k)).astype(np.float32))


def dot(weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (..., out, in) times x (..., in) and the error allowed for it."""

    def product(a, b):
        return (a @ b[..., None])[..., 0]

    return product(weights, x), dot_error(x.shape[-1], product(np.abs(weights), np.abs(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def matvec_problem(case: Case, seed: int = 0) -> Problem:
    """Return a call of matvec."""
    random = Random(seed)
    matrix, weights = random.matrix(case.kind, case.out, case.columns)
    x = random.normal(case.rows, case.columns, dtype=case.dtype)
    exact, error = dot(weights, numpy(x))
    return Problem("matvec", [x, matrix], [exact], [error], [case.dtype])


def gate_up_problem(case: Case, seed: int = 0) -> Problem:
    """Return a call of gate_up."""
    random = Random(seed)
    x = random.normal(case.rows, case.columns, dtype=case.dtype)
    slots = random.slots(case)
    pairs = np.array(slots).reshape(-1)
    (gate, gate_w), (up, up_w) = (
        random.matrix(case.kind, case.slots, case.out, case.columns) for _ in range(2)
    )
    results = [_glu(gate_w[pairs], up_w[pairs], np.repeat(numpy(x), case.top_k, axis=0))]
    inputs = GateUpInputs(x, slots, gate, up)
    if case.shared:
        (gate, gate_w), (up, up_w) = (
            random.matrix(case.shared, case.shared_size, case.columns) for _ in range(2)
        )
        inputs = inputs._replace(shared=(gate, up))
        results.append(_glu(gate_w, up_w, numpy(x)))
    exact, errors = map(list, zip(*results, strict=True))
    return Problem("gate_up", [inputs], exact, errors, [mx.float32] * len(exact))


def _glu(gate: np.ndarray, up: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (g, g_error), (u, u_error) = dot(gate, x), dot(up, x)
    silu = g * sigmoid(g)
    # The slope of silu is at most 1.1. A GPU's exponential has an error of a few roundings.
    error = 1.1 * g_error * (np.abs(u) + u_error) + np.abs(silu) * u_error
    return silu * u, error + 16 * ROUNDING[mx.float32] * np.abs(silu * u)


def down_problem(case: Case, seed: int = 0) -> Problem:
    """Return a call of down."""
    random = Random(seed)
    slots, scores = random.slots(case), random.scores(case)
    h = random.normal(case.rows * case.top_k, case.columns)
    matrix, weights = random.matrix(case.kind, case.slots, case.out, case.columns)
    terms = dot(weights[np.array(slots).reshape(-1)], numpy(h))
    own, shared_term = None, None
    if case.shared:
        shared, shared_weights = random.matrix(case.shared, case.out, case.shared_size)
        shared_h = random.normal(case.rows, case.shared_size)
        gate = random.normal(case.rows, 3, dtype=case.gate)
        own = SharedExpertInputs(shared_h, shared, gate, 1)
        shared_term = *dot(shared_weights, numpy(shared_h)), gate
    residual = _residual(random, case)
    terms = [x.reshape(case.rows, case.top_k, -1) for x in terms]
    exact, error = _sum(*terms, numpy(scores), shared_term, residual)
    inputs = DownInputs(h, slots, scores, matrix, case.dtype, own, residual)
    return Problem("down", [inputs], [exact], [error], [case.dtype])


def combine_problem(case: Case, seed: int = 0) -> Problem:
    """Return a call of combine whose terms are shuffled, with three that belong to no token."""
    random = Random(seed)
    scores = random.scores(case)
    terms = random.normal(case.rows * case.top_k + 3, case.out)
    places = random.rng.permutation(len(terms))[:-3].astype(np.uint32)
    places = places.reshape(case.rows, case.top_k)
    own, shared_term = None, None
    if case.shared:
        shared, gate = (
            random.normal(case.rows, case.out),
            random.normal(case.rows, 3, dtype=case.gate),
        )
        own = SharedExpertTerm(shared, gate, 1)
        shared_term = numpy(shared), 0, gate
    residual = _residual(random, case)
    exact, error = _sum(numpy(terms)[places], 0, numpy(scores), shared_term, residual)
    inputs = CombineInputs(terms, mx.array(places), scores, case.dtype, own, residual)
    return Problem("combine", [inputs], [exact], [error], [case.dtype])


def _residual(random: Random, case: Case) -> mx.array | None:
    if case.residual is None:
        return None
    return random.normal(case.rows, case.out, dtype=case.residual)


def _sum(terms, errors, scores, shared, residual) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted sum of terms (rows, top_k, out) and the error allowed for it.

    shared: the shared expert's term, its error and its gates; None if there is none.
    """
    parts = scores[..., None] * terms
    error = (scores[..., None] * errors).sum(axis=1) if np.ndim(errors) else 0
    if shared is not None:
        gate = sigmoid(numpy(shared[2])[:, 1:2])
        parts = np.concatenate([parts, (gate * shared[0])[:, None]], axis=1)
        error = error + gate * shared[1]
    if residual is not None:
        parts = np.concatenate([parts, numpy(residual)[:, None]], axis=1)
    # The roundings of the sigmoid, and one for each addition.
    roundings = ROUNDING[mx.float32] * (16 + parts.shape[1])
    return parts.sum(axis=1), error + roundings * np.abs(parts).sum(axis=1)


def router_problem(
    experts: int = 40,
    top_k: int = 6,
    *,
    dtype: mx.Dtype = mx.float32,
    more: int = 0,
    normalise: bool = True,
    logits: str = "ties",
    rows: int = 3,
) -> Problem:
    """Return a call of the router.

    Args:
        more: columns after those of the experts, which hold the largest values.
        logits: "ties" for logits that are far apart or equal, "equal" for equal ones, "none" for
            only three above -inf.
    """
    rng = np.random.default_rng(experts)
    values = rng.integers(-8, 9, (rows, experts)) / 4 * (logits != "equal")
    if logits == "none":
        values[:, rng.permutation(experts)[3:]] = -np.inf
    inputs = np.concatenate([values, np.full((rows, more), 1e3)], axis=1).astype(np.float32)
    probabilities = np.exp(values - values.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    indices = np.argsort(probabilities, axis=1, kind="stable")[:, experts - top_k :]
    scores = np.take_along_axis(probabilities, indices, axis=1)
    error = (ROUNDING[dtype] + 2**-20) * scores + SMALLEST[dtype]
    if normalise:
        total = scores.sum(axis=1, keepdims=True)
        scores, error = scores / total, 2 * error / total
    return Problem(
        "router",
        [mx.array(inputs).astype(dtype), top_k],
        [indices, scores],
        [np.zeros(indices.shape), error],
        [mx.uint32, mx.float32],
        {"experts": experts, "normalise": normalise},
    )
