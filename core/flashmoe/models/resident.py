"""Load a model with all of its experts in memory, to compare a streaming model with it.

MLX reads the experts, and the same backend computes them. No reader, no eviction and no waves of
reads take part: what those could get wrong shows as a difference. Tests and `flashmoe doctor`
compare streaming models with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoint.checkpoint import Checkpoint
from ..ops import backend as backends
from ..streaming.block import ExpertSwitch, SwitchStats
from ..streaming.compute import Backend, ExpertWork
from ..streaming.cuda import device_memory
from ..streaming.slot_memory import SlotMemory
from ..streaming.switch_glu import StreamingSwitchGLU
from .loading import load_streaming
from .streaming_moe import StreamingMoE


class ResidentSwitch(ExpertSwitch, nn.Module):
    """Takes the place of a StreamingSwitchGLU, with each expert in the slot of its own number."""

    def __init__(self, memory: SlotMemory, backend: Backend):
        super().__init__()
        self.memory = memory
        self.backend = backend

    @property
    def stats(self) -> SwitchStats:
        return SwitchStats()

    def start(
        self,
        inputs: Sequence[tuple[mx.array, mx.array]],
        look: Callable[[mx.array], np.ndarray] = np.array,
    ) -> ResidentCall:
        shapes = [(*indices.shape, x.shape[-1]) for x, indices in inputs]
        return ResidentCall([self._work(x, indices) for x, indices in inputs], shapes)

    def _work(self, x: mx.array, indices: mx.array) -> ExpertWork:
        flat = x.reshape(-1, x.shape[-1])
        mx.eval(flat, indices)
        chosen = np.array(indices).reshape(-1)
        work = self.backend.start(self.memory, flat, indices.shape[-1])
        work.run({int(e): np.flatnonzero(chosen == e) for e in np.unique(chosen)})
        return work


class ResidentCall:
    """One call of a ResidentSwitch."""

    def __init__(self, works: Sequence[ExpertWork], shapes: Sequence[tuple[int, ...]]):
        self._works = works
        self._shapes = shapes

    def finish(
        self,
        scores: Sequence[mx.array] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[mx.array]:
        """Yield what an `ExpertCall` does."""
        if scores is None:
            for work, shape in zip(self._works, self._shapes, strict=True):
                yield work.result().reshape(shape)
            return
        extras = extras or [{}] * len(scores)
        for work, s, extra in zip(self._works, scores, extras, strict=True):
            flat = s.reshape(-1, s.shape[-1])
            yield work.combined_with(flat, **extra).reshape(*s.shape[:-1], -1)


def load_resident(path: str | Path, activations: str = "float32") -> StreamingMoE:
    """Load a checkpoint with all of its experts in memory, read by MLX.

    Raises:
        CheckpointError, BudgetError, SettingError: as `flashmoe.load`.
    """
    checkpoint = Checkpoint.open(path)
    weights: dict[str, mx.array] = {}
    for file in checkpoint.files:
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]  # a file of safetensors
    model = load_streaming(checkpoint, slots=checkpoint.num_experts, activations=activations)
    device = device_memory()
    for index, layer in checkpoint.expert_layers.items():
        switch = model.switches[index]
        assert isinstance(switch, StreamingSwitchGLU), "the model was just loaded"
        memory = SlotMemory(
            layer,
            layer.num_experts,
            on_gpu=backends.on_gpu(),
            device=device,
            activations=activations,
            form=switch.form,
        )
        for expert in range(layer.num_experts):
            for part, request in zip(layer.parts, memory.requests(expert, expert), strict=True):
                stack = weights[f"{layer.prefix}.{part.projection}.{part.part}"]
                request.buffer[:] = np.array(mx.contiguous(stack[expert]).view(mx.uint8)).ravel()
        model.set_switch(index, ResidentSwitch(memory, model.backend))
    return model


def logits(model, tokens: list[int], chunk: int, decode: int = 4) -> list[np.ndarray]:
    """Return the logits of a prompt in chunks, then of `decode` greedy tokens.

    Returns:
        (tokens of a chunk, vocabulary) float32 each.
    """
    cache = make_prompt_cache(model)
    steps: list[np.ndarray] = []

    def step(chunk_tokens: list[int]) -> None:
        out = model(mx.array([chunk_tokens]), cache=cache).astype(mx.float32)
        mx.eval(out, [c.state for c in cache])
        steps.append(np.array(out[0]))

    for start in range(0, len(tokens), chunk):
        step(tokens[start : start + chunk])
    for _ in range(decode):
        step([int(steps[-1][-1].argmax())])
    return steps


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Return whether two lists of float32 arrays are equal bit for bit."""
    return len(a) == len(b) and all(
        x.shape == y.shape and bool((x.view(np.uint32) == y.view(np.uint32)).all())
        for x, y in zip(a, b, strict=True)
    )
