"""Measure the GPU kernels of the expert block, and whole models with them, beside stock MLX.

    python benchmarks/gpu/run.py [--work DIR] [--only SECTION]...

The physics: a token reads each weight of its K experts once, so a block cannot take less than
K * 7.08 MB / B (397B geometry, 4 bits, group 64), with B the bandwidth of the GPU's memory, which
is measured here by a copy. A launch costs some microseconds in addition. Blocks are timed as they
follow each other in a model: each takes the result of the one before it, and both sides are
compiled by `mx.compile`, as they are when a model decodes. The weights are spread over more memory
than the caches hold. Rounds alternate between both sides; figures are medians.

    check      errors against float64, in units of the error that rounding the result may cause
    block      gate, up, SwiGLU, down and weighted sum, in wall-clock time: K = 4 and 10, with and
               without the shared expert, compiled block by block and as a whole chain
    kernels    the same and products of one row, in the GPU's own time (needs PyTorch's profiler)
    rows       the same for 1 to 128 tokens, which shows where `gather_qmm` becomes faster
    model      60 layers, experts resident, K = 4: tokens/s beside stock mlx-lm, and the errors of
               both against stock in float32
    streaming  experts on disk and slots on the GPU: whether the result equals the resident one bit
               for bit, and where the time of a token goes
    prompts    prompts of 512 and 2048 tokens, K = 10: tokens/s through the resident model, whether
               streamed prompts leave the same bits, and a dense product of 512 rows

`model` and `prompts` write one checkpoint into --work, of 17 GB, `streaming` one of 8 GB, and
`prompts` another one of 2 GB. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

# As a script, this file finds only the modules of its own directory.
sys.path.insert(0, str(Path(__file__).parents[1]))
from flashmoe.ops.gpu.fused import MAX_TOKENS
from flashmoe_metal.grouped import unpack
from flashmoe_metal.kernel import available
from flashmoe_metal.matvec import matvec
from flashmoe_metal.router import router
from gpu.block import (
    CHAIN,
    EXPERT,
    HIDDEN,
    KINDS,
    SLOTS,
    Block,
    Chains,
    chains,
    choices,
    expert_nbytes,
    first,
    float64,
    product,
    stack,
)
from gpu.clock import busy
from gpu.model import model, streaming
from gpu.prompts import prompts, streamed_prompts
from gpu.sides import Sides, ratios

ROUNDS = 7
SECTIONS = ("check", "block", "kernels", "rows", "model", "streaming", "prompts")


def bandwidth() -> float:
    """Return the GB/s of a copy of 4 GB on the GPU, counting bytes read and bytes written."""
    x = mx.zeros((1 << 30,), mx.uint32)
    mx.eval(x)

    def copy():
        mx.eval(x + 1)

    copy()
    return 2 * x.nbytes / statistics.median(_times(copy, ROUNDS)) / 1e9


def _times(f: Callable[[], None], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return seconds


def alternated(sides: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of each function; each round calls all of them once."""
    for f in sides.values():
        f()
        f()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, f in sides.items():
            times[name] += _times(f, 1)
    return {name: statistics.median(t) for name, t in times.items()}


def check(small: bool) -> dict:
    """Return the largest error of an element as a share of the allowed error, for several shapes.

    Rounding to bf16 and summing in float32 allow half a bf16 spacing of the result, and 2 ** -20 of
    the sum of the absolute values that were added.
    """
    hidden, expert, slots = (256, 128, 8) if small else (HIDDEN, EXPERT, 16)
    shares = {}
    for bits, group, k in ((4, 64, 1), (4, 64, 4), (4, 64, 10), (2, 32, 4), (8, 128, 4)):
        k = min(k, slots)
        block = Block(slots, hidden, expert, bits, group)
        rows = 2 if small else 1
        x = mx.random.normal((rows, hidden)).astype(mx.bfloat16)
        logits = mx.random.normal((rows, 1)).astype(mx.bfloat16)
        chosen = choices(rows, k, slots, 1)[0]
        scores = mx.softmax(mx.random.normal((rows, k)), axis=-1)
        y = float64(block.ours(x, chosen, scores, logits))
        exact, size = block.exact(x, chosen, scores, logits)
        allowed = 2.0**-8 * np.abs(exact) + 2.0**-20 * size
        shares[f"{bits} bits, K={k}"] = round(float((np.abs(y - exact) / allowed).max()), 3)
    logits = (mx.random.normal((512, 512)) * 2).astype(mx.bfloat16)
    indices, _ = router(logits, 10, experts=512, normalise=True)
    gates = mx.softmax(logits, axis=-1, precise=True)
    stock = mx.argpartition(gates, kth=-10, axis=-1)[..., -10:]
    same = (indices == stock).all(axis=-1)
    shares["router rows like mlx-lm's"] = np.array(same).mean().item()
    return shares


def block(peak: float) -> dict:
    """Time whole blocks by the wall clock.

    peak: GB/s of `bandwidth`.
    """
    results = {}
    with Sides(chains) as sides:
        for k in (4, 10):
            us = {}
            for kind in KINDS:
                seconds = sides.alternated(f"K={k}{kind}", ROUNDS)
                us[kind.strip(", ")] = {n: round(s / CHAIN * 1e6, 1) for n, s in seconds.items()}
            nbytes = expert_nbytes() * k
            rate = nbytes / (us[""]["ours"] * 1e3)
            results[f"K={k}"] = {
                "us": us,
                "ratio": {kind: ratios(times) for kind, times in us.items()},
                "MB": round(nbytes / 1e6, 1),
                "GB/s": round(rate),
                "share of the copy": round(rate / peak, 3),
            }
    return results


def kernels(peak: float) -> dict:
    """Return the us that the GPU is busy with a block, and with a product of one row."""
    layer = Block(SLOTS, HIDDEN, EXPERT)
    results = {}
    for k in (4, 10):
        runs = Chains(layer, k)
        parts = {side: busy(runs.chain(side), CHAIN) for side in ("stock", "ours")}
        results[f"block, K={k}"] = _beside(parts, expert_nbytes() * k, peak)
    for rows, columns in ((20608, 4096), (4096, 8192)):
        results[f"{rows} x {columns}"] = _products(rows, columns, peak)
    return results


def _products(rows: int, columns: int, peak: float) -> dict:
    # More matrices than the caches hold.
    matrices = [first(stack(1, rows, columns)) for _ in range(8)]
    x = mx.random.normal((1, columns)).astype(mx.bfloat16)

    def one_by_one(f):
        for m in matrices:
            mx.eval(f(x, m))

    parts = {
        "stock": busy(lambda: one_by_one(product), len(matrices)),
        "ours": busy(lambda: one_by_one(matvec), len(matrices)),
    }
    return _beside(parts, sum(a.nbytes for a in matrices[0].arrays), peak)


def _beside(parts: dict[str, dict[str, float]], nbytes: int, peak: float) -> dict:
    us = {side: p.pop("all") for side, p in parts.items()}
    rate = nbytes / us["ours"] / 1e3
    return {
        "us": us,
        "ratio": round(us["stock"] / us["ours"], 2),
        "GB/s": round(rate),
        "share of the copy": round(rate / peak, 3),
        "parts": parts,
    }


def rows() -> dict:
    """Return the us of a block with K=10 for several numbers of tokens, ours and stock's."""
    layer = Block(SLOTS, HIDDEN, EXPERT)
    results: dict = {}
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        x = mx.random.normal((count, HIDDEN)).astype(mx.bfloat16)
        scores = mx.full((count, 10), 0.1)
        low = scores.astype(mx.bfloat16)
        chosen = choices(count, 10, SLOTS, 4)
        mx.eval(x, scores, low, chosen)

        calls = max(8, 120 // count)

        def chain(f, scores, x=x, chosen=chosen, calls=calls):
            step = mx.compile(f)

            def run():
                y = x
                for i in range(calls):
                    y = step(y, chosen[i % len(chosen)], scores)
                mx.eval(y)

            return run

        seconds = alternated({"ours": chain(layer.ours, scores), "stock": chain(layer.stock, low)})
        us = {name: round(s / calls * 1e6) for name, s in seconds.items()}
        results[count] = us | {"ratio": round(us["stock"] / us["ours"], 2)}
    return results | {"kernels take": MAX_TOKENS}


def unpacked(rows_out: int, columns: int, rows: int) -> dict:
    """Return the us of a dense product: MLX's quantised one, and after `unpack`; CUDA only."""
    if not mx.cuda.is_available():
        return {}
    m = first(stack(1, rows_out, columns))
    x = mx.random.normal((rows, columns)).astype(mx.bfloat16)
    mx.eval(x)
    sides = {
        "stock": lambda: mx.eval(product(x, m)),
        "ours": lambda: mx.eval(x @ unpack(m).T),
    }
    return {name: round(s * 1e6) for name, s in alternated(sides, rounds=20).items()}


@click.command(help=__doc__.splitlines()[0])
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/flashmoe-gpu"))
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Only these sections.")
@click.option("--layers", default=60)
@click.option("--experts", default=32, help="Experts of a layer of the resident model.")
@click.option(
    "--small", is_flag=True, help="Tiny matrices, for tools that slow the GPU down (check)."
)
@click.option("--keep", is_flag=True, help="Do not delete the checkpoints.")
def main(work, only, layers, experts, small, keep):
    if not available():
        raise SystemExit("This machine has no GPU that MLX compiles kernels for.")
    only = only or SECTIONS
    mx.random.seed(0)
    result: dict = {"benchmark": "gpu", "device": mx.device_info(), "mlx": mx.__version__}
    if {"block", "kernels"} & set(only):
        result["copy GB/s"] = round(bandwidth())
    sections = {
        "check": lambda: check(small),
        "block": lambda: block(result["copy GB/s"]),
        "kernels": lambda: kernels(result["copy GB/s"]),
        "rows": rows,
        "model": lambda: model(work, layers, experts),
        "streaming": lambda: streaming(work, layers=8, experts=128, slots=32),
        "prompts": lambda: {
            "resident": prompts(work, layers, experts),
            "streamed": streamed_prompts(work, layers=8, experts=32, slots=13),
            "20608 x 4096, 512 rows, us": unpacked(20608, 4096, rows=512),
        },
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
