"""Compute several projections of one input as one product.

A launch costs more than the rows of a small matrix. A module keeps mlx-lm's forward, which calls
each projection by its name; the methods of these names return their slice of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from flashmoe_metal.matrix import Matrix

#: MLX's fast product of many rows on CUDA takes output columns in multiples of this.
_ROWS = 128


class OutputSlice(NamedTuple):
    """Where the output of one projection is among the products of the joined layers.

    Attributes:
        product: the index of the product.
        start, size: the columns of that product.
    """

    product: int
    start: int
    size: int

    def select_from(self, products: Sequence[mx.array]) -> mx.array:
        """Return the output of the projection, (..., size)."""
        return products[self.product][..., self.start : self.start + self.size]


def join_layers(layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[OutputSlice]]:
    """Join neighbouring linear layers that are stored in the same way into one.

    The given layers are used up: their weights are joined lazily, so that they are freed when the
    joined ones are evaluated.

    Returns:
        The joined layers, and for each given layer the slice of their outputs that it had.
    """
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if groups and _can_join(groups[-1][0], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    slices = []
    for i, group in enumerate(groups):
        start = 0
        for layer in group:
            size = _rows(layer)
            slices.append(OutputSlice(i, start, size))
            start += size
    return [_joined(group) for group in groups], slices


def reorder_outputs(layer: nn.Module, order: mx.array) -> None:
    """Reorder the outputs of a linear layer: its output i becomes what its output order[i] was."""
    for name, value in _arrays(layer).items():
        layer[name] = value[order]


def matrix_of(layer: nn.Module) -> Matrix | None:
    """Return the weights of a linear layer, or None where the kernels cannot read them."""
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


def _can_join(a: nn.Module, b: nn.Module) -> bool:
    """Return whether one layer can have the rows of both; all arrays of a layer have rows."""
    if type(a) is not type(b) or type(a) not in (nn.Linear, nn.QuantizedLinear):
        return False

    def kind(layer: nn.Module) -> tuple:
        arrays = {name: (v.dtype, v.shape[1:]) for name, v in _arrays(layer).items()}
        return arrays, [getattr(layer, n, None) for n in ("bits", "group_size", "mode")]

    return kind(a) == kind(b)


def _joined(group: list[nn.Module]) -> nn.Module:
    """Return the first layer of a group, with the rows of all of them."""
    first = group[0]
    if len(group) == 1:
        return first
    # A quantised product of 64 columns more than a multiple of 128 takes MLX many times as long.
    spare = -sum(map(_rows, group)) % _ROWS if isinstance(first, nn.QuantizedLinear) else 0
    for name, value in _arrays(first).items():
        pieces = [layer[name] for layer in group]
        if spare:
            pieces.append(mx.zeros((spare, *value.shape[1:]), value.dtype))
        first[name] = mx.concatenate(pieces)
    return first


class JoinedProjections(nn.Module):
    """A module of mlx-lm whose projections are slices of joined layers: a mixin before its class.

    Attributes:
        joined: the joined layers.
    """

    joined: list[nn.Module]
    _slices: list[OutputSlice]

    def join_projections(self) -> None:
        """Join the projections of this module; called once, when it has taken its place."""
        raise NotImplementedError

    def join(self, names: Sequence[str]) -> None:
        """Join the layers of these names, in this order."""
        layers = [self.pop(name) for name in names]
        self.joined, self._slices = join_layers(layers)

    def project(self, x: mx.array) -> list[mx.array]:
        """Return the products of x, (..., in), with the joined layers."""
        return [layer(x) for layer in self.joined]

    def call_mlx_lm(self, products: list[mx.array], *args: Any) -> mx.array:
        """Return what mlx-lm's forward makes of its arguments and of these products.

        Args:
            products: what `project` returned for the forward's input.
            args: the arguments of the forward.
        """
        self["_products"] = products
        try:
            return super().__call__(*args)  # type: ignore[misc]  # of the class behind this one
        finally:
            del self["_products"]

    def projection(self, i: int) -> mx.array:
        """Return the output of projection i; only inside of `call_mlx_lm`."""
        return self._slices[i].select_from(self["_products"])
