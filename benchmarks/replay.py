"""Replays real routing against slot policies: hit rates without computing or reading anything.

    python benchmarks/replay.py [--plot docs/plots]

Two sources, in `benchmarks/traces`:

- a trace of Qwen3-30B-A3B: real tokens in their order (of its last layer, the prompt is not there:
  it is left out). Policies warm up on the prompt and the first half of the decoded tokens; hits are
  counted in the other half.
- the frequencies of Qwen3.5-397B's experts over 150 tokens. Tokens are drawn from them,
  independently: that has the model's skew, but nothing of the likeness of neighbouring tokens, and
  frequencies of so few tokens look more uneven than they are. Slots are what is left of a budget:
  (budget - program - dense weights - working memory) / (layers * bytes of an expert).

`clairvoyant` knows the future: no policy can do better. Ends with one JSON line.
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

# Qwen3.5-397B-A17B at 4 bits, group 64: bytes of an expert (3 matrices of 4096 x 1024), of all that
# is no expert, and of the rest of the process with a context of 8,192 tokens.
EXPERT_NBYTES = 7_077_888
DENSE_NBYTES = 5.5e9
WORKING_NBYTES = 1.5e9
BUDGETS_GB = (8, 16, 24, 36, 48, 64, 128)


def read_trace(path: Path) -> tuple[list[Layer], int, int]:
    """(layers, tokens of the prompt, experts) of a route trace."""
    with gzip.open(path, "rt") as f:
        rows = [line.split(",")[1:6] for line in f if line[0].isdigit()]
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for phase, step, layer, _, expert in (map(int, row) for row in rows):
        found.setdefault((phase, step), {}).setdefault(layer, []).append(expert)
    steps = [found[key] for key in sorted(found)]
    layers = [[step[layer] for step in steps] for layer in sorted(steps[0])]
    prompt = sum(phase == 0 for phase, _ in found)
    return layers, prompt, 128


def read_frequencies(path: Path) -> np.ndarray:
    """Shares [layers, experts], float64."""
    content = path.read_bytes()
    magic, _, layers, entries = struct.unpack_from("<4sIII", content)
    if magic != b"QERF":
        raise SystemExit(f"{path} starts with {magic!r}, not QERF: it holds no frequencies")
    rows = np.frombuffer(
        content, [("layer", "<u2"), ("expert", "<u2"), ("share", "<f4")], entries, 16
    )
    shares = np.zeros((layers, 512))
    shares[rows["layer"], rows["expert"]] = rows["share"]
    return shares


def draw(shares: np.ndarray, tokens: int, k: int, seed: int = 0) -> list[Layer]:
    """Tokens whose K experts are drawn by their shares, without replacement: the K largest of
    log(share) + Gumbel noise."""
    random = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        logs = np.log(shares)
    layers = []
    for row in logs:
        keys = row + random.gumbel(size=(tokens, row.size))
        layers.append(np.argpartition(-keys, k, axis=1)[:, :k].tolist())
    return layers


def hit_rate(layers: Sequence[Layer], warm: int, make: Callable) -> float:
    """Of the tokens from `warm` on. make(layer's tokens) is the policy of a layer."""
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
    """Each by its name: what makes it for the tokens of a layer."""
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
    """Hit rate of `aged` when layers share their slots by what one more would have hit in the
    warm-up (its most used experts), instead of having as many each."""
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
    """Experts read in the `first` tokens after `learn`: from nothing, with the frequencies of the
    tokens before, and with their hottest experts in the slots too, which are `before` reads."""

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
    """name -> the hit rate for each number of slots."""
    k = len(layers[0][0])
    found: dict[str, list[float]] = {}
    for slots in sizes:
        for name, make in policies(slots, experts, warm).items():
            found.setdefault(name, []).append(round(hit_rate(layers, warm, make), 4))
        found.setdefault("uneven", []).append(
            round(uneven(layers, warm, slots, experts, min(slots, k + 2)), 4)
        )
        print(slots, {name: rates[-1] for name, rates in found.items()}, flush=True)
    return found


def slots_of(budget: float, layers: int, experts: int) -> int:
    left = budget - DENSE_NBYTES - WORKING_NBYTES
    return min(experts, int(left // (layers * EXPERT_NBYTES)))


def plot(path: Path, title: str, label: str, x: Sequence, found: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "flashmoe"  # the same picture for the same numbers
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, rates in found.items():
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
        "--tokens", type=int, default=400, help="drawn for the 397B, half to warm up"
    )
    parser.add_argument("--plot", type=Path, help="directory for the SVG files; needs matplotlib")
    args = parser.parse_args()

    layers, prompt, experts = read_trace(TRACES / "qwen3-30b-a3b.route.csv.gz")
    warm = prompt + (len(layers[0]) - prompt) // 2
    sizes = [8, 12, 16, 24, 32, 48, 64, 96]
    trace = curves(layers, experts, warm, sizes)
    result = {"30b trace": {"k": len(layers[0][0]), "slots": sizes, "hit_rate": trace}}
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
        found = curves(drawn, shares.shape[1], args.tokens // 2, list(fits.values()))
        result[f"397b K={k}"] = {"gb": list(fits), "slots": list(fits.values()), "hit_rate": found}
        if args.plot:
            title = f"Qwen3.5-397B, drawn by measured frequencies, K={k} of 512 experts"
            plot(args.plot / f"replay-397b-k{k}.svg", title, "memory budget, GB", list(fits), found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
