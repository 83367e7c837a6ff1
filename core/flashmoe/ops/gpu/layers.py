"""Compute the layers around the experts on a GPU: a step of one token in few launches.

MLX spends about as long on the launch of an operation as the operation takes for one token, so
the number of launches is what counts. The modules of a loaded model are replaced by these
subclasses of theirs. Everything but one token without padding goes through mlx-lm's own forward.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next

from flashmoe_metal import kernel
from flashmoe_metal.add_norm import add_norm, supports
from flashmoe_metal.grouped import unpack
from flashmoe_metal.matrix import Matrix
from flashmoe_metal.matvec import matvec

from ...streaming.block import ExpertBlock
from ..recast import recast
from .attention import Attention, NextAttention
from .compiled_step import CompiledStep, compile_step
from .joined import JoinedProjections, matrix_of
from .linear_attention import GatedDeltaNet, NextGatedDeltaNet

#: From so many rows on, weights are unpacked and multiplied by all of them: the product of MLX that
#: unpacks on the way is several times slower.
UNPACKED_ROWS = 64

#: The most weights that are unpacked at a time. The head of a large vocabulary has more, and sees
#: one row of a prompt.
UNPACKED_WEIGHTS = 1 << 28


class QuantizedLinear(nn.QuantizedLinear):
    """A quantised layer that multiplies one row by flashmoe's kernel, and many after unpacking.

    On Metal MLX's own layer is left, which nobody has measured against the kernel.
    """

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows == 1 and self._matrix is not None and kernel.available():
            return matvec(x, self._matrix)
        if rows >= UNPACKED_ROWS and self._can_unpack(x.dtype):
            assert self._matrix is not None, "the kernels can read the weights"
            return x @ unpack(self._matrix).T
        return super().__call__(x)

    def _can_unpack(self, dtype: mx.Dtype) -> bool:
        matrix = self._matrix
        return (
            matrix is not None
            and matrix.scales.dtype == dtype
            and matrix.rows * matrix.columns <= UNPACKED_WEIGHTS
            and dtype in (mx.bfloat16, mx.float16)
            and mx.cuda.is_available()
        )

    @cached_property
    def _matrix(self) -> Matrix | None:
        return matrix_of(self)


class FusedDecoderLayer(nn.Module):
    """A decoder layer with its sum and norm in one launch: a mixin before mlx-lm's class.

    The last sum is left to the MoE block where the block has a launch for it.
    """

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if self._step is not None and mask is None and self._step.can_run(x, cache):
            return self._step(x, cache)
        h, normed = self.sum_and_norm(x, self.attention(self.input_layernorm(x), mask, cache))
        block = self.mlp
        if isinstance(block, ExpertBlock) and block.fuses_residual:
            return next(block.run([normed], [h]))
        return h + block(normed)

    @property
    def attention(self) -> nn.Module:
        """The attention or GatedDeltaNet of the layer."""
        return self.linear_attn if getattr(self, "is_linear", False) else self.self_attn

    def sum_and_norm(self, x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        """Return x + attended, and its norm.

        x, attended: (..., hidden).
        """
        norm = self.post_attention_layernorm
        if kernel.available() and not self.training and supports(x, attended, norm.weight):
            h, normed = add_norm(x, attended, norm.weight, self._eps)
            return h, normed
        return x + attended, norm(x + attended)

    @cached_property
    def _step(self) -> CompiledStep | None:
        return compile_step(self)

    @cached_property
    def _eps(self) -> mx.array:
        return mx.array([self.post_attention_layernorm.eps])


class DecoderLayer(FusedDecoderLayer, qwen3_5.DecoderLayer):
    """The decoder layer of qwen3_5."""


class NextDecoderLayer(FusedDecoderLayer, qwen3_next.Qwen3NextDecoderLayer):
    """The decoder layer of qwen3_next."""


class MoeDecoderLayer(FusedDecoderLayer, qwen3_moe.Qwen3MoeDecoderLayer):
    """The decoder layer of qwen3_moe."""


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
        if isinstance(module, JoinedProjections):
            module.join_projections()
    if not mx.metal.is_available():
        # Last, because only plain layers are joined.
        recast(
            model,
            lambda path, module: QuantizedLinear if type(module) is nn.QuantizedLinear else None,
        )
