"""Measure decode with all experts in memory, against stock mlx-lm on the same machine.

    python benchmarks/synth.py /tmp/synth397 --layers 4 --experts 512
    python benchmarks/decode.py /tmp/synth397 [--activations float32 int8]

With 64 experts per layer instead of 512, the checkpoint has 2.1 GB instead of 15 GB. A token reads
as many bytes, since K and the shapes are the same.

The physics: a token with K experts per layer moves the dense weights and the K experts of each
layer through the cores once. In the 397B geometry (4 bits, group 64) an expert has 7.08 MB and the
dense weights of four layers have some 0.3 GB, so with a memory bandwidth of B a token cannot take
less than

    (dense + layers * K * 7.08 MB) / B.

The models do not fit into memory side by side, so each round runs one process for each of
flashmoe's activations and one for stock mlx-lm, one after the other; the figures are medians over
the rounds. Stock runs in the checkpoint's own bf16, and cast to float32. --no-stock leaves it out,
to compare two versions of flashmoe. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

PROMPT = 4


def seconds_a_token(model, tokens: list[int]) -> float:
    """Return the median seconds of a decode step with given tokens, after a short prompt."""
    cache = make_prompt_cache(model)

    def step(piece):
        mx.eval(model(mx.array([piece]), cache=cache), [c.state for c in cache])

    step(tokens[:PROMPT])
    times = []
    for token in tokens[PROMPT:]:
        start = time.perf_counter()
        step([token])
        times.append(time.perf_counter() - start)
    return median(times)


def random_tokens(count: int, vocab: int) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab, PROMPT + count).tolist()


def moe_blocks(model):
    return [layer.mlp for layer in model.layers if hasattr(layer.mlp, "switch_mlp")]


def run_flashmoe(path: Path, ks: list[int], count: int, activations: str) -> dict:
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.memory.system import peak
    from flashmoe.models.loading import load_streaming

    checkpoint = Checkpoint.open(path)
    vocab = checkpoint.text_config["vocab_size"]
    start = time.perf_counter()
    model = load_streaming(checkpoint, slots=checkpoint.num_experts, activations=activations)
    for block in moe_blocks(model):
        switch = block.switch_mlp
        for expert in range(checkpoint.num_experts):
            switch.load(expert, set())
        for expert in range(checkpoint.num_experts):
            switch.wait_for(expert)
    report = {"load_seconds": round(time.perf_counter() - start, 1)}
    tokens = random_tokens(count, vocab)
    seconds_a_token(model, tokens[: PROMPT + 2])  # compiles the kernels
    for k in ks:
        with model.pruned_to(k):
            report[f"k{k}"] = seconds_a_token(model, tokens)
    assert model.stats.loaded == 0, "an expert was not resident"
    report["dense_bytes"] = checkpoint.dense_nbytes
    report["expert_bytes"] = next(iter(checkpoint.expert_layers.values())).expert_nbytes
    report["layers"] = len(checkpoint.expert_layers)
    report["peak_bytes"] = peak()
    return report


def run_stock(path: Path, ks: list[int], count: int) -> dict:
    from mlx_lm.utils import load_model

    model, config = load_model(path)
    vocab = config["text_config"]["vocab_size"]
    report = {}
    for dtype in ("bfloat16", "float32"):
        if dtype == "float32":
            model.set_dtype(mx.float32)
            mx.eval(model.parameters())
        for k in ks:
            for block in moe_blocks(model):
                block.top_k = k
            steps = min(count, 2 if dtype == "bfloat16" else 4)
            report[f"{dtype}_k{k}"] = seconds_a_token(model, random_tokens(steps, vocab))
    return report


def child(path: Path, which: str, ks: list[int], count: int) -> dict:
    """Return the figures of one process.

    which: "stock", or flashmoe's activations.
    """
    command = [sys.executable, __file__, str(path), "--only", which, "--tokens", str(count)]
    command += ["--k", *map(str, ks)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The process of {which} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkpoint written by synth.py")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--tokens", type=int, default=30, help="tokens that flashmoe decodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--activations", nargs="+", default=["float32"], help="of flashmoe")
    parser.add_argument("--no-stock", action="store_true", help="do not run stock mlx-lm")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        given = args.path, args.k, args.tokens
        report = run_stock(*given) if args.only == "stock" else run_flashmoe(*given, args.only)
        print(json.dumps(report))
        return
    rounds = []
    for i in range(args.rounds):
        sides = (*args.activations, *(() if args.no_stock else ("stock",)))
        rounds.append({which: child(args.path, which, args.k, args.tokens) for which in sides})
        print(f"round {i + 1}: {rounds[-1]}", flush=True)
    result = {"benchmark": "decode", "rounds": args.rounds}
    for name in args.activations:
        ours = rounds[0][name]
        result[name] = {"peak_bytes": ours["peak_bytes"]}
        for k in args.k:
            fast = median(r[name][f"k{k}"] for r in rounds)
            moved = ours["dense_bytes"] + ours["layers"] * k * ours["expert_bytes"]
            row = {"ms": round(1000 * fast, 2), "weights_gb_s": round(moved / fast / 1e9, 2)}
            text = f"{name}, K={k}: {row['ms']} ms a token, {row['weights_gb_s']} GB/s of weights"
            for dtype in () if args.no_stock else ("bfloat16", "float32"):
                pairs = [(r["stock"][f"{dtype}_k{k}"], r[name][f"k{k}"]) for r in rounds]
                row[f"stock_{dtype}_ms"] = round(1000 * median(s for s, _ in pairs), 1)
                times = row[f"times_faster_than_{dtype}"] = round(
                    median(s / f for s, f in pairs), 1
                )
                text += f"; stock {dtype} {row[f'stock_{dtype}_ms']} ms ({times}x)"
            result[name][f"k{k}"] = row
            print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
