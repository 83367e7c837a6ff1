"""Take one token through a decoder layer on a GPU, in pieces that MLX compiles.

To build the launches of a layer takes Python as long as the GPU takes to run them. A compiled piece
is built once. What cannot be part of one stands between pieces: the growing cache of attention,
and the host's look at the router's choice, while experts have to be read. When all experts of a
layer are in slots for good, the host does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe_metal.kernel import available, compiled

from ...streaming.block import ExpertBlock
from .attention import position_array
from .block import KernelBlock


def compile_step(layer: nn.Module) -> CompiledStep | None:
    """Return the step of a decoder layer of `flashmoe.ops.gpu.layers`.

    None where the layer's experts do not go through flashmoe's kernels.
    """
    block = layer.mlp
    routed = isinstance(block, KernelBlock)
    if isinstance(block, ExpertBlock) and not (routed and block.fits_kernels):
        return None
    # Arrays that stay lazy would be computed again in each call of a compiled piece.
    mx.eval(layer.parameters())
    kind = _LinearAttentionStep if getattr(layer, "is_linear", False) else _AttentionStep
    return kind(layer, routed)


class CompiledStep:
    """One token's way through one decoder layer, in compiled pieces.

    The piece `_until_experts` ends with the router's choice, at which the host looks. The piece
    `_whole_layer` takes its place where no expert has to be read.

    Args:
        layer: one of `flashmoe.ops.gpu.layers`.
        routed: whether its block has experts.
    """

    def __init__(self, layer: nn.Module, routed: bool):
        self._layer = layer
        self._block = layer.mlp
        self._routed = routed
        # By the router's K too, which is fixed in a compiled piece.
        self._pieces: dict[tuple[str, int], Callable[..., list[mx.array]]] = {}

    def can_run(self, x: mx.array, cache: Any) -> bool:
        """Return whether a call is one token without padding, and the kernels take it.

        x: (sequences, tokens, hidden).
        """
        return (
            x.shape[0] == x.shape[1] == 1
            and available()
            and not self._layer.training
            and self._layer.attention.can_use_kernel(x, x.dtype, cache)
        )

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Return what the layer makes of one token, (1, 1, hidden) -> (1, 1, hidden)."""
        block, inputs = self._block, self._piece_inputs(x, cache)
        if not self._routed:
            return self._store_states(self._piece("whole_layer")(*inputs), cache)[0]
        if block.switch_mlp.fully_resident:
            block.switch_mlp.enter_resident(block.top_k)
            return self._store_states(self._piece("whole_layer")(*inputs), cache)[0]
        h, normed, *routed = self._store_states(self._piece("until_experts")(*inputs), cache)
        (y,) = block.routed_sums([normed], [routed], [h])
        return y.reshape(x.shape)

    def _piece(self, name: str) -> Callable[..., list[mx.array]]:
        key = name, getattr(self._block, "top_k", 0)
        if key not in self._pieces:
            self._pieces[key] = compiled(partial(getattr(self, f"_{name}"), self._block))
        return self._pieces[key]

    def _until_experts(self, block: KernelBlock, *inputs: mx.array) -> list[mx.array]:
        """Compute the layer until the host looks at the router's choice.

        Returns:
            The sum to which the experts' result is added and its norm, (1, hidden) each; what
            `choose_experts` returns; new states for `_store_states`.
        """
        h, normed, states = self._attend(*inputs)
        h, normed = h.squeeze(0), normed.squeeze(0)
        return [h, normed, *block.choose_experts(normed), *states]

    def _whole_layer(self, block: Any, *inputs: mx.array) -> list[mx.array]:
        """Return the result of the layer, (1, 1, hidden), then new states for `_store_states`."""
        h, normed, states = self._attend(*inputs)
        if not self._routed:
            return [h + block(normed), *states]
        # No axis comes or goes on the way: on CUDA a reshape costs the host much of a launch.
        return [block.resident_sum(normed, block.choose_experts(normed), h), *states]

    def _piece_inputs(self, x: mx.array, cache: Any) -> list[mx.array]:
        """Return the arrays that the pieces take: x, then what `_attend` needs of the cache."""
        raise NotImplementedError

    def _attend(self, *inputs: mx.array) -> tuple[mx.array, mx.array, Sequence[mx.array]]:
        """Return x + attention and its norm, (1, 1, hidden) each, and new states of the cache."""
        raise NotImplementedError

    def _store_states(self, outputs: list[mx.array], cache: Any) -> list[mx.array]:
        """Put the new states, the last outputs of a piece, into the cache; return the others."""
        raise NotImplementedError


class _LinearAttentionStep(CompiledStep):
    """The step of a layer with GatedDeltaNet, whose states go through the pieces."""

    def _piece_inputs(self, x: mx.array, cache: Any) -> list[mx.array]:
        return [x, cache[0], cache[1]]

    def _attend(self, *inputs: mx.array) -> tuple[mx.array, mx.array, Sequence[mx.array]]:
        x, *states = inputs
        layer, cache = self._layer, _StatesInPiece(states)
        attended = layer.linear_attn(layer.input_layernorm(x), None, cache)
        return (*layer.sum_and_norm(x, attended), cache)

    def _store_states(self, outputs: list[mx.array], cache: Any) -> list[mx.array]:
        *outputs, cache[0], cache[1] = outputs
        cache.advance(1)
        return outputs


class _StatesInPiece(list):
    """The two states of a linear layer, in place of mlx-lm's cache inside of a piece."""

    lengths = None

    def advance(self, _: int) -> None:
        """Do nothing: `_store_states` advances the cache itself."""


class _AttentionStep(CompiledStep):
    """The step of a layer with attention, which runs between two pieces: its cache grows."""

    def __init__(self, layer: nn.Module, routed: bool):
        super().__init__(layer, routed)
        self._project = compiled(self._project_heads)

    def _project_heads(self, x: mx.array, position: mx.array) -> list[mx.array]:
        return self._layer.self_attn.project_heads(self._layer.input_layernorm(x), position)

    def _piece_inputs(self, x: mx.array, cache: Any) -> list[mx.array]:
        *qkv, gate = self._project(x, position_array(cache.offset))
        return [x, self._layer.self_attn.attend(*qkv, cache), gate]

    def _attend(self, *inputs: mx.array) -> tuple[mx.array, mx.array, Sequence[mx.array]]:
        x, out, gate = inputs
        attended = self._layer.self_attn.project_output(out, gate)
        return (*self._layer.sum_and_norm(x, attended), [])

    def _store_states(self, outputs: list[mx.array], cache: Any) -> list[mx.array]:
        return outputs
