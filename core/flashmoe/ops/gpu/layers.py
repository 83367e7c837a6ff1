"""The layers around the experts on a GPU: a step of one token in few launches.

MLX spends about as long on the launch of an operation as the operation takes for one token, so
what counts is their number. Instances become these classes in place (`module.__class__ = ...`).
Everything else than one token without padding goes through mlx-lm's own forward.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next

from flashmoe_metal import add_norm, kernel, matvec
from flashmoe_metal.matrix import Matrix

from .attention import Attention, NextAttention
from .compiled_step import Steps, steps_of
from .joined import matrix_of
from .linear_attention import GatedDeltaNet, NextGatedDeltaNet


class QuantizedLinear(nn.QuantizedLinear):
    """One row by our kernel. On Metal MLX's own is left, which nobody has measured against it."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size != x.shape[-1] or self._matrix is None or not kernel.available():
            return super().__call__(x)
        return matvec.matvec(x, self._matrix)

    @cached_property
    def _matrix(self) -> Matrix | None:
        return matrix_of(self)


class _DecoderLayer:
    """mlx-lm's, with its sum and norm in one launch, and the last sum left to the experts.

    The block may have `with_residual(x, h)`: h + block(x).
    """

    def prepare(self) -> None:
        pass

    def __call__(self, x: mx.array, mask=None, cache=None) -> mx.array:
        if self._steps is not None and mask is None and self._steps.take(x, cache):
            return self._steps(x, cache)
        h, normed = self.sum_and_norm(x, self.attention(self.input_layernorm(x), mask, cache))
        block = self.mlp
        if hasattr(type(block), "with_residual"):
            return block.with_residual(normed, h)
        return h + block(normed)

    @property
    def attention(self) -> nn.Module:
        return self.linear_attn if getattr(self, "is_linear", False) else self.self_attn

    def sum_and_norm(self, x: mx.array, r: mx.array) -> tuple[mx.array, mx.array]:
        """x + r, and what its norm is."""
        norm = self.post_attention_layernorm
        if kernel.available() and not self.training and add_norm.supports(x, r, norm.weight):
            return tuple(add_norm.add_norm(x, r, norm.weight, self._eps))
        return x + r, norm(x + r)

    @cached_property
    def _steps(self) -> Steps | None:
        return steps_of(self)

    @cached_property
    def _eps(self) -> mx.array:
        return mx.array([self.post_attention_layernorm.eps])


class DecoderLayer(_DecoderLayer, qwen3_5.DecoderLayer):
    pass


class NextDecoderLayer(_DecoderLayer, qwen3_next.Qwen3NextDecoderLayer):
    pass


class MoeDecoderLayer(_DecoderLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    pass


_CLASSES = {
    qwen3_5.GatedDeltaNet: GatedDeltaNet,
    qwen3_5.DecoderLayer: DecoderLayer,
    qwen3_next.Qwen3NextGatedDeltaNet: NextGatedDeltaNet,
    qwen3_next.Qwen3NextAttention: NextAttention,
    qwen3_next.Qwen3NextDecoderLayer: NextDecoderLayer,
    qwen3_moe.Attention: Attention,
    qwen3_moe.Qwen3MoeDecoderLayer: MoeDecoderLayer,
}


def prepare(model: nn.Module) -> None:
    """Let the layers of a loaded model compute in this way, evaluated or not."""
    for module in model.modules():
        ours = _CLASSES.get(type(module))
        if ours is not None:
            module.__class__ = ours
            module.prepare()
    if not mx.metal.is_available():
        for module in model.modules():
            if type(module) is nn.QuantizedLinear:
                module.__class__ = QuantizedLinear
