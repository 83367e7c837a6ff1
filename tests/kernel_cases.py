"""Calls of each kernel, for the checks that look at all of them: see test_kernel_checks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

import toy_kernel

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
