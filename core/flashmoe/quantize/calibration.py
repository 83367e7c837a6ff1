"""Measures how large the inputs of each expert's columns are, on a text.

The source model reads the text through flashmoe's own streaming, layer by layer. Two things are
summed: the squares of what enters the experts of a layer (gate and up have the same input), and the
squares of what enters each expert's down projection. A column whose inputs are large costs more
when its weights are rounded; `rounding` weighs errors by these means.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..files import replacing

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
    memory: str | None = None,
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
    from ..ops import backend as ops

    tokenizer = read_tokenizer(checkpoint)
    limit = min(tokens, checkpoint.max_context)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:limit]
    if not ids:
        raise SettingError(f"{text} holds no text: give one for --calibrate")
    if (highest := max(ids)) >= checkpoint.text_config["vocab_size"]:
        raise SettingError(f"the tokenizer of {checkpoint.path} gives {highest}: it is another's")
    with _plain_ops(on_gpu=ops.on_gpu()):
        model = load_streaming(checkpoint, memory=memory)
    try:
        layers = {i: _watch(model, i) for i in checkpoint.expert_layers}
        model.watch.entered = lambda layer: advance(1)
        # One sweep: each expert is read once for all of the text.
        with mx.stream(mx.default_device()):
            for _ in prefill(model, split(ids, []), make_prompt_cache(model), limit=len(ids)):
                pass
    finally:
        model.close()
    for layer in layers.values():
        if not (np.isfinite(layer.hidden).all() and np.isfinite(layer.down).all()):
            raise SettingError(f"{checkpoint.path} gives no finite numbers for {text}")
    return Importance(layers)


class _plain_ops:
    """On a GPU experts are computed by plain MLX while it lasts: what enters `down` is seen."""

    def __init__(self, *, on_gpu: bool):
        self.on_gpu = on_gpu

    def __enter__(self):
        from ..ops import backend as ops

        self.before = os.environ.get(ops.ENV)
        if self.on_gpu:
            os.environ[ops.ENV] = "reference"

    def __exit__(self, *exc):
        from ..ops import backend as ops

        os.environ.pop(ops.ENV, None)
        if self.before is not None:
            os.environ[ops.ENV] = self.before


class _WatchedOps:
    """Stands where a switch has its ops module."""

    def __init__(self, work: type, as_they_land: bool):
        self.Work = work
        self.computes_as_loaded = as_they_land


def _watch(model, index: int) -> LayerSums:
    """Let the expert block of a layer add to sums."""
    switch, config = model.layers[index].mlp.switch_mlp, model.checkpoint.text_config
    sizes = (config["num_experts"], config["hidden_size"], config["moe_intermediate_size"])
    sums = LayerSums.zeros(*sizes)

    def entering(x: np.ndarray) -> None:
        sums.hidden += np.square(x).sum(axis=0)
        sums.tokens += len(x)

    def down(slot: int, h: np.ndarray) -> None:
        expert = next(e for e, s in switch._slots.residents.items() if s == slot)
        sums.down[expert] += np.square(h).sum(axis=0)
        sums.counts[expert] += len(h)

    ops = switch._ops
    make = _cpu_work if ops.NAME == "cpu" else _mlx_work
    switch._ops = _WatchedOps(make(entering, down), ops.computes_as_loaded)
    return sums


def _cpu_work(entering: Callable, down: Callable) -> type:
    from ..ops.cpu import experts as cpu
    from ..ops.cpu import gemm

    class Work(cpu.Work):
        def __init__(self, *args):
            super().__init__(*args)
            entering(self.x)

        def run(self, experts):
            gate, up, last = self.matrices
            for slot, pairs in experts.items():
                x = self.x[pairs // self.top_k]
                h = np.empty((len(x), gate.shape[1]), np.float32)
                y = np.empty_like(x)
                gemm.product(gate, slot, x, h, up)
                gemm.product(last, slot, h, y)
                down(slot, h)
                self.y[pairs] = y

    return Work


def _mlx_work(entering: Callable, down: Callable) -> type:
    import mlx.core as mx
    from mlx_lm.models.activations import swiglu

    from ..ops.reference import experts as reference

    def host(x) -> np.ndarray:
        return np.array(x.astype(mx.float32))

    class Work(reference.Work):
        def __init__(self, *args):
            super().__init__(*args)
            entering(host(self.x))

        def _expert(self, slot, x):
            quantization = self.bank.layer.quantization

            def linear(name, x):
                return reference.project(x, *self.bank.matrix(name, slot), quantization[name])

            h = swiglu(linear("gate_proj", x), linear("up_proj", x))
            down(slot, host(h))
            return linear("down_proj", h)

    return Work
