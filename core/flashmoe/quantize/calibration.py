"""Measures how large the inputs of each expert's columns are, on a text.

The source model reads the text through flashmoe's own streaming, layer by layer. Two things are
summed: the squares of what enters the experts of a layer (gate and up have the same input), and the
squares of what enters each expert's down projection. A column whose inputs are large costs more
when its weights are rounded; `rounding` weighs errors by these means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..files import replacing

if TYPE_CHECKING:
    from ..models.qwen_moe import StreamingMoE
    from ..streaming.compute import Backend

#: Tokens that are read of a text, unless more are asked for.
TOKENS = 4096

#: An expert's own mean counts as much as its layer's when so many tokens came to it.
TRUST = 32

#: Part of the mean that each column counts at least: the text did not say all.
FLOOR = 0.01


@dataclass
class LayerSums:
    """hidden (hidden,): over all tokens; down (experts, intermediate): over each expert's own."""

    hidden: np.ndarray
    tokens: int
    down: np.ndarray
    counts: np.ndarray

    @classmethod
    def zeros(cls, experts: int, hidden: int, intermediate: int) -> LayerSums:
        down = np.zeros((experts, intermediate), np.float32)
        return cls(np.zeros(hidden, np.float32), 0, down, np.zeros(experts, np.int64))

    def importance(self, role: str, expert: int) -> np.ndarray:
        """Of each column, 1 on the average."""
        if role == "gate_up":
            return _normed(self.hidden / max(self.tokens, 1))
        layer = self.down.sum(axis=0) / max(self.counts.sum(), 1)
        return _normed((self.down[expert] + TRUST * layer) / (self.counts[expert] + TRUST))


def _normed(mean: np.ndarray) -> np.ndarray:
    average = float(mean.mean())
    if not average > 0:
        return np.ones_like(mean, np.float32)
    return (mean / average + FLOOR).astype(np.float32) / np.float32(1 + FLOOR)


class Importance:
    """What a calibration found, by layer; on disk as one file."""

    def __init__(self, layers: dict[int, LayerSums]):
        self.layers = layers

    def __call__(self, layer: int, role: str, expert: int) -> np.ndarray:
        return self.layers[layer].importance(role, expert)

    def save(self, file: Path) -> None:
        arrays = {}
        for layer, sums in self.layers.items():
            found = (sums.hidden, np.array(sums.tokens), sums.down, sums.counts)
            arrays |= {f"{layer}.{i}": value for i, value in enumerate(found)}
        with replacing(file) as partial, open(partial, "wb") as f:
            np.savez(f, **arrays)

    @classmethod
    def load(cls, file: Path) -> Importance:
        with np.load(file, allow_pickle=False) as found:
            layers = {int(name.partition(".")[0]) for name in found}
            sums = {n: [found[f"{n}.{i}"] for i in range(4)] for n in sorted(layers)}
        return cls({n: LayerSums(h, int(t), d, c) for n, (h, t, d, c) in sums.items()})


def describe(text: Path, tokens: int) -> dict:
    """What makes a calibration the same as another."""
    try:
        data = text.read_bytes()
        data.decode("utf-8")
    except OSError as e:
        raise SettingError(f"cannot read {text}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise SettingError(f"{text} is no UTF-8 text: give one for --calibrate") from e
    return {"sha256": hashlib.sha256(data).hexdigest(), "tokens": tokens}


def calibrate(
    checkpoint: Checkpoint,
    text: Path,
    *,
    tokens: int = TOKENS,
    memory: str | int | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> Importance:
    """Run the model over the first tokens of a text.

    Args:
        memory: see `flashmoe.models.loading.plan_memory`.
        advance: told of each layer that was entered.

    Raises:
        SettingError: the text is empty. And what `flashmoe.models.loading.load` raises.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from ..checkpoint.tokenizer import read_tokenizer
    from ..models.layerwise import prefill, split
    from ..models.loading import load_streaming

    tokenizer = read_tokenizer(checkpoint)
    limit = min(tokens, checkpoint.max_context)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:limit]
    if not ids:
        raise SettingError(f"{text} holds no text: give one for --calibrate")
    if (highest := max(ids)) >= checkpoint.text_config["vocab_size"]:
        raise SettingError(f"the tokenizer of {checkpoint.path} gives {highest}: it is another's")
    observer = _SumObserver(checkpoint)
    model = load_streaming(checkpoint, memory=memory, backend=_observed_backend(observer))
    observer.model = model
    try:
        model.hooks.layer_entered = lambda layer: advance(1)
        # One pass: each expert is read once for all of the text.
        with mx.stream(mx.default_device()):
            for _ in prefill(model, split(ids, []), make_prompt_cache(model), limit=len(ids)):
                pass
    finally:
        model.close()
    for layer in observer.layers.values():
        if not (np.isfinite(layer.hidden).all() and np.isfinite(layer.down).all()):
            raise SettingError(f"{checkpoint.path} gives no finite numbers for {text}")
    return Importance(observer.layers)


class _SumObserver:
    """Adds what enters the experts of a model to sums, one for each MoE layer."""

    def __init__(self, checkpoint: Checkpoint):
        config = checkpoint.text_config
        sizes = (config["num_experts"], config["hidden_size"], config["moe_intermediate_size"])
        self.layers = {index: LayerSums.zeros(*sizes) for index in checkpoint.expert_layers}
        self.model: StreamingMoE | None = None

    def hidden(self, layer: int, x: np.ndarray) -> None:
        sums = self.layers[layer]
        sums.hidden += np.square(x).sum(axis=0)
        sums.tokens += len(x)

    def intermediate(self, layer: int, slot: int, h: np.ndarray) -> None:
        assert self.model is not None, "set when the model is loaded"
        switch = self.model.blocks[layer].switch_mlp
        expert = switch.expert_in(slot)
        sums = self.layers[layer]
        sums.down[expert] += np.square(h).sum(axis=0)
        sums.counts[expert] += len(h)


def _observed_backend(observer: _SumObserver) -> Backend:
    """Return a backend that computes experts one by one, so that the observer sees `down`."""
    from ..ops.backend import pick

    if pick().name == "cpu":
        from ..ops.cpu.experts import CpuBackend

        return CpuBackend(observer)
    from ..ops.reference.experts import ReferenceBackend

    return ReferenceBackend(observer)
