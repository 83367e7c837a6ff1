"""Calls of each kernel, for the checks of all kernels in test_kernel_checks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gated_delta_problems
import mlx.core as mx
from expert_problems import (
    Case,
    Kind,
    Problem,
    combine_problem,
    down_problem,
    gate_up_problem,
    matvec_problem,
    router_problem,
)

from flashmoe_metal import grouped
from flashmoe_metal.add_norm import add_norm
from flashmoe_metal.gated_delta_prompt import gated_delta_prompt
from flashmoe_metal.gated_delta_step import gated_delta_step
from flashmoe_metal.kernel import launched_by
from flashmoe_metal.matrix import Matrix
from flashmoe_metal.qk_norm_rope import HeadLayout, QkInputs, qk_norm_rope

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
#: Sizes of slots, scores and gates that are small enough for MLX to pass them as constants.
FEW = {"rows": 1, "top_k": 3}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name for messages and a function that calls the kernel by its public function.

    Each kernel has two types or more, and once inputs that are small enough for MLX to pass them as
    constants. A case costs seconds, for four compilers, so no two differ in their sizes only.
    """
    for name, problem in problems():
        yield name, problem.call
    for dtype in (BF16, F32):
        yield f"add_norm of {dtype}", lambda dtype=dtype: norm(dtype)
        yield f"qk_norm_rope of {dtype}", lambda dtype=dtype: rotation(dtype)
        yield f"gated_delta_step of {dtype}", lambda dtype=dtype: step(dtype)
        yield f"gated_delta_prompt of {dtype}", lambda dtype=dtype: prompt(dtype)


def cuda_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a call that launches kernels in CUDA's own language, of bf16 and f16."""
    for dtype in (BF16, F16):
        yield f"group_pairs and grouped of {dtype}", lambda dtype=dtype: products(dtype)
        for bits in (4, 5):
            yield (
                f"unpack of {dtype}, {bits} bits",
                lambda dtype=dtype, bits=bits: grouped.unpack(packed(64, 64, bits, dtype)),
            )


def products(dtype: mx.Dtype):
    groups, _ = grouped.group_on_gpu(mx.zeros((70, 2), mx.uint32), 1)
    gate, down = packed(24, 128, 4, dtype), packed(128, 64, 3, dtype)
    h = grouped.grouped_gate_up(mx.zeros((70, 128), dtype), groups, gate, gate)
    return h, grouped.grouped_down(mx.zeros((140, 64), dtype), groups, down)


def packed(rows: int, columns: int, bits: int, dtype: mx.Dtype) -> Matrix:
    """Return a matrix of zeros with groups of 32."""
    scales = mx.zeros((rows, columns // 32), dtype)
    words = mx.zeros((rows, columns * bits // 32), mx.uint32)
    return Matrix(words, scales, scales, bits, 32)


def problems() -> Iterator[tuple[str, Problem]]:
    """Yield the calls of the expert kernels with their names."""
    yield "router", router_problem(dtype=BF16, more=1)
    yield "router of f32", router_problem(rows=1, experts=7)
    yield "matvec", matvec_problem(Case(Kind(5, 128, F16)))
    yield "matvec of f32", matvec_problem(Case(Kind(6, 32, F32), dtype=F32))
    yield "gate_up", gate_up_problem(Case(rows=8, shared=Kind(8, 32, F16), shared_size=37))
    yield "gate_up of a few", gate_up_problem(Case(Kind(3, 32, F16), dtype=F16, **FEW))
    yield "gate_up of f32", gate_up_problem(Case(Kind(0, dtype=F32), dtype=F32))
    more = {"shared": Kind(0, dtype=F16), "residual": BF16}
    yield "down", down_problem(Case(rows=8, **more))
    yield "down of a few", down_problem(Case(Kind(2, 32, F32), dtype=F32, **FEW, **more))
    yield "down of f16", down_problem(Case(Kind(0), dtype=F16, gate=F32))
    yield "combine", combine_problem(Case(rows=8, **more))
    more |= {"residual": F32, "gate": F16}
    yield "combine of a few", combine_problem(Case(dtype=F16, out=7, **FEW, **more))


def norm(dtype: mx.Dtype):
    x = mx.ones((1, 1, 132 if dtype == BF16 else 5), dtype)
    return add_norm(x, x, x[0, 0], mx.array([1e-6]))


def rotation(dtype: mx.Dtype):
    gated = dtype == BF16
    queries, keys = mx.ones((1, 1, 32 if gated else 16), dtype), mx.ones((1, 1, 8), dtype)
    weight, eps, rope = mx.ones(8, dtype), mx.array([1e-6, 1e-6]), mx.array([20.0, 1.0])
    inputs = QkInputs(queries, keys, weight, weight, eps, rope, mx.array([3]))
    return qk_norm_rope(inputs, HeadLayout(heads=2, key_heads=1, rotated=4, gated=gated))


def step(dtype: mx.Dtype):
    shape = "one_head" if dtype == BF16 else "few_rows"
    inputs, rest = gated_delta_problems.case(gated_delta_problems.SHAPES[shape], dtype)
    return gated_delta_step(inputs, **rest)


def prompt(dtype: mx.Dtype):
    heads, tokens = (2, 3) if dtype == BF16 else (1, 2)
    key, value = mx.ones((1, tokens, 1, 36), dtype), mx.ones((1, tokens, heads, 20), dtype)
    gates = mx.ones((1, tokens, heads))
    return gated_delta_prompt(key, key, value, gates, gates, mx.ones((1, heads, 20, 36)))


def launches(call) -> list[tuple]:
    """Return the (kernel, arguments) that a call launches. The call gets zeros as results."""
    launched = []

    def launch(kernel, **arguments):
        launched.append((kernel, arguments))
        outputs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    with launched_by(launch):
        mx.eval(call())
    assert launched, "the call launches no kernel"
    return launched
