"""One token through a decoder layer on a GPU, in pieces that MLX compiles.

To build the launches of a layer takes Python as long as the GPU takes to run them. A compiled piece
is built once. What cannot be part of one stands between pieces: the growing cache of attention,
and the look at the router's choice by the host, while experts have to be read. When all experts of
a layer are in slots for good, the host does not look.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from flashmoe_metal.kernel import available, compiled

from ...streaming.block import ExpertBlock
from .attention import position
from .block import KernelBlock


def steps_of(layer: nn.Module) -> Steps | None:
    """The steps of one of our decoder layers; None: its experts do not go through our kernels."""
    block = layer.mlp
    routed = isinstance(block, KernelBlock)
    if isinstance(block, ExpertBlock) and not (routed and block.fits_kernels):
        return None
    # Lazy arrays would be computed in each call.
    mx.eval(layer.parameters())
    kind = _LinearSteps if getattr(layer, "is_linear", False) else _AttentionSteps
    return kind(layer, routed)


class Steps:
    """The pieces of one layer: `_before` its experts, and `_whole`.

    Args:
        layer: one of `flashmoe.ops.gpu.layers`.
        routed: whether its block has experts.
    """

    def __init__(self, layer: nn.Module, routed: bool):
        self._layer = layer
        self._block = layer.mlp
        self._routed = routed
        # K of the router is part of a piece.
        self._made: dict[tuple[str, int], object] = {}

    def can_run(self, x: mx.array, cache) -> bool:
        """Whether a call is a step."""
        return (
            x.shape[0] == x.shape[1] == 1
            and available()
            and not self._layer.training
            and self._layer.attention.is_step(x, x.dtype, cache)
        )

    def __call__(self, x: mx.array, cache) -> mx.array:
        """x: (1, 1, hidden) -> (1, 1, hidden)."""
        block, inputs = self._block, self._inputs(x, cache)
        if not self._routed:
            return self._keep(self._piece("whole")(*inputs), cache)[0]
        if block.switch_mlp.fully_resident:
            block.switch_mlp.enter_resident(block.top_k)
            return self._keep(self._piece("whole")(*inputs), cache)[0]
        h, normed, *routed = self._keep(self._piece("before")(*inputs), cache)
        (y,) = block.routed_sums([normed], [routed], [h])
        return y.reshape(x.shape)

    def _piece(self, name: str):
        key = name, getattr(self._block, "top_k", 0)
        if key not in self._made:
            self._made[key] = compiled(partial(getattr(self, f"_{name}"), self._block))
        return self._made[key]

    def _before(self, block, *inputs: mx.array) -> list[mx.array]:
        """(1, hidden): the sum that the experts are added to, and its norm; the router's choice;
        then what `_keep` keeps."""
        h, normed, kept = self._attended(*inputs)
        h, normed = h.squeeze(0), normed.squeeze(0)
        return [h, normed, *block.choose_experts(normed), *kept]

    def _whole(self, block, *inputs: mx.array) -> list[mx.array]:
        """What the layer gives, (1, 1, hidden), then what `_keep` keeps."""
        h, normed, kept = self._attended(*inputs)
        if not self._routed:
            return [h + block(normed), *kept]
        # No axis comes or goes on the way: on CUDA a reshape costs the host much of a launch.
        return [block.resident_sum(normed, block.choose_experts(normed), h), *kept]


class _LinearSteps(Steps):
    def _inputs(self, x: mx.array, cache) -> list[mx.array]:
        return [x, cache[0], cache[1]]

    def _attended(self, x: mx.array, *state: mx.array):
        layer, cache = self._layer, _State(state)
        r = layer.linear_attn(layer.input_layernorm(x), None, cache)
        return (*layer.sum_and_norm(x, r), cache)

    def _keep(self, outputs: list[mx.array], cache) -> list[mx.array]:
        *outputs, cache[0], cache[1] = outputs
        cache.advance(1)
        return outputs


class _State(list):
    """Stands for mlx-lm's cache of a linear layer."""

    lengths = None

    def advance(self, _) -> None:
        pass


class _AttentionSteps(Steps):
    def __init__(self, layer: nn.Module, routed: bool):
        super().__init__(layer, routed)
        self._project = compiled(self._projected)

    def _projected(self, x: mx.array, position: mx.array) -> list[mx.array]:
        return self._layer.self_attn.before(self._layer.input_layernorm(x), position)

    def _inputs(self, x: mx.array, cache) -> list[mx.array]:
        *qkv, gate = self._project(x, position(cache.offset))
        return [x, self._layer.self_attn.attend(*qkv, cache), gate]

    def _attended(self, x: mx.array, out: mx.array, gate: mx.array):
        r = self._layer.self_attn.after(out, gate)
        return (*self._layer.sum_and_norm(x, r), [])

    def _keep(self, outputs: list[mx.array], _) -> list[mx.array]:
        return outputs
