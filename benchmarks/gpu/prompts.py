"""Measure prompts on a GPU: speed with all experts resident, and the bits of streamed ones."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models import layerwise
from flashmoe.models.loading import load_streaming
from gpu.clock import busy
from gpu.model import VOCAB, checkpoint, largest, log

#: Tokens of a prompt that go through a layer together.
PASS_TOKENS = 2048

ROUNDS = 4


def prefill(model, tokens: list[int]) -> mx.array:
    """Take a prompt into a new cache; return the hidden state after it, (1, 1, hidden)."""
    passes = layerwise.prefill(
        model, layerwise.split(tokens, []), model.make_cache(), limit=PASS_TOKENS
    )
    *_, last = passes
    mx.eval(last[-1].hidden)
    return last[-1].hidden


def prompts(work: Path, layers: int, experts: int, lengths: Sequence[int] = (512, 2048)) -> dict:
    """Time prompts of these lengths with all experts resident.

    Returns:
        For each length the seconds of the first prompt, in which MLX compiles, the tokens/s of the
        median of ROUNDS later ones, and the peak of memory in GB. With PyTorch also the us that
        the GPU is busy with a layer, for the first length.
    """
    path = checkpoint(work, layers=layers, experts=experts, vocab=VOCAB)
    log("the checkpoint is written")
    model = load_streaming(Checkpoint.open(path), slots=experts)
    result: dict = {"layers": layers, "experts": experts, "backend": model.backend.name}
    for length in lengths:
        tokens = _tokens(length)
        first, *seconds = [_seconds(model, tokens) for _ in range(ROUNDS + 1)]
        result[f"prompt of {length}"] = {
            "tokens/s": round(length / statistics.median(seconds)),
            "seconds": [round(s, 4) for s in seconds],
            "seconds of the first": round(first, 1),
            "peak GB": round(mx.get_peak_memory() / 1e9, 2),
        }
        log(result[f"prompt of {length}"])
    if importlib.util.find_spec("torch") and mx.cuda.is_available():
        tokens = _tokens(lengths[0])
        parts = busy(lambda: prefill(model, tokens), layers, rounds=3)
        result["us of a layer on the GPU"] = dict(largest(parts))
    model.close()
    return result


def streamed_prompts(
    work: Path, layers: int, experts: int, slots: int, lengths: Sequence[int] = (300, 1100)
) -> dict:
    """Return for each length whether a streamed prompt leaves the bits of the resident one."""
    opened = Checkpoint.open(checkpoint(work, layers=layers, experts=experts))
    resident = load_streaming(opened, slots=experts)
    streamed = load_streaming(opened, slots=slots)
    same = {
        length: mx.array_equal(*(prefill(m, _tokens(length)) for m in (resident, streamed))).item()
        for length in lengths
    }
    misses = streamed.stats.loaded
    resident.close()
    streamed.close()
    return {"slots": slots, "experts read": misses, "same bits as resident": same}


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 1000, length).tolist()


def _seconds(model, tokens: list[int]) -> float:
    start = time.perf_counter()
    prefill(model, tokens)
    return time.perf_counter() - start
