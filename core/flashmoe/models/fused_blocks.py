"""Compute MoE blocks for few tokens on a GPU in four launches, with the residual sum.

The blocks of `flashmoe.models.qwen_moe` are replaced by these subclasses of theirs. Many tokens are
computed as in those blocks, also beside inputs of few tokens.
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

from ..ops.gpu.block import KernelBlock
from ..ops.gpu.fused import MAX_TOKENS, SharedExpert
from ..ops.gpu.joined import JoinedProjections, matrix_of
from ..ops.recast import recast
from ..streaming.block import StartedCall
from ..streaming.device_copy import Mailbox
from .qwen_moe import RoutedBlock, SharedExpertBlock, route


class _FusedBlock(JoinedProjections, KernelBlock):
    """A block whose parts are the router's logits and those of the shared expert's gate."""

    num_experts: int
    norm_topk_prob: bool
    many_dtype: mx.Dtype | None

    def join_projections(self) -> None:
        self.join(("gate",))

    def gate(self, x: mx.array) -> mx.array:
        """Return the router's logits, as mlx-lm's forward asks for them."""
        return self._slices[0].select_from(self.project(x))

    def run(
        self, xs: Sequence[mx.array], residuals: Sequence[mx.array | None]
    ) -> Iterator[mx.array]:
        few = [self._is_few(x) for x in xs]
        if all(few):
            return self._few(xs, residuals)
        own = all(f or self._is_many(x) for x, f in zip(xs, few, strict=True))
        if own and self.switch_mlp.fully_resident:
            return self._resident(xs, residuals, few)
        return self._mixed(xs, residuals, few)

    def _is_few(self, x: mx.array) -> bool:
        return x.size <= MAX_TOKENS * x.shape[-1] and self._matrices is not None

    def _is_many(self, x: mx.array) -> bool:
        """Return whether kernels take any number of tokens like these."""
        return self.many_dtype is not None and x.dtype == self.many_dtype

    def _resident(self, xs, residuals, few: Sequence[bool]) -> Iterator[mx.array]:
        """Compute each input when it is asked for, without a look of the host at the routers."""
        pairs = sum(x.size // x.shape[-1] for x in xs) * self.top_k
        self.switch_mlp.enter_resident(min(pairs, self.num_experts))
        for x, residual, f in zip(xs, residuals, few, strict=True):
            rows = _rows(x)
            if f:
                y = self.resident_sum(rows, self.choose_experts(rows), residual)
            else:
                indices, scores, *products = self._choose_for_many(rows)
                work = self.switch_mlp.start_resident(rows, indices)
                y = self._add(
                    work.combined(scores), rows, self._shared_part(rows, products), residual
                )
            yield y.reshape(x.shape)

    def _choose_for_many(self, x: mx.array) -> list[mx.array]:
        """Do what `choose_experts` does, for more tokens than the mailbox has room for."""
        products = self.project(x)
        choice = router(
            products[0],
            self.top_k,
            experts=self.num_experts,
            normalise=bool(self.norm_topk_prob),
        )
        return [*choice, *products]

    def _add(self, y: mx.array, x: mx.array, shared, residual) -> mx.array:
        """Return the sum of what `_mixed` has for many tokens."""
        y = y.astype(x.dtype) if shared is None else y + shared
        return y if residual is None else _rows(residual) + y

    def _few(self, xs, residuals) -> Iterator[mx.array]:
        rows = [_rows(x) for x in xs]
        routed = [self.choose_experts(x) for x in rows]
        results = self.routed_sums(rows, routed, residuals)
        return (y.reshape(x.shape) for x, y in zip(xs, results, strict=True))

    def _mixed(self, xs, residuals, few: Sequence[bool]) -> Iterator[mx.array]:
        """Compute each input in the way that it has alone: the two ways round differently."""
        rows = [_rows(x) for x in xs]
        routed = [self._choose(x, f) for x, f in zip(rows, few, strict=True)]
        call = self.switch_mlp.start([(x, r[0]) for x, r in zip(rows, routed, strict=True)])
        extras, shared = [], []
        for x, r, residual, f in zip(rows, routed, residuals, few, strict=True):
            extras.append(self._extra(r[2:], residual) if f else {})
            shared.append(None if f else self._shared_part(x, r[2:]))
        # Let it run while the reads are in flight.
        mx.async_eval([s for s in shared if s is not None])
        return self._mixed_sums(call, xs, routed, extras, shared, residuals, few)

    def _mixed_sums(
        self, call: StartedCall, xs, routed, extras, shared, residuals, few
    ) -> Iterator[mx.array]:
        results = call.finish([r[1] for r in routed], extras)
        for x, y, s, residual, f in zip(xs, results, shared, residuals, few, strict=True):
            if not f:
                y = self._add(y, x, s, residual)
            yield y.reshape(x.shape)

    def _choose(self, x: mx.array, few: bool) -> list[mx.array]:
        """Route an input, (tokens, hidden), in the way that it has alone."""
        if few:
            return self.choose_experts(x)
        return self._choose_for_many(x) if self._is_many(x) else [*route(self, x)]

    def _shared_part(self, x: mx.array, products: Sequence[mx.array]) -> mx.array | None:
        """Return what the shared expert adds to many tokens, None without a shared expert.

        Args:
            products: those of the router and the gate, if they are computed already.
        """
        raise NotImplementedError

    @property
    def _matrices(self) -> Sequence[Matrix] | None:
        """The shared expert's gate, up and down; None when the kernels cannot read one of them."""
        raise NotImplementedError

    @property
    def fits_kernels(self) -> bool:
        return self._matrices is not None

    def choose_experts(self, x: mx.array) -> list[mx.array]:
        products = self.project(x)
        logits = products[0]
        choice = router(
            logits,
            self.top_k,
            experts=self.num_experts,
            normalise=bool(self.norm_topk_prob),
            mailbox=None if self._mailbox is None else self._mailbox.address,
        )
        return [*choice, *products]

    @cached_property
    def _mailbox(self) -> Mailbox | None:
        return self.switch_mlp.mailbox(MAX_TOKENS * self.num_experts)

    def _look(self, indices: mx.array) -> np.ndarray:
        """Copy the router's choice from the mailbox."""
        assert self._mailbox is not None, "this GPU shares its memory with the host"
        return self._mailbox.words[: indices.size].copy()

    def resident_sum(
        self, x: mx.array, routed: list[mx.array], residual: mx.array | None
    ) -> mx.array:
        indices, scores, *products = routed
        work = self.switch_mlp.start_resident(x, indices)
        return work.combined_with(scores, **self._extra(products, residual))

    def routed_sums(
        self,
        xs: Sequence[mx.array],
        routed: Sequence[list[mx.array]],
        residuals: Sequence[mx.array | None],
    ) -> Iterator[mx.array]:
        switch = self.switch_mlp
        if len(xs) == len(xs[0]) == 1 and switch.fully_resident:
            switch.enter_resident(self.top_k)
            return iter([self.resident_sum(xs[0], routed[0], residuals[0])])
        # The mailbox holds one routing result, that of the last router: so it cannot serve
        # several inputs.
        by_mailbox = self._mailbox is not None and len(xs) == 1
        call = switch.start(
            [(x, r[0]) for x, r in zip(xs, routed, strict=True)],
            look=self._look if by_mailbox else np.array,
        )
        extras = [self._extra(r[2:], s) for r, s in zip(routed, residuals, strict=True)]
        return _finish_late(call, [r[1] for r in routed], extras)

    def _extra(self, products: Sequence[mx.array], residual: mx.array | None) -> dict[str, Any]:
        """Return what the sum takes besides the routed experts."""
        return {} if residual is None else {"residual": residual}


class FusedSharedBlock(_FusedBlock, SharedExpertBlock):  # type: ignore[misc]
    """The block of qwen3_next and qwen3_5_moe."""

    def join_projections(self) -> None:
        self.join(("gate", "shared_expert_gate"))

    def shared_expert_gate(self, x: mx.array) -> mx.array:  # type: ignore[override]
        """Return the logit of the shared expert's gate, as mlx-lm's forward asks for it."""
        return self._slices[1].select_from(self.project(x))

    def _shared_part(self, x: mx.array, products: Sequence[mx.array]) -> mx.array:
        gate = self._slices[1].select_from(products or self.project(x))
        return mx.sigmoid(gate) * self.shared_expert(x)

    def _extra(self, products, residual) -> dict[str, Any]:
        part = self._slices[1]
        assert self._matrices is not None, "the kernels cannot read the shared expert"
        gate, up, down = self._matrices
        shared = SharedExpert(gate, up, down, products[part.product], part.start)
        return {"shared": shared} | super()._extra(products, residual)

    @cached_property
    def _matrices(self) -> list[Matrix] | None:
        expert = self.shared_expert
        return _matrices([expert.gate_proj, expert.up_proj, expert.down_proj])


class FusedRoutedBlock(_FusedBlock, RoutedBlock):  # type: ignore[misc]
    """The block of qwen3_moe."""

    _matrices = ()

    def _shared_part(self, x: mx.array, products: Sequence[mx.array]) -> None:
        """Return None: there is no shared expert."""


def _finish_late(call: StartedCall, scores, extras) -> Iterator[mx.array]:
    """Finish a call when its first result is asked for."""
    yield from call.finish(scores, extras)


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _matrices(layers: Sequence[nn.Module]) -> list[Matrix] | None:
    """Return the weights of layers, None when the kernels cannot read one of them."""
    matrices = [matrix_of(layer) for layer in layers]
    readable = [matrix for matrix in matrices if matrix is not None]
    return readable if len(readable) == len(matrices) else None


_CLASSES: dict[type[nn.Module], type[_FusedBlock]] = {
    SharedExpertBlock: FusedSharedBlock,
    RoutedBlock: FusedRoutedBlock,
}


def recast_blocks(model: nn.Module) -> None:
    """Replace the MoE blocks of a loaded model, evaluated or not, where the kernels can read them.

    To be called before the dense layers are replaced, because only plain layers are joined.
    """

    def choose(path: str, module: nn.Module) -> type[nn.Module] | None:
        ours = _CLASSES.get(type(module))
        return ours if ours is not None and module.switch_mlp.has_kernels else None

    for block in recast(model, choose):
        block.many_dtype = block.switch_mlp.many_dtype
        block.join_projections()
