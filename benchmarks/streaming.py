"""Measure streaming in a process that may hold only a part of the model, and where time goes.

    python benchmarks/synth.py /tmp/synth --layers 4 --experts 256
    python benchmarks/streaming.py /tmp/synth --limit 4GB --memory 3.2GB --rounds 5 \\
        --case io=buffered --case io=uncached --case "io=direct depth=16"

Each case runs in a process of its own, in a cgroup with the limit (the page cache counts too),
after the page cache was dropped; the cases alternate, and figures are medians over the rounds. A
case may set memory, k, io, depth, limit, or any other setting of `load_streaming` by its name.

A run loads the model, prefills a prompt with the project's own code, and decodes given tokens, so
that each run computes the same:

    cold    the first run: slots and page cache are empty, the compiled kernels come from disk
    warm    (--warm) the same tokens once more in the same process, with a new prompt cache: slots
            hold the experts that the first run left, the page cache what the limit allows

The figures of a run, and the physics behind them:

    time_to_first_token       seconds for the prompt and one step. The prompt needs each expert that
                              any of its tokens chose, once: union_bytes. If prefill_bytes is more,
                              the difference was read again for a later chunk
    tokens_per_second         1 / median step (_mean: 1 / mean step). A step takes compute_ms (dense
                              weights and K experts of each layer; slower while reads take the same
                              cores) and wait_ms, in which it had nothing to compute
    bytes_per_token           layers * K * (1 - hit_rate) * bytes of an expert
    hit_rate                  random tokens through random routers hit at slots / experts with any
                              policy; real routing is more uneven and hits more often.
                              expected_hit_rate: this routing replayed through the slots alone
    cores_of_others           cores that other processes took: trust figures when it is near 0
    disk_share                bytes_per_token / step / raw_gb_s: 1 when the disk never rests
    raw_gb_s                  bandwidth of the same reads when nothing is computed (see disk.py),
                              measured in the same process before loading and after the runs

Tokens come from a file of ids, or are random. The last line is JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

import disk
import runs

DEFAULTS = {"memory": None, "k": None, "io": "buffered", "depth": 8, "limit": None}


def parse_case(text: str, base: dict) -> dict:
    """Return the settings of `base`, changed by a text such as "io=direct depth=16"."""
    case = dict(base)
    for setting in text.split():
        name, separator, value = setting.partition("=")
        if not separator:
            raise SystemExit(f"{setting!r} is not a setting: write name=value.")
        case[name] = _value(value)
    return case


def _value(text: str) -> object:
    words = {"none": None, "true": True, "false": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def load(path: Path, case: dict):
    """Load a checkpoint with the settings of a case."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.models.loading import load_streaming

    settings = {k: v for k, v in case.items() if k not in ("limit", "k")}
    return load_streaming(Checkpoint.open(path), experts=case["k"], **settings)


def measure(model, prompt: list[int], forced: list[int]) -> dict:
    """Prefill the prompt, decode the forced tokens, and return the figures."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from routing import Routing

    from flashmoe.models.layerwise import prefill, split

    expert_nbytes = next(iter(model.checkpoint.expert_layers.values())).expert_nbytes
    cache = make_prompt_cache(model)
    seconds, waits = [], []

    def step(token: int) -> None:
        waited, start = model.stats.reads.wait_seconds, time.perf_counter()
        mx.eval(model.next_logits([token], cache), [c.state for c in cache])
        seconds.append(time.perf_counter() - start)
        waits.append(model.stats.reads.wait_seconds - waited)

    with Routing() as routing:
        before, start = model.stats, time.perf_counter()
        limit = model.elastic_slots.fit_prefill(len(prompt), [len(prompt)], model.experts)
        for _ in prefill(model, split(prompt, []), cache, limit=limit):
            pass
        prefill_seconds = time.perf_counter() - start
        read, union = model.stats - before, routing.distinct() * expert_nbytes
        # An engine does the same before it decodes an answer of this length.
        model.elastic_slots.fit_decoding([len(prompt) + len(forced)])
        step(forced[0])
        first = time.perf_counter() - start
        del seconds[:], waits[:]
        before, used = model.stats, runs.Usage()
        for token in forced[1:]:
            step(token)
        usage, stats = used.so_far(), model.stats - before
    steps = len(seconds)
    expected = routing.expected(
        model.elastic_slots.per_layer, model.checkpoint.num_experts, len(prompt) + 1
    )
    return {
        "time_to_first_token": round(first, 3),
        "prefill_tokens_per_second": round(len(prompt) / prefill_seconds, 2),
        "prefill_bytes": read.reads.bytes,
        "union_bytes": union,
        "prefill_wait_share": round(read.reads.wait_seconds / prefill_seconds, 3),
        "tokens_per_second": round(1 / median(seconds), 3),
        "tokens_per_second_mean": round(1 / mean(seconds), 3),
        "hit_rate": round(stats.hit_rate, 4),
        "expected_hit_rate": round(expected, 4),
        "bytes_per_token": stats.reads.bytes // steps,
        "disk_bytes_per_token": usage["disk_bytes"] // steps,
        "read_gb_s": round(stats.reads.bytes / sum(seconds) / 1e9, 3),
        "wait_ms": round(1e3 * mean(waits), 2),
        "compute_ms": round(1e3 * (mean(seconds) - mean(waits)), 2),
        "cpu_ms": round(1e3 * usage["cpu"] / steps, 1),
        "major_faults": usage["faults"],
        "cores_of_others": usage["others"],
    }


def child(args: argparse.Namespace, case: dict) -> dict:
    """Measure the disk, one or two runs, and the disk again, in this process."""

    def raw() -> float | None:
        return disk.bandwidth(disk.experts(args.path), case["depth"], args.raw_seconds)

    speeds = [raw()]
    from flashmoe.memory.system import peak

    start = time.perf_counter()
    model = load(args.path, case)
    report = {"load_seconds": round(time.perf_counter() - start, 2)}
    print(model.plan.describe(), file=sys.stderr)
    vocab = model.checkpoint.text_config["vocab_size"]
    ids = runs.tokens(args.tokens, args.prompt + args.steps + 1, vocab, args.seed)
    for name in ("cold", "warm") if args.warm else ("cold",):
        report[name] = measure(model, ids[: args.prompt], ids[args.prompt :])
    layers = model.checkpoint.expert_layers.values()
    report |= {
        "experts": model.experts,
        "needed_bytes": model.experts * sum(layer.expert_nbytes for layer in layers),
        "slots": model.elastic_slots.per_layer,
        "peak_rss": peak(),
        "swapped": runs.swapped(),
    }
    model.close()
    speeds.append(raw())
    if None not in speeds:
        before, after = (round(speed / 1e9, 3) for speed in speeds)
        report |= {"raw_gb_s_before": before, "raw_gb_s_after": after}
        report["raw_gb_s"] = round((before + after) / 2, 3)
        for name in ("cold", "warm") if args.warm else ("cold",):
            share = report[name]["read_gb_s"] / report["raw_gb_s"]
            report[name]["disk_share"] = round(share, 3)
    return report


def run_case(args: argparse.Namespace, case: dict) -> dict:
    """`child` in a process of its own, under the limit of the case."""
    command = [sys.executable, __file__, str(args.path), "--child", json.dumps(case)]
    command += ["--prompt", str(args.prompt), "--steps", str(args.steps)]
    command += ["--seed", str(args.seed), "--raw-seconds", str(args.raw_seconds)]
    command += ["--tokens", str(args.tokens)] if args.tokens else []
    command += ["--warm"] if args.warm else []
    return runs.run(command, limit=runs.nbytes(case["limit"]), keep=args.keep_cache)


def plot(path: Path, cases: dict[str, dict], which: str) -> None:
    """Draw a bar for each case: where a step goes, and the least time that its reads take."""
    figure, axes = runs.figure()
    passes = [case[which] for case in cases.values()]
    compute = [p["compute_ms"] for p in passes]
    names = [f"{n}\n{p['tokens_per_second']} tokens/s" for n, p in zip(cases, passes, strict=True)]
    axes.bar(names, compute, 0.5, label="computing")
    axes.bar(names, [p["wait_ms"] for p in passes], 0.5, compute, label="waiting for the disk")
    for place, case in enumerate(cases.values()):
        if "raw_gb_s" in case:
            least = case[which]["bytes_per_token"] / case["raw_gb_s"] / 1e6
            label = None if place else "missed bytes / raw bandwidth"
            axes.hlines(least, place - 0.35, place + 0.35, "black", "dashed", label=label)
    axes.set(ylabel="ms a token", title="Where a decode step goes")
    runs.save(figure, axes, path)


def options(path: str | None = None) -> argparse.ArgumentParser:
    """Return the options that batch.py, growth.py, timeline.py and plan.py have too.

    path: "?" where the checkpoint may be left out.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("path", type=Path, nargs=path, help="an MLX checkpoint")
    parser.add_argument("--k", type=int, help="experts per token, instead of the trained number")
    parser.add_argument("--io", default=DEFAULTS["io"])
    parser.add_argument("--depth", type=int, default=DEFAULTS["depth"], help="reads in flight")
    parser.add_argument(
        "--setting", action="append", default=[], help="name=value, passed to load_streaming"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument(
        "--steps", type=int, default=32, help="tokens to decode after the first one"
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        help="a file of ids that white space separates; random ids without it",
    )
    parser.add_argument("--seed", type=int, default=2, help="seed of random tokens")
    parser.add_argument("--raw-seconds", type=float, default=2.0)
    parser.add_argument("--keep-cache", action="store_true", help="do not drop the page cache")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write an SVG file; needs matplotlib")
    return parser


def base_case(args: argparse.Namespace, **more) -> dict:
    """Return the settings of the command line."""
    base = DEFAULTS | {"k": args.k, "io": args.io, "depth": args.depth} | more
    return parse_case(" ".join(args.setting), base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[options()])
    parser.add_argument("--limit", default="none", help="memory limit of the cgroup, such as 4GB")
    parser.add_argument("--memory", help="memory budget of flashmoe, such as 3.2GB")
    parser.add_argument("--case", action="append", help='settings such as "io=direct depth=16"')
    parser.add_argument(
        "--warm", action="store_true", help="run the same tokens again in the same process"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args, json.loads(args.child))))
        return
    base = base_case(args, memory=args.memory, limit=args.limit)
    cases = {text: parse_case(text, base) for text in args.case or [f"io={args.io}"]}
    results = runs.alternated(cases, args.rounds, lambda case: run_case(args, case))
    if args.plot:
        plot(args.plot, results, "warm" if args.warm else "cold")
    size = sum(f.stat().st_size for f in args.path.glob("*.safetensors"))
    result = {"benchmark": "streaming", "checkpoint": size, "rounds": args.rounds}
    result |= {"prompt": args.prompt, "steps": args.steps, "settings": base, "cases": results}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
