"""Compute the layers around the experts on a GPU: a step of one token in few launches.

MLX spends about as long on the launch of an operation as the operation takes for one token, so
the number of launches is what counts. The modules of a loaded model are replaced by these
subclasses of theirs. Everything but one token without padding goes through mlx-lm's own forward.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next

from flashmoe_metal import add_norm, kernel, matvec
from flashmoe_metal.matrix import Matrix

from ...streaming.block import ExpertBlock
from ..recast import recast
from .attention import Attention, NextAttention
from .compiled_step import Steps, steps_of
from .joined import Joined, matrix_of
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


class StepLayer(nn.Module):
    """mlx-lm's decoder layer, with its sum and norm in one launch.

    The last sum is left to the MoE block where the block has a launch for it.
    """

    def __call__(self, x: mx.array, mask=None, cache=None) -> mx.array:
        if self._steps is not None and mask is None and self._steps.can_run(x, cache):
            return self._steps(x, cache)
        h, normed = self.sum_and_norm(x, self.attention(self.input_layernorm(x), mask, cache))
        block = self.mlp
        if isinstance(block, ExpertBlock) and block.fuses_residual:
            return next(block.run([normed], [h]))
        return h + block(normed)

    @property
    def attention(self) -> nn.Module:
        return self.linear_attn if getattr(self, "is_linear", False) else self.self_attn

    def sum_and_norm(self, x: mx.array, r: mx.array) -> tuple[mx.array, mx.array]:
        """Return x + r, and its norm."""
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


class DecoderLayer(StepLayer, qwen3_5.DecoderLayer):
    pass


class NextDecoderLayer(StepLayer, qwen3_next.Qwen3NextDecoderLayer):
    pass


class MoeDecoderLayer(StepLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    pass


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    qwen3_5.GatedDeltaNet: GatedDeltaNet,
    qwen3_5.DecoderLayer: DecoderLayer,
    qwen3_next.Qwen3NextGatedDeltaNet: NextGatedDeltaNet,
    qwen3_next.Qwen3NextAttention: NextAttention,
    qwen3_next.Qwen3NextDecoderLayer: NextDecoderLayer,
    qwen3_moe.Attention: Attention,
    qwen3_moe.Qwen3MoeDecoderLayer: MoeDecoderLayer,
}


def recast_layers(model: nn.Module) -> None:
    """Replace the layers of a loaded model, evaluated or not, by those of this package."""
    for module in recast(model, lambda path, module: _CLASSES.get(type(module))):
        if isinstance(module, Joined):
            module.join_projections()
    if not mx.metal.is_available():
        # Last, because only plain layers are joined.
        recast(
            model,
            lambda path, module: QuantizedLinear if type(module) is nn.QuantizedLinear else None,
        )
