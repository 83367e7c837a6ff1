"""MoE blocks for few tokens on a GPU: router, experts, shared expert and residual in four launches.

A block of mlx-lm's becomes one of these in place. Many tokens are computed as in the blocks of
`flashmoe.models.qwen_moe`, also beside pieces of few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flashmoe_metal.matrix import Matrix
from flashmoe_metal.router import router

from ..ops.gpu.fused import MOST_ROWS, SharedExpert
from ..ops.gpu.joined import Joined, matrix_of
from ..streaming.device_copy import Mailbox
from .qwen_moe import RoutedBlock, SharedExpertBlock, route


class _FusedBlock(Joined):
    """Its parts are the router's logits, and those of the shared expert's gate."""

    def prepare(self) -> None:
        self.join(("gate",))

    def gate(self, x: mx.array) -> mx.array:
        return self._parts[0].of(self.products(x))

    def sweep(
        self, xs: Sequence[mx.array], residuals: Sequence[mx.array | None] | None = None
    ) -> Iterator[mx.array]:
        """The block applied to pieces, whose experts are read once for all of them, each with its
        residual added if it has one."""
        return self._sweep(xs, residuals or [None] * len(xs))

    def with_residual(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + block(x)."""
        return next(self._sweep([x], [residual]))

    def _sweep(self, xs, residuals) -> Iterator[mx.array]:
        few = [self._is_few(x) for x in xs]
        return self._few(xs, residuals) if all(few) else self._mixed(xs, residuals, few)

    def _is_few(self, x: mx.array) -> bool:
        return x.size <= MOST_ROWS * x.shape[-1] and self._matrices is not None

    def _few(self, xs, residuals) -> Iterator[mx.array]:
        rows = [_rows(x) for x in xs]
        routed = [self.route(x) for x in rows]
        results = self.routed_sums(rows, routed, residuals)
        return (y.reshape(x.shape) for x, y in zip(xs, results, strict=True))

    def _mixed(self, xs, residuals, few: Sequence[bool]) -> Iterator[mx.array]:
        """Each piece goes the way that it goes alone: the two round differently."""
        rows = [_rows(x) if f else x for x, f in zip(xs, few, strict=True)]
        routed = [self.route(x) if f else route(self, x) for x, f in zip(rows, few, strict=True)]
        call = self.switch_mlp.start([(x, r[0]) for x, r in zip(rows, routed, strict=True)])
        extras, shared = [], []
        for x, r, residual, f in zip(xs, routed, residuals, few, strict=True):
            extras.append(self._extra(r[2:], residual) if f else {})
            shared.append(None if f else self.shared(x))
        # Let it run while the reads are in flight.
        mx.async_eval([s for s in shared if s is not None])
        return self._mixed_sums(call, xs, routed, extras, shared, residuals, few)

    def _mixed_sums(self, call, xs, routed, extras, shared, residuals, few) -> Iterator[mx.array]:
        results = call.finish([r[1] for r in routed], extras)
        for x, y, s, residual, f in zip(xs, results, shared, residuals, few, strict=True):
            if not f:
                y = y.astype(x.dtype) if s is None else y + s
                y = y if residual is None else residual + y
            yield y.reshape(x.shape)

    @property
    def fits_kernels(self) -> bool:
        """Whether one token can go through `route` and one of the two sums."""
        return self._matrices is not None

    def route(self, x: mx.array) -> list[mx.array]:
        """The router's choice for rows x (..., hidden), and the products that it comes from:
        indices and scores (..., top_k), products."""
        products = self.products(x)
        logits = products[0]
        normalise = bool(self.norm_topk_prob)
        choice = router(
            logits,
            self.top_k,
            experts=self.num_experts,
            normalise=normalise,
            mailbox=self._mailbox and self._mailbox.address,
        )
        return [*choice, *products]

    @cached_property
    def _mailbox(self) -> Mailbox | None:
        return self.switch_mlp.mailbox(MOST_ROWS * self.num_experts)

    def _look(self, indices: mx.array) -> np.ndarray:
        return self._mailbox.words[: indices.size].copy()

    def settled_sum(self, x: mx.array, routed: list[mx.array], residual) -> mx.array:
        """The block applied to rows x (..., hidden), when every expert is in the slot of its
        number; lazy."""
        indices, scores, *products = routed
        work = self.switch_mlp.work(x, indices)
        return work.combined(scores, **self._extra(products, residual))

    def routed_sums(self, xs, routed, residuals) -> Iterator[mx.array]:
        """The block applied to each of several inputs of rows, whatever is resident."""
        switch = self.switch_mlp
        if len(xs) == len(xs[0]) == 1 and switch.settled:
            switch.enter(self.top_k)
            return iter([self.settled_sum(xs[0], routed[0], residuals[0])])
        # Of several inputs, the last one's choice would be all that is left there.
        look = {"look": self._look} if self._mailbox and len(xs) == 1 else {}
        call = switch.start([(x, r[0]) for x, r in zip(xs, routed, strict=True)], **look)
        extras = [self._extra(r[2:], s) for r, s in zip(routed, residuals, strict=True)]
        return _when_asked(call, [r[1] for r in routed], extras)

    def _extra(self, products: list[mx.array], residual: mx.array | None) -> dict[str, Any]:
        """What the sum takes besides the routed experts."""
        return {} if residual is None else {"residual": residual}


class FusedSharedBlock(_FusedBlock, SharedExpertBlock):
    def prepare(self) -> None:
        self.join(("gate", "shared_expert_gate"))

    def shared_expert_gate(self, x: mx.array) -> mx.array:
        return self._parts[1].of(self.products(x))

    def _extra(self, products, residual) -> dict[str, Any]:
        part = self._parts[1]
        shared = SharedExpert(*self._matrices, products[part.product], part.start)
        return {"shared": shared} | super()._extra(products, residual)

    @cached_property
    def _matrices(self) -> list[Matrix] | None:
        expert = self.shared_expert
        return _matrices([expert.gate_proj, expert.up_proj, expert.down_proj])


class FusedRoutedBlock(_FusedBlock, RoutedBlock):
    _matrices = ()

    def shared(self, x: mx.array) -> None:
        """There is no shared expert."""


def _when_asked(call, scores, extras) -> Iterator[mx.array]:
    yield from call.finish(scores, extras)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _matrices(layers: Sequence[nn.Module]) -> list[Matrix] | None:
    """The weights of layers, None when our kernels cannot read one."""
    found = [matrix_of(layer) for layer in layers]
    return None if None in found else found


_CLASSES = {SharedExpertBlock: FusedSharedBlock, RoutedBlock: FusedRoutedBlock}


def prepare(model: nn.Module) -> None:
    """Let the blocks of a loaded model compute in this way, evaluated or not."""
    for module in model.modules():
        ours = _CLASSES.get(type(module))
        if ours is not None and module.switch_mlp.fused:
            module.__class__ = ours
            module.prepare()
