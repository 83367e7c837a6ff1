"""The resident twin of a streaming model: all experts in memory, loaded by MLX, the same ops.

It uses no reader, no slots and no waves: what those could get wrong shows as a difference. Tests
and `flashmoe doctor` hold streaming models against it.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoint.checkpoint import Checkpoint
from ..ops import backend as ops
from ..streaming.cuda import device_memory
from ..streaming.slot_memory import SlotMemory
from .loading import load_streaming
from .qwen_moe import StreamingMoE


class ResidentSwitch(nn.Module):
    """Stands where StreamingSwitchGLU stands, with every expert at the slot of its own number."""

    settled = False

    def mailbox(self, words):
        return None

    def __init__(self, bank: SlotMemory):
        super().__init__()
        self.bank = bank

    def _work(self, x: mx.array, indices: mx.array):
        top_k = indices.shape[-1]
        flat = x.reshape(-1, x.shape[-1])
        mx.eval(flat, indices)
        chosen = np.array(indices).reshape(-1)
        work = ops.pick().Work(self.bank, flat, top_k)
        work.run({int(e): np.flatnonzero(chosen == e) for e in np.unique(chosen)})
        return work

    def start(self, inputs):
        works = [self._work(x, indices) for x, indices in inputs]

        class Done:
            @staticmethod
            def finish(scores, extras=None):
                for work, s, extra in zip(works, scores, extras or [{}] * len(works), strict=True):
                    flat = s.reshape(-1, s.shape[-1])
                    yield work.combined(flat, **extra).reshape(*s.shape[:-1], -1)

        return Done


def load_resident(path: str | Path, activations: str = "float32") -> StreamingMoE:
    """A checkpoint with all of its experts in memory, which MLX read.

    Raises:
        CheckpointError, BudgetError, SettingError: as `flashmoe.load`.
    """
    checkpoint = Checkpoint.open(path)
    weights = {}
    for file in checkpoint.files:
        weights |= mx.load(str(file))
    model = load_streaming(checkpoint, slots=checkpoint.num_experts, activations=activations)
    device = device_memory()
    for index, layer in checkpoint.expert_layers.items():
        bank = SlotMemory(
            layer,
            layer.num_experts,
            on_gpu=ops.on_gpu(),
            device=device,
            activations=activations,
        )
        for expert in range(layer.num_experts):
            for part, request in zip(layer.parts, bank.requests(expert, expert), strict=True):
                stack = weights[f"{layer.prefix}.{part.projection}.{part.part}"]
                request.buffer[:] = np.array(mx.contiguous(stack[expert]).view(mx.uint8)).ravel()
        model.layers[index].mlp.switch_mlp = ResidentSwitch(bank)
    return model


def logits(model, tokens: list[int], chunk: int, decode: int = 4) -> list[np.ndarray]:
    """Logits of a prompt in chunks, then of `decode` greedy tokens: (tokens of a chunk, vocabulary)
    float32 each."""
    cache = make_prompt_cache(model)
    found = []

    def step(piece):
        out = model(mx.array([piece]), cache=cache).astype(mx.float32)
        mx.eval(out, [c.state for c in cache])
        found.append(np.array(out[0]))

    for start in range(0, len(tokens), chunk):
        step(tokens[start : start + chunk])
    for _ in range(decode):
        step([int(found[-1][-1].argmax())])
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Equal bit for bit."""
    return len(a) == len(b) and all(
        x.shape == y.shape and (x.view(np.uint32) == y.view(np.uint32)).all()
        for x, y in zip(a, b, strict=True)
    )
