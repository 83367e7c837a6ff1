"""Measure whole models on a GPU: all resident beside stock mlx-lm, and streamed from disk."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import synth

from gpu.block import float64
from gpu.clock import busy
from gpu.sides import Sides, ratios

VOCAB = 248320


class Decoding:
    """Decodes greedily after a prompt, as mlx-lm's generate does.

    The next step is launched before the host looks at the token of the step before.
    """

    def __init__(self, model, prompt: list[int]):
        self._model = model
        self._cache = model.make_cache()
        for token in prompt:
            self._logits = model(mx.array([[token]]), self._cache)
            mx.eval(self._logits)

    def run(self, steps: int) -> dict[str, float]:
        """Return the ms of a token: building operations in Python, launching them, waiting."""
        parts = dict.fromkeys(("building", "handing over", "waiting"), 0.0)
        token = mx.argmax(self._logits[:, -1:], axis=-1)
        for _ in range(steps):
            moments = [time.perf_counter()]
            self._logits = self._model(token, self._cache)
            following = mx.argmax(self._logits[:, -1:], axis=-1)
            moments.append(time.perf_counter())
            mx.async_eval(following)
            moments.append(time.perf_counter())
            token.tolist()
            moments.append(time.perf_counter())
            token = following
            for name, start, end in zip(parts, moments, moments[1:], strict=False):
                parts[name] += (end - start) * 1e3 / steps
        mx.eval(token)
        return {name: round(ms, 2) for name, ms in parts.items()}


def forced(model, tokens: list[int]) -> np.ndarray:
    """Return the logits after each given token, one step each: (tokens, vocabulary)."""
    cache = model.make_cache()
    return np.array([float64(model(mx.array([[token]]), cache))[0, -1] for token in tokens])


def checkpoint(work: Path, **geometry) -> Path:
    """Return a checkpoint of synth.py in `work`; write it if it is not there."""
    path = work / "-".join(f"{k}{v}" for k, v in geometry.items())
    if not path.exists():
        synth.write(path, **geometry)
    return path


def log(text) -> None:
    """Print the progress of a long run."""
    click.echo(f"{time.strftime('%X')} {text}", err=True)


def decoding(side: str, path: Path, experts: int, prompt: list[int], steps: int) -> dict:
    """Return the functions that one side of `model` can run, by name."""
    if side == "stock":
        from mlx_lm.utils import load_model

        model, _ = load_model(path)
        for block in (layer.mlp for layer in model.layers):
            block.top_k = 4
    else:
        from flashmoe.checkpoint.checkpoint import Checkpoint
        from flashmoe.models.loading import load_streaming

        model = load_streaming(Checkpoint.open(path), slots=experts, experts=4)
    run = Decoding(model, prompt)
    log(f"{side}: prefill is done")

    def exact():
        model.set_dtype(mx.float32)
        return forced(model, prompt[:6])

    return {
        "decode": lambda: run.run(steps),
        "busy": lambda: dict(largest(busy(lambda: run.run(5), 5))),
        "logits": lambda: forced(model, prompt[:6]),
        "exact logits": exact,
        "fully resident": lambda: sum(
            layer.mlp.switch_mlp.fully_resident for layer in model.layers
        ),
    }


def largest(parts: dict[str, float], count: int = 15) -> list[tuple[str, float]]:
    """Return the largest times of `busy`, with their names, in descending order."""
    return sorted(parts.items(), key=lambda part: -part[1])[:count]


def model(work: Path, layers: int, experts: int) -> dict:
    """Compare resident models: tokens/s, where the time goes, and errors of the logits."""
    path = checkpoint(work, layers=layers, experts=experts, vocab=VOCAB)
    log("the checkpoint is written")
    # The prompt is long enough to need every expert of every layer.
    prompt = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    steps = 20
    with Sides(decoding, path=path, experts=experts, prompt=prompt, steps=steps) as sides:
        fully_resident = sides.run("ours", "fully resident")[1]
        seconds = sides.alternated("decode", rounds=5)
        rates = {f"{n}, tokens/s": round(steps / s, 1) for n, s in seconds.items()}
        log(rates)
        where: dict = {side: sides.run(side, "decode")[1] for side in seconds}
        log(where)
        if importlib.util.find_spec("torch"):
            gpu = {side: sides.run(side, "busy")[1] for side in ("stock", "ours")}
            where["us of a token on the GPU"] = gpu
            log(gpu)
        # Random weights of many layers amplify rounding errors, of both sides in the same way.
        errors = {side: sides.run(side, "logits")[1] for side in ("stock", "ours")}
        exact = sides.run("stock", "exact logits")[1]
    size = np.sqrt((exact**2).mean())
    return {
        "layers": layers,
        "experts": experts,
        "fully resident layers": fully_resident,
        **rates,
        "ratio": ratios(seconds),
        "ms of a token": where,
        "error of logits, root mean square": {
            n: float(f"{np.sqrt(((e - exact) ** 2).mean()) / size:.3g}") for n, e in errors.items()
        },
    }


def streaming(work: Path, layers: int, experts: int, slots: int, steps: int = 12) -> dict:
    """Compare a streamed model with the resident one, and split the time of its tokens."""
    from timeline import Recorder, by_kind

    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.models.loading import load_streaming
    from flashmoe.ops import backend as ops

    path = checkpoint(work, layers=layers, experts=experts)
    opened = Checkpoint.open(path)
    tokens = np.random.default_rng(0).integers(0, 1024, 2 * steps).tolist()
    resident = load_streaming(opened, slots=experts, experts=4, io="buffered")
    expected = [forced(resident, tokens) for _ in range(2)][1]
    results: dict = {"layers": layers, "experts": experts, "slots": slots}
    for io in ("buffered", "direct"):
        streamed = load_streaming(opened, slots=slots, experts=4, io=io)
        same = bool((forced(streamed, tokens) == expected).all())
        side = Decoding(streamed, tokens)
        side.run(4)
        before, recorder, moments = streamed.stats, Recorder(), [time.perf_counter()]
        with recorder.recording(ops.pick()):
            for _ in range(steps):
                side.run(1)
                moments.append(time.perf_counter())
        stats = streamed.stats - before
        parts = [by_kind(recorder.spans, *m) for m in zip(moments, moments[1:], strict=False)]
        results[io] = {
            "same bits as resident": same,
            "hit rate": round(stats.hit_rate, 3),
            "MB a token": round(stats.reads.bytes / steps / 1e6, 1),
            "ms of a token": {
                k: round(statistics.median(p[k] for p in parts), 2) for k in parts[0]
            },
        }
        streamed.close()
    resident.close()
    return results
