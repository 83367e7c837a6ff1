"""Measures on a text how large the inputs of each column of the experts are.

The source model processes the text through flashmoe's own streaming, layer by layer. Two sums are
taken: of the squares of the inputs of a layer's experts (gate and up have the same input), and of
the squares of the inputs of each expert's down projection. A column with large inputs costs more
when its weights are rounded: `rounding` weights errors by these means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..files import replacing

if TYPE_CHECKING:
    from ..models.streaming_moe import StreamingMoE
    from ..streaming.compute import Backend

#: Default number of tokens of the text that are used.
CALIBRATION_TOKENS = 4096

#: Number of tokens of an expert at which its own mean counts as much as that of its layer.
PRIOR_TOKENS = 32

#: Minimum importance of a column relative to the mean: a text does not show every use of a model.
FLOOR = 0.01


@dataclass
class LayerSums:
    """Sums of squared inputs of the experts of one layer.

    Attributes:
        hidden: float32 (hidden,), over all tokens.
        tokens: number of tokens.
        down: float32 (experts, intermediate), over the tokens of each expert.
        counts: int64 (experts,), the tokens of each expert.
    """

    hidden: np.ndarray
    tokens: int
    down: np.ndarray
    counts: np.ndarray

    @classmethod
    def zeros(cls, experts: int, hidden: int, intermediate: int) -> LayerSums:
        """Return sums over no tokens."""
        down = np.zeros((experts, intermediate), np.float32)
        return cls(np.zeros(hidden, np.float32), 0, down, np.zeros(experts, np.int64))

    def importance(self, role: str, expert: int) -> np.ndarray:
        """Return the importance of each column of a matrix; the mean is 1.

        Args:
            role: "gate_up" or "down".
        """
        if role == "gate_up":
            return _normalized(self.hidden / max(self.tokens, 1))
        layer = self.down.sum(axis=0) / max(self.counts.sum(), 1)
        down = self.down[expert] + PRIOR_TOKENS * layer
        return _normalized(down / (self.counts[expert] + PRIOR_TOKENS))


def _normalized(mean: np.ndarray) -> np.ndarray:
    average = float(mean.mean())
    if not average > 0:
        return np.ones_like(mean, np.float32)
    return (mean / average + FLOOR).astype(np.float32) / np.float32(1 + FLOOR)


class ColumnImportance:
    """The result of a calibration, by layer. It can be saved as one file."""

    def __init__(self, layers: dict[int, LayerSums]):
        self.layers = layers

    def __call__(self, layer: int, role: str, expert: int) -> np.ndarray:
        """Return the importance of each column of an expert's matrix."""
        return self.layers[layer].importance(role, expert)

    def save(self, file: Path) -> None:
        """Write the file, replacing an older one.

        Raises:
            OSError: it cannot be written.
        """
        arrays: dict[str, Any] = {}
        for layer, sums in self.layers.items():
            values = (sums.hidden, np.array(sums.tokens), sums.down, sums.counts)
            arrays |= {f"{layer}.{i}": value for i, value in enumerate(values)}
        with replacing(file) as partial, open(partial, "wb") as f:
            np.savez(f, **arrays)

    @classmethod
    def load(cls, file: Path) -> ColumnImportance:
        """Read a file that `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            layers = {int(name.partition(".")[0]) for name in arrays}
            sums = {n: [arrays[f"{n}.{i}"] for i in range(4)] for n in sorted(layers)}
        return cls({n: LayerSums(h, int(t), d, c) for n, (h, t, d, c) in sums.items()})


def describe(text: Path, tokens: int) -> dict:
    """Return what identifies a calibration: the hash of the text, and the number of tokens.

    Raises:
        SettingError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        data = text.read_bytes()
        data.decode("utf-8")
    except OSError as e:
        raise SettingError(
            f"cannot read {text} ({e.strerror}): pass another file to --calibrate"
        ) from e
    except UnicodeDecodeError as e:
        raise SettingError(f"{text} is not UTF-8 text: pass another file to --calibrate") from e
    return {"sha256": hashlib.sha256(data).hexdigest(), "tokens": tokens}


def calibrate(
    checkpoint: Checkpoint,
    text: Path,
    *,
    tokens: int = CALIBRATION_TOKENS,
    memory: str | int | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> ColumnImportance:
    """Run the model on the first tokens of a text and return the importance of its columns.

    Args:
        text: a UTF-8 file.
        tokens: maximum number of tokens.
        memory: limit for the memory of the process, see `flashmoe.options.LoadOptions`.
        advance: called with 1 for each layer that is started.

    Raises:
        SettingError: the text is empty, the tokenizer does not fit the model, or activations are
            not finite. Also everything that `flashmoe.models.loading.load_streaming` raises.
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
        raise SettingError(f"{text} is empty: pass another file to --calibrate")
    if (highest := max(ids)) >= checkpoint.text_config["vocab_size"]:
        raise SettingError(
            f"the tokenizer of {checkpoint.path} gives the token {highest}, which the model does "
            "not have: it belongs to another model, download this one again"
        )
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
            raise SettingError(
                f"{checkpoint.path} computes values that are not finite numbers on {text}: try "
                "another text, or download the model again"
            )
    return ColumnImportance(observer.layers)


class _SumObserver:
    """Adds the squared inputs of the experts of a model to sums, one for each MoE layer."""

    def __init__(self, checkpoint: Checkpoint):
        self.layers = {}
        for index, layer in checkpoint.expert_layers.items():
            rows = {p.projection: p.shape[0] for p in layer.parts if p.part == "weight"}
            first, last = layer.projections[0], layer.projections[-1]
            self.layers[index] = LayerSums.zeros(layer.num_experts, rows[last], rows[first])
        self.model: StreamingMoE | None = None

    def hidden(self, layer: int, x: np.ndarray) -> None:
        sums = self.layers[layer]
        sums.hidden += np.square(x).sum(axis=0)
        sums.tokens += len(x)

    def intermediate(self, layer: int, slot: int, h: np.ndarray) -> None:
        assert self.model is not None, "set when the model is loaded"
        expert = self.model.switches[layer].expert_in(slot)
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
