"""Calls of each kernel, for the checks that look at all of them: see test_kernel_checks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

import toy_kernel
from flashmoe_metal.kernel import launched_by

#: A name for messages, and what calls the kernels by their public functions.
Case = tuple[str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """Each kernel in each type that it takes, and once with inputs so small that MLX passes them
    as constants. Each case costs seconds, for four compilers: none differs in sizes only."""
    yield "matvec", lambda: toy(dtype=mx.bfloat16)
    yield "matvec of one row", lambda: toy(rows=1, width=128)


def toy(**options) -> mx.array:
    arguments, _ = toy_kernel.problem(**options)
    return toy_kernel.multiply(toy_kernel.matvec(), *arguments)


def launches(call) -> list[tuple]:
    """What a call launches, as (kernel, arguments); it gets zeros for results."""
    seen = []

    def launch(kernel, **arguments):
        seen.append((kernel, arguments))
        outputs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    with launched_by(launch):
        mx.eval(call())
    assert seen, "it launches no kernel"
    return seen
