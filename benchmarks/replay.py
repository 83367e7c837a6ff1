"""Replay real routing through slot policies: hit rates without computing or reading experts.

    python benchmarks/replay.py [--plot docs/plots]

There are two sources, in `benchmarks/traces`:

- a trace of Qwen3-30B-A3B: real tokens in their order (the last layer is left out, because the
  trace does not have its prompt). Policies warm up on the prompt and the first half of the decoded
  tokens; hits are counted in the other half.
- the frequencies of Qwen3.5-397B's experts over 150 tokens. Tokens are drawn from them
  independently: they have the skew of the model, but not the similarity of neighbouring tokens, and
  frequencies over this few tokens look more uneven than they are. The number of slots follows from
  a budget: (budget - program - dense weights - working memory) / (layers * bytes of an expert).

`clairvoyant` knows the future: no policy can do better. The last line is JSON.
"""

import argparse
import gzip
import json
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from policies import LRU, S3FIFO, Aged, Clairvoyant, Pinned, hottest

TRACES = Path(__file__).parent / "traces"
Layer = list[list[int]]  # the K experts of each token

# Qwen3.5-397B-A17B at 4 bits, group 64: bytes of an expert (3 matrices of 4096 x 1024), of the
# dense weights, and of the rest of the process with a context of 8,192 tokens.
EXPERT_NBYTES = 7_077_888
DENSE_NBYTES = 5.5e9
WORKING_NBYTES = 1.5e9
BUDGETS_GB = (8, 16, 24, 36, 48, 64, 128)


def read_trace(path: Path) -> tuple[list[Layer], int, int]:
    """Return the layers, the tokens of the prompt and the experts per layer of a route trace."""
    with gzip.open(path, "rt") as f:
        rows = [line.split(",")[1:6] for line in f if line[0].isdigit()]
    by_step: dict[tuple[int, int], dict[int, list[int]]] = {}
    for phase, step, layer, _, expert in (map(int, row) for row in rows):
        by_step.setdefault((phase, step), {}).setdefault(layer, []).append(expert)
    steps = [by_step[key] for key in sorted(by_step)]
    layers = [[step[layer] for step in steps] for layer in sorted(steps[0])]
    prompt = sum(phase == 0 for phase, _ in by_step)
    return layers, prompt, 128


def read_frequencies(path: Path) -> np.ndarray:
    """Return the share of tokens that chose each expert: float64 (layers, experts)."""
    content = path.read_bytes()
    magic, _, layers, entries = struct.unpack_from("<4sIII", content)
    if magic != b"QERF":
        raise SystemExit(f"{path} starts with {magic!r}, not QERF: it has no frequencies.")
    rows = np.frombuffer(
        content, [("layer", "<u2"), ("expert", "<u2"), ("share", "<f4")], entries, 16
    )
    shares = np.zeros((layers, 512))
    shares[rows["layer"], rows["expert"]] = rows["share"]
    return shares


def draw(shares: np.ndarray, tokens: int, k: int, seed: int = 0) -> list[Layer]:
    """Draw the K experts of each token by their shares, without replacement.

    These are the experts with the K largest values of log(share) + Gumbel noise.
    """
    random = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        logs = np.log(shares)
    layers = []
    for row in logs:
        keys = row + random.gumbel(size=(tokens, row.size))
        layers.append(np.argpartition(-keys, k, axis=1)[:, :k].tolist())
    return layers


def hit_rate(layers: Sequence[Layer], warm: int, make: Callable) -> float:
    """Return the hit rate of the tokens from `warm` on.

    make: called with the tokens of a layer, returns the policy of that layer.
    """
    missed = used = 0
    for layer in layers:
        policy = make(layer)
        for step, experts in enumerate(layer):
            count = policy.access(experts)
            if step >= warm:
                missed += count
                used += len(experts)
    return 1 - missed / used


def policies(slots: int, experts: int, warm: int) -> dict[str, Callable]:
    """Return functions that make each policy for the tokens of a layer, by name."""
    return {
        "aged": lambda layer: Aged(slots, experts),
        "aged 32": lambda layer: Aged(slots, experts, 32.0),
        "aged 1024": lambda layer: Aged(slots, experts, 1024.0),
        "lfu": lambda layer: Aged(slots, experts, 1e12),
        "lru": lambda layer: LRU(slots, experts),
        "s3-fifo": lambda layer: S3FIFO(slots, experts),
        "pinned half": lambda layer: Pinned(slots, experts, hottest(layer[:warm])),
        "clairvoyant": lambda layer: Clairvoyant(slots, layer),
    }


def uneven(layers: Sequence[Layer], warm: int, slots: int, experts: int, least: int) -> float:
    """Return the hit rate of `aged` when layers have different numbers of slots.

    Each slot goes to the layer in which one more would have hit most in the warm-up, by its most
    used experts.

    Args:
        slots: average number of slots of a layer.
        least: slots of every layer.
    """
    gains = []
    for index, layer in enumerate(layers):
        counts = np.bincount([e for step in layer[:warm] for e in step], minlength=experts)
        gains += [(-c, i, index) for i, c in enumerate(sorted(counts, reverse=True)[least:])]
    share = [least] * len(layers)
    for _, _, index in sorted(gains)[: (slots - least) * len(layers)]:
        share[index] += 1
    sizes = iter(share)
    return hit_rate(layers, warm, lambda layer: Aged(next(sizes), experts))


def warm_start(layers: Sequence[Layer], learn: int, slots: int, experts: int, first: int) -> dict:
    """Return how many experts are read in the `first` tokens after the first `learn` tokens.

    cold: with empty slots. frequencies: with the counts of the tokens before. experts: with their
    hottest experts in the slots too, which takes `before` reads.
    """

    def misses(counts: bool, fill: bool) -> int:
        total = 0
        for layer in layers:
            policy, seen = Aged(slots, experts), layer[:learn]
            if counts:
                policy.slots.record_use(Counter(e for step in seen for e in step), 0)
            for expert in hottest(seen)[:slots] if fill else ():
                policy.slots.allocate(expert, ())
            total += sum(policy.access(step) for step in layer[learn : learn + first])
        return total

    return {
        "slots": slots,
        "tokens": first,
        "cold": misses(False, False),
        "frequencies": misses(True, False),
        "experts": misses(True, True),
        "before": slots * len(layers),
    }


def curves(layers: Sequence[Layer], experts: int, warm: int, sizes: Sequence[int]) -> dict:
    """Return the hit rates of each policy, for the given numbers of slots."""
    k = len(layers[0][0])
    results: dict[str, list[float]] = {}
    for slots in sizes:
        for name, make in policies(slots, experts, warm).items():
            results.setdefault(name, []).append(round(hit_rate(layers, warm, make), 4))
        results.setdefault("uneven", []).append(
            round(uneven(layers, warm, slots, experts, min(slots, k + 2)), 4)
        )
        print(slots, {name: rates[-1] for name, rates in results.items()}, flush=True)
    return results


def slots_of(budget: float, layers: int, experts: int) -> int:
    """Return the slots per layer that a memory budget in bytes has space for."""
    left = budget - DENSE_NBYTES - WORKING_NBYTES
    return min(experts, int(left // (layers * EXPERT_NBYTES)))


def plot(path: Path, title: str, label: str, x: Sequence, curves: dict[str, list[float]]) -> None:
    """Draw the hit rate of each policy over x."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "flashmoe"  # the same picture for the same numbers
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, rates in curves.items():
        style = {"clairvoyant": ":", "aged": "-"}.get(name, "--")
        axes.plot(x, rates, style, marker=".", label=name, linewidth=2 if name == "aged" else 1)
    axes.set(title=title, xlabel=label, ylabel="hit rate", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=400, help="tokens drawn for the 397B, half to warm up"
    )
    parser.add_argument("--plot", type=Path, help="directory for the SVG files; needs matplotlib")
    args = parser.parse_args()

    layers, prompt, experts = read_trace(TRACES / "qwen3-30b-a3b.route.csv.gz")
    warm = prompt + (len(layers[0]) - prompt) // 2
    sizes = [8, 12, 16, 24, 32, 48, 64, 96]
    trace = curves(layers, experts, warm, sizes)
    result: dict = {"30b trace": {"k": len(layers[0][0]), "slots": sizes, "hit_rate": trace}}
    result["30b warm start"] = [
        warm_start(layers, warm, slots, experts, first)
        for slots in (16, 32)
        for first in (8, 32, len(layers[0]) - warm)
    ]
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        title = f"Qwen3-30B-A3B, real routing, K={len(layers[0][0])} of {experts} experts"
        plot(args.plot / "replay-30b.svg", title, "slots a layer", sizes, trace)

    shares = read_frequencies(TRACES / "qwen3.5-397b.freq")
    for k in (4, 10):
        drawn = draw(shares, args.tokens, k)
        by_budget = {gb: slots_of(gb * 1e9, *shares.shape) for gb in BUDGETS_GB}
        fits = {gb: slots for gb, slots in by_budget.items() if slots >= k + 2}
        rates = curves(drawn, shares.shape[1], args.tokens // 2, list(fits.values()))
        result[f"397b K={k}"] = {"gb": list(fits), "slots": list(fits.values()), "hit_rate": rates}
        if args.plot:
            title = f"Qwen3.5-397B, drawn by measured frequencies, K={k} of 512 experts"
            plot(args.plot / f"replay-397b-k{k}.svg", title, "memory budget, GB", list(fits), rates)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
