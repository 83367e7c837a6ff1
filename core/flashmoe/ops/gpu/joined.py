"""Projections of one input as one product: a launch costs more than the rows of a small matrix.

A module keeps mlx-lm's forward, which calls each projection by its name; what it calls takes its
part of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from flashmoe_metal.matrix import Matrix

#: MLX's fast product of many rows on CUDA takes output columns in multiples of this.
_ROWS = 128


class Part(NamedTuple):
    """Where the output of a projection lies."""

    product: int  # which of the products
    start: int
    size: int

    def of(self, products: Sequence[mx.array]) -> mx.array:
        return products[self.product][..., self.start : self.start + self.size]


def join(layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Part]]:
    """Fewer layers for the same rows, and the part that each given layer's output is.

    Neighbours that are quantised in the same way become one. The given ones are used up: their
    weights are joined lazily, so that they are freed when the joined ones are evaluated.
    """
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if groups and _alike(groups[-1][0], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    parts = []
    for i, group in enumerate(groups):
        start = 0
        for layer in group:
            size = _rows(layer)
            parts.append(Part(i, start, size))
            start += size
    return [_joined(group) for group in groups], parts


def permute(layer: nn.Module, order: mx.array) -> None:
    """Let output i of the layer be what its output order[i] was."""
    for name, value in _arrays(layer).items():
        layer[name] = value[order]


def matrix_of(layer: nn.Module) -> Matrix | None:
    """The weights of a layer, None when our kernels cannot read them."""
    if "bias" in layer or getattr(layer, "mode", "affine") != "affine":
        return None
    packed = isinstance(layer, nn.QuantizedLinear)
    kind = (layer.scales, layer.biases, layer.bits, layer.group_size) if packed else ()
    matrix = Matrix(layer.weight, *kind)
    return None if matrix.reason() else matrix


def _arrays(layer: nn.Module) -> dict[str, mx.array]:
    return {name: v for name, v in layer.items() if isinstance(v, mx.array)}


def _rows(layer: nn.Module) -> int:
    return layer.weight.shape[0]


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether the rows of both can be those of one layer. All of their arrays have rows."""
    if type(a) is not type(b) or type(a) not in (nn.Linear, nn.QuantizedLinear):
        return False

    def kind(layer):
        arrays = {name: (v.dtype, v.shape[1:]) for name, v in _arrays(layer).items()}
        return arrays, [getattr(layer, n, None) for n in ("bits", "group_size", "mode")]

    return kind(a) == kind(b)


def _joined(group: list[nn.Module]) -> nn.Module:
    """One layer with the rows of all, in the place of the first one."""
    first = group[0]
    if len(group) == 1:
        return first
    # Quantised, a product of 64 columns more than 128 divides takes a path many times as slow.
    spare = -sum(map(_rows, group)) % _ROWS if isinstance(first, nn.QuantizedLinear) else 0
    for name, value in _arrays(first).items():
        pieces = [layer[name] for layer in group]
        if spare:
            pieces.append(mx.zeros((spare, *value.shape[1:]), value.dtype))
        first[name] = mx.concatenate(pieces)
    return first


class Joined:
    """A module of mlx-lm whose projections are parts of joined layers, beside its class."""

    def join_projections(self) -> None:
        """Join the projections of this module; called once, when it has taken its place."""
        raise NotImplementedError

    def join(self, names: Sequence[str]) -> None:
        """Join its layers of these names, in this order."""
        layers = [self.pop(name) for name in names]
        self.joined, self._parts = join(layers)

    def products(self, x: mx.array) -> list[mx.array]:
        return [layer(x) for layer in self.joined]

    def forward(self, products: list[mx.array], *args) -> mx.array:
        """mlx-lm's, which asks for the parts of these products."""
        self["_products"] = products
        try:
            return super().__call__(*args)
        finally:
            del self["_products"]

    def part(self, i: int) -> mx.array:
        return self._parts[i].of(self["_products"])
