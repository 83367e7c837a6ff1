"""The GPU kernels of the expert block, and whole models through them, beside stock MLX.

    python benchmarks/gpu.py [--work DIR] [--only check block rows model streaming]

The physics: a token reads each weight of its K experts once, so a block cannot take less than
K * 7.08 MB / B (397B geometry, 4 bits, group 64), with B the bandwidth of the GPU's memory, which
is measured here by a copy. A launch costs some microseconds beside that. Blocks are timed as they
follow each other in a model: each takes what the one before gave, and both sides are compiled by
`mx.compile`, as they are when a model decodes. Weights are walked through more memory than caches
hold. Rounds alternate between both sides; figures are medians.

    check      errors against float64, in units of what rounding the result costs
    block      gate, up, SwiGLU, down, weighted sum: K = 4 and 10; then with shared expert
    rows       the same for 1 to 32 tokens: where `gather_qmm` takes over
    model      60 layers, experts resident, K = 4: tokens/s beside stock mlx-lm, and the errors of
               both against stock in float32
    streaming  experts on disk and slots on the GPU: bit for bit the resident result, and where the
               time of a token goes

model and streaming write a checkpoint below --work: 17 GB and 8 GB. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import synth

from flashmoe.ops.fused import MOST_ROWS
from flashmoe_metal.down import Shared, down
from flashmoe_metal.gate_up import gate_up
from flashmoe_metal.kernel import available
from flashmoe_metal.matrix import Matrix
from flashmoe_metal.router import router

HIDDEN, EXPERT, SLOTS, VOCAB = 4096, 1024, 64, 248320
ROUNDS, CHAIN = 7, 40
SECTIONS = ("check", "block", "rows", "model", "streaming")


def stack(slots: int, rows: int, columns: int, bits: int = 4, group: int = 64) -> Matrix:
    """Random codes, scaled so that a product keeps the size of its input."""
    words = mx.random.randint(0, 1 << 16, (slots, rows, columns * bits // 16)).astype(mx.uint16)
    low = columns**-0.5 * 12**0.5 / 2**bits
    scales = mx.random.uniform(0.75 * low, 1.25 * low, (slots, rows, columns // group))
    scales = scales.astype(mx.bfloat16)
    biases = (scales.astype(mx.float32) * (-(2**bits - 1) / 2)).astype(mx.bfloat16)
    found = Matrix(words.view(mx.uint32), scales, biases, bits, group)
    mx.eval(found.arrays)
    return found


class Block:
    """The experts of one layer, and a shared one."""

    def __init__(self, slots: int, hidden: int, expert: int, bits: int = 4, group: int = 64):
        shapes = (expert, hidden), (expert, hidden), (hidden, expert)
        self.gate, self.up, self.down = (stack(slots, *s, bits, group) for s in shapes)
        self.shared = [_first(stack(1, *s, bits, group)) for s in shapes]

    def nbytes(self, k: int) -> int:
        """Of K experts."""
        total = sum(a.nbytes for m in (self.gate, self.up, self.down) for a in m.arrays)
        return total * k // self.gate.weight.shape[0]

    def ours(self, x, slots, scores, logits=None):
        with_shared = logits is not None
        h, shared_h = gate_up(
            x, slots, self.gate, self.up, self.shared[:2] if with_shared else None
        )
        shared = Shared(shared_h, self.shared[2], logits) if with_shared else None
        return down(h, slots, scores, self.down, x.dtype, shared=shared)

    def stock(self, x, slots, scores, logits=None):
        """As mlx-lm's blocks compute it."""
        from mlx_lm.models.activations import swiglu

        rows = x[:, None, None]
        h = swiglu(_gather(rows, self.gate, slots), _gather(rows, self.up, slots))
        y = (_gather(h, self.down, slots).squeeze(-2) * scores[..., None]).sum(-2)
        if logits is not None:
            gate, up, last = self.shared
            shared = _product(swiglu(_product(x, gate), _product(x, up)), last)
            y = y + mx.sigmoid(logits) * shared
        return y

    def exact(self, x, slots, scores, logits) -> tuple[np.ndarray, np.ndarray]:
        """In float64, and the sum of what is added up for each element, without signs."""
        x, scores, logits = map(_float64, (x, scores, logits))
        total, size = np.zeros_like(x), np.zeros_like(x)
        for t, row in enumerate(np.array(slots)):
            experts = [[_dense(m, int(s)) for m in (self.gate, self.up, self.down)] for s in row]
            terms = list(zip(experts, scores[t], strict=True))
            terms.append(([_dense(m) for m in self.shared], 1 / (1 + np.exp(-logits[t, 0]))))
            for (gate, up, last), weight in terms:
                g = gate @ x[t]
                h = g / (1 + np.exp(-g)) * (up @ x[t])
                total[t] += weight * (last @ h)
                size[t] += np.abs(weight) * (np.abs(last) @ np.abs(h))
        return total, size


def _first(m: Matrix) -> Matrix:
    return Matrix(m.weight[0], m.scales[0], m.biases[0], m.bits, m.group_size)


def _gather(x, m: Matrix, slots):
    kind = {"transpose": True, "group_size": m.group_size, "bits": m.bits}
    return mx.gather_qmm(x, m.weight, m.scales, m.biases, rhs_indices=slots, **kind)


def _product(x, m: Matrix):
    kind = {"transpose": True, "group_size": m.group_size, "bits": m.bits}
    return mx.quantized_matmul(x, m.weight, m.scales, m.biases, **kind)


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _dense(m: Matrix, slot: int | None = None) -> np.ndarray:
    w, s, b = m.arrays if slot is None else (a[slot] for a in m.arrays)
    s, b = s.astype(mx.float32), b.astype(mx.float32)
    return _float64(mx.dequantize(w, s, b, group_size=m.group_size, bits=m.bits))


def choices(rows: int, k: int, slots: int, count: int = 16) -> list[mx.array]:
    """Slots of some calls, (rows, k) each."""
    rng = np.random.default_rng(0)
    draws = [[rng.permutation(slots)[:k] for _ in range(rows)] for _ in range(count)]
    return [mx.array(np.array(d, np.uint32)) for d in draws]


def bandwidth() -> float:
    """GB/s of a copy of 4 GB on the GPU, bytes read and written."""
    x = mx.zeros((1 << 30,), mx.uint32)
    mx.eval(x)

    def copy():
        mx.eval(x + 1)

    copy()
    return 2 * x.nbytes / statistics.median(_times(copy, ROUNDS)) / 1e9


def _times(f: Callable[[], None], count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        f()
        found.append(time.perf_counter() - start)
    return found


def alternated(sides: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, one after the other in each round."""
    for f in sides.values():
        f()
        f()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, f in sides.items():
            times[name] += _times(f, 1)
    return {name: statistics.median(t) for name, t in times.items()}


def check(small: bool) -> dict:
    """The largest error of an element, over what rounding to bf16 and summing in float32 may cost:
    half a bf16 spacing of the result, and 2 ** -20 of what was added up."""
    hidden, expert, slots = (256, 128, 8) if small else (HIDDEN, EXPERT, 16)
    found = {}
    for bits, group, k in ((4, 64, 1), (4, 64, 4), (4, 64, 10), (2, 32, 4), (8, 128, 4)):
        k = min(k, slots)
        block = Block(slots, hidden, expert, bits, group)
        rows = 2 if small else 1
        x = mx.random.normal((rows, hidden)).astype(mx.bfloat16)
        logits = mx.random.normal((rows, 1)).astype(mx.bfloat16)
        chosen = choices(rows, k, slots, 1)[0]
        scores = mx.softmax(mx.random.normal((rows, k)), axis=-1)
        y = _float64(block.ours(x, chosen, scores, logits))
        exact, size = block.exact(x, chosen, scores, logits)
        allowed = 2.0**-8 * np.abs(exact) + 2.0**-20 * size
        found[f"{bits} bits, K={k}"] = round(float((np.abs(y - exact) / allowed).max()), 3)
    logits = (mx.random.normal((512, 512)) * 2).astype(mx.bfloat16)
    indices, _ = router(logits, 10, experts=512, normalise=True)
    gates = mx.softmax(logits, axis=-1, precise=True)
    stock = mx.argpartition(gates, kth=-10, axis=-1)[..., -10:]
    found["router rows like mlx-lm's"] = float((indices == stock).all(axis=-1).mean().item())
    return found


def block(peak: float) -> dict:
    found = {}
    layer = Block(SLOTS, HIDDEN, EXPERT)
    x = mx.random.normal((1, HIDDEN)).astype(mx.bfloat16)
    logits = mx.zeros((1, 1), mx.bfloat16)
    for k in (4, 10):
        scores = mx.full((1, k), 1 / k)
        low = scores.astype(mx.bfloat16)
        chosen = choices(1, k, SLOTS)
        mx.eval(x, logits, scores, low, chosen)

        def chain(f, scores, *rest, chosen=chosen, compiled=True):
            step = mx.compile(f) if compiled else f

            def run():
                y = x
                for i in range(CHAIN):
                    y = step(y, chosen[i % len(chosen)], scores, *rest)
                mx.eval(y)

            return run

        seconds = alternated(
            {
                "stock": chain(layer.stock, low),
                "ours": chain(layer.ours, scores),
                "stock, shared": chain(layer.stock, low, logits),
                "ours, shared": chain(layer.ours, scores, logits),
                "stock, not compiled": chain(layer.stock, low, compiled=False),
                "ours, not compiled": chain(layer.ours, scores, compiled=False),
            }
        )
        us = {name: round(s / CHAIN * 1e6, 1) for name, s in seconds.items()}
        rate = layer.nbytes(k) / (us["ours"] * 1e3)
        found[f"K={k}"] = {
            "us": us,
            "MB": round(layer.nbytes(k) / 1e6, 1),
            "GB/s": round(rate),
            "share of the copy": round(rate / peak, 3),
            "ratio": round(us["stock"] / us["ours"], 2),
            "ratio, shared": round(us["stock, shared"] / us["ours, shared"], 2),
        }
    return found


def rows() -> dict:
    """us a block of K=10 for so many tokens, ours and stock's."""
    layer = Block(SLOTS, HIDDEN, EXPERT)
    found = {}
    for count in (1, 2, 4, 8, 16, 32):
        x = mx.random.normal((count, HIDDEN)).astype(mx.bfloat16)
        scores = mx.full((count, 10), 0.1)
        low = scores.astype(mx.bfloat16)
        chosen = choices(count, 10, SLOTS, 4)
        mx.eval(x, scores, low, chosen)

        def chain(f, scores, x=x, chosen=chosen):
            step = mx.compile(f)

            def run():
                y = x
                for slots in chosen:
                    y = step(y, slots, scores)
                mx.eval(y)

            return run

        seconds = alternated({"ours": chain(layer.ours, scores), "stock": chain(layer.stock, low)})
        us = {name: round(s / len(chosen) * 1e6) for name, s in seconds.items()}
        found[count] = us | {"ratio": round(us["stock"] / us["ours"], 2)}
    return found | {"kernels take": MOST_ROWS}


class Decoding:
    """A model that decodes greedily from a prompt, as mlx-lm's generate does: the next step is
    launched before the last one's token is looked at."""

    def __init__(self, model, prompt: list[int]):
        self._model = model
        self._cache = model.make_cache()
        for token in prompt:
            self._logits = model(mx.array([[token]]), self._cache)
            mx.eval(self._logits)

    def run(self, steps: int) -> None:
        token = mx.argmax(self._logits[:, -1:], axis=-1)
        for _ in range(steps):
            self._logits = self._model(token, self._cache)
            following = mx.argmax(self._logits[:, -1:], axis=-1)
            mx.async_eval(following)
            token.tolist()
            token = following
        mx.eval(token)


def forced(model, tokens: list[int]) -> np.ndarray:
    """Logits of each token, one step each: (tokens, vocabulary)."""
    cache = model.make_cache()
    found = []
    for token in tokens:
        found.append(_float64(model(mx.array([[token]]), cache))[0, -1])
    return np.array(found)


def checkpoint(work: Path, **geometry) -> Path:
    path = work / "-".join(f"{k}{v}" for k, v in geometry.items())
    if not path.exists():
        synth.write(path, **geometry)
    return path


def model(work: Path, layers: int, experts: int) -> dict:
    from mlx_lm.utils import load_model

    from flashmoe.checkpoint import Checkpoint
    from flashmoe.loading import load_streaming

    path = checkpoint(work, layers=layers, experts=experts, vocab=VOCAB)
    stock, _ = load_model(path)
    for block in (layer.mlp for layer in stock.layers):
        block.top_k = 4
    ours = load_streaming(Checkpoint.open(path), slots=experts, experts=4)
    # Long enough to need every expert of every layer.
    prompt = np.random.default_rng(0).integers(0, VOCAB, 150).tolist()
    sides = {"stock": Decoding(stock, prompt), "ours": Decoding(ours, prompt)}
    settled = sum(layer.mlp.switch_mlp.settled for layer in ours.layers)
    steps = 20
    seconds = alternated({n: (lambda s=s: s.run(steps)) for n, s in sides.items()}, rounds=5)
    rates = {f"{n} tokens/s": round(steps / s, 1) for n, s in seconds.items()}
    # Random weights of many layers amplify rounding, of both in the same way.
    tokens = prompt[:6]
    errors = {"stock": forced(stock, tokens), "ours": forced(ours, tokens)}
    stock.set_dtype(mx.float32)
    exact = forced(stock, tokens)
    size = np.sqrt((exact**2).mean())
    return {
        "layers": layers,
        "experts": experts,
        "layers that are settled": settled,
        **rates,
        "ratio": round(seconds["stock"] / seconds["ours"], 2),
        "error of logits, root mean square": {
            n: float(f"{np.sqrt(((e - exact) ** 2).mean()) / size:.3g}") for n, e in errors.items()
        },
    }


def streaming(work: Path, layers: int, experts: int, slots: int, steps: int = 12) -> dict:
    from timeline import Recorder, by_kind

    from flashmoe import ops
    from flashmoe.checkpoint import Checkpoint
    from flashmoe.loading import load_streaming

    path = checkpoint(work, layers=layers, experts=experts)
    opened = Checkpoint.open(path)
    tokens = np.random.default_rng(0).integers(0, 1024, 2 * steps).tolist()
    resident = load_streaming(opened, slots=experts, experts=4, io="buffered")
    expected = [forced(resident, tokens) for _ in range(2)][1]
    found = {"layers": layers, "experts": experts, "slots": slots}
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
        found[io] = {
            "same bits as resident": same,
            "hit rate": round(stats.hit_rate, 3),
            "MB a token": round(stats.reads.bytes / steps / 1e6, 1),
            "ms of a token": {
                k: round(statistics.median(p[k] for p in parts), 2) for k in parts[0]
            },
        }
        streamed.close()
    resident.close()
    return found


@click.command(help=__doc__.splitlines()[0])
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/flashmoe-gpu"))
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="These sections.")
@click.option("--layers", default=60)
@click.option("--experts", default=32, help="Of a layer of the resident model.")
@click.option("--small", is_flag=True, help="check: tiny matrices, for tools that slow the GPU.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints.")
def main(work, only, layers, experts, small, keep):
    if not available():
        raise SystemExit("no GPU that MLX compiles kernels for")
    only = only or SECTIONS
    mx.random.seed(0)
    result: dict = {"benchmark": "gpu", "device": mx.device_info(), "mlx": mx.__version__}
    if "block" in only:
        result["copy GB/s"] = round(bandwidth())
    sections = {
        "check": lambda: check(small),
        "block": lambda: block(result["copy GB/s"]),
        "rows": rows,
        "model": lambda: model(work, layers, experts),
        "streaming": lambda: streaming(work, layers=8, experts=128, slots=32),
    }
    for name in only:
        start = time.perf_counter()
        result[name] = sections[name]()
        seconds = f"({time.perf_counter() - start:.0f} s)"
        print(name, seconds, json.dumps(result[name], indent=1), flush=True)
    if not keep:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
