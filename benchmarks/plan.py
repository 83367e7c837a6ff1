"""Compare the predictions of `flashmoe plan` with published speeds, and with runs here.

    python benchmarks/synth.py /tmp/synth --layers 4 --experts 256
    python benchmarks/plan.py /tmp/synth            # both, some 5 minutes
    python benchmarks/plan.py                       # what was published, and the table of Macs

Published: danveloper/flash-moe, Qwen3.5-397B-A17B at 4 bits on an M3 Max of 48 GB. Its engines
differ from flashmoe: the page cache, or an LRU cache in front of it, holds the experts, and they
compute nothing while they read. So each engine has its own `speed_model.Costs` for the same
formula, from parts that its authors published (the time of a layer without reads, bandwidths). No
constant is fitted to the tokens per second that are predicted. Hit rates are those of LRU on the
frequencies of replay.py.

Here: each case runs the code of `flashmoe plan`, then the real engine (streaming.py) in a memory
cgroup of the same size, then the plan again. The mean of both plans is compared with the run, in
case the disk drifts; the result has both. Tokens and routers of the checkpoint are random, so the
plan assumes uniform routing. But random routers are a little uneven, so `off` compares the run with
the same formula at the hit rate of the run's own routing, replayed through the slots alone
(`off_uniform`: at the hit rate of uniform routing). `off_own_disk` also uses the bandwidth of the
disk while the run was reading: if it is small and `off` is not, then the disk changed between plan
and run, and the formula is right. All of these are predicted / measured - 1.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import runs
import synth
from policies import LRU
from replay import EXPERT_NBYTES, TRACES, draw, hit_rate, read_frequencies

import streaming

VOCABULARY = 248_320
CASES = ("memory=2GB", "memory=3GB", "memory=4GB", "memory=4GB k=4", "memory=6GB", "memory=10GB")
MACS = (
    *("m1-max-64gb", "m2-max-96gb", "m3-pro-36gb", "m3-max-48gb", "m3-max-128gb", "m4-24gb"),
    *("m4-pro-48gb", "m4-max-64gb", "m4-max-128gb", "m5-max-128gb", "m3-ultra-256gb"),
    "m3-ultra-512gb",
)


@dataclass(frozen=True)
class Published:
    """A published speed, and the published parts that predict it.

    Attributes:
        what: the engine.
        tokens_per_second: the published speed.
        k: experts per token.
        cache_nbytes: bytes of experts that are cached.
        layer_ms: time of a layer without its reads.
        disk_gb_s, cached_gb_s: bandwidth of reads that miss the cache, and that hit it.
        source: where the parts are from.
    """

    what: str
    tokens_per_second: float
    k: int
    cache_nbytes: float
    layer_ms: float
    disk_gb_s: float
    cached_gb_s: float
    source: str


PAGE_CACHE = 35e9
_C = "layer: its pipeline table; disk: cold reads by 4 threads; cache: warm reads"
_MLX = "results.tsv: "
PUBLISHED = (
    # 1.22 + 0.01 + 0.55 + 0.003 + 0.04 ms; the better kernel takes 12 % of the GPU's part.
    Published("C and Metal, first kernel", 3.90, 4, PAGE_CACHE, 1.823, 5.5, 32, _C),
    Published("C and Metal", 4.36, 4, PAGE_CACHE, 1.611, 5.5, 32, f"{_C}; kernel 12 % faster"),
    Published(
        *("MLX prototype, packed files", 3.14, 4, 0, 97 / 60, 7.05, inf),
        _MLX + "compute 97 ms; 6.6 to 7.5 GB/s from packed files, what the page cache has included",
    ),
    Published(
        *("MLX prototype, page cache", 1.20, 10, 0, 183 / 60, 5.3, inf),
        _MLX + "mx.eval 183 ms; 5.3 GB/s from scattered files, what the page cache has included",
    ),
    Published(
        *("MLX prototype, mmap and 20 GB of LRU", 1.03, 10, 20e9, 224 / 60, 3.5, inf),
        _MLX + "mx.eval 224 ms; 3.5 GB/s",
    ),
    Published(
        *("MLX prototype, mmap and 28 GB of LRU", 1.32, 10, 28e9, 224 / 60, 3.5, inf),
        _MLX + "mx.eval 224 ms; 3.5 GB/s",
    ),
)


@contextmanager
def hollow(layers: int = 60, experts: int = 512) -> Iterator[Path]:
    """Yield a checkpoint in the size of the 397B, with a hole in the file instead of weights."""
    from flashmoe.checkpoint.safetensors_writer import encode_header, split_into_shards

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        tensors = list(synth.plan(layers, experts, VOCABULARY, 4, 64))
        for name, part in split_into_shards(tensors).items():
            with open(path / name, "wb") as f:
                f.write(encode_header(part))
                f.truncate(f.tell() + sum(t.nbytes for t in part))
        config = synth.config(layers, experts, VOCABULARY, 4, 64, 10)
        (path / "config.json").write_text(json.dumps(config))
        yield path


def published(path: Path) -> list[dict]:
    """Predict the published speeds for the checkpoint of `hollow`."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.plan.speed_model import Costs, Geometry, decode_step

    model = Geometry.from_checkpoint(Checkpoint.open(path))
    assert model.expert_nbytes == EXPERT_NBYTES
    shares = read_frequencies(TRACES / "qwen3.5-397b.freq")
    drawn = {k: draw(shares, 300, k) for k in (4, 10)}
    rows = []
    for row in PUBLISHED:
        hits = 0.0
        if row.cache_nbytes:
            slots = int(row.cache_nbytes / EXPERT_NBYTES / model.layers)
            hits = hit_rate(drawn[row.k], 150, lambda layer, n=slots: LRU(n, shares.shape[1]))
        costs = Costs(
            weights_gb_s=inf,  # the time of a layer includes it
            layer_seconds=row.layer_ms / 1e3,
            disk_gb_s=row.disk_gb_s,
            prompt_gflops=inf,
            cached_gb_s=row.cached_gb_s,
            overlap=False,
        )
        step = decode_step(model, costs, row.k, hits)
        rows.append(
            {
                "what": row.what,
                "k": row.k,
                "published": row.tokens_per_second,
                "predicted": round(step.tokens_per_second, 3),
                "off": round(step.tokens_per_second / row.tokens_per_second - 1, 3),
                "hit_rate": round(hits, 3),
                "bound": step.bound,
                "source": row.source,
            }
        )
    return rows


def macs(path: Path) -> list[dict]:
    """Predict the speed of the 397B on MACS, with the trained K and with K=4."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.errors import BudgetError
    from flashmoe.plan.estimate import PlanOptions, estimate_speed, split_memory
    from flashmoe.plan.machines import find_machine

    checkpoint = Checkpoint.open(path)
    rows = []
    for name in MACS:
        mac = find_machine(name)
        row: dict = {"machine": name}
        for k in (10, 4):
            options = PlanOptions(experts=k)
            try:
                split = split_memory(checkpoint, options, mac)
            except BudgetError:
                row |= {f"k{k}": None}
                continue
            speed = estimate_speed(checkpoint, options, split, mac.costs)
            row["slots"] = split.slots
            row[f"k{k}"] = {
                "tokens_per_second": round(speed.token.tokens_per_second, 2),
                "hit_rate": round(speed.hit_rate, 3),
                "first_token_seconds": round(speed.prompt.seconds, 1),
                "bound": speed.token.bound,
            }
        rows.append(row)
    return rows


def planned(args: argparse.Namespace, case: dict) -> dict:
    """Plan for this process, with code of `flashmoe plan`."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.plan import speed_probe
    from flashmoe.plan.estimate import PlanOptions, estimate
    from flashmoe.plan.report import render_json
    from flashmoe.plan.sources import Source

    if args.probe_seconds is not None:
        speed_probe.STEPS_SECONDS = speed_probe.DISK_SECONDS = args.probe_seconds
    options = PlanOptions(
        experts=case["k"], memory=case["memory"], prompt=args.prompt, routing="uniform"
    )
    checkpoint = Checkpoint.open(args.path)
    report = render_json(estimate("", checkpoint, Source(args.path), options))
    if report["why_not"]:
        raise SystemExit(report["why_not"])
    return {
        "slots": report["memory"]["slots"],
        "hit_rate": report["routing"]["hit_rate"],
        "step": report["token"]["seconds"],
        "bound": report["token"]["bound"],
        "first_token": report["prompt"]["seconds"],
        "costs": report["costs"],
    }


def ran(args: argparse.Namespace, case: dict) -> dict:
    """Run streaming.py's measurement; add the GB/s of the disk while it was read in decode."""
    from timeline import Recorder, busy

    from flashmoe.ops import backend as ops

    recorder = Recorder()
    with recorder.recording(ops.pick()):
        report = streaming.child(args, case)
    reads = [s for s in recorder.spans if s.kind == "read"]
    end, seconds = max(s.end for s in reads), args.steps / report["cold"]["tokens_per_second_mean"]
    reading = busy(reads, end - seconds, end)
    nbytes = report["cold"]["bytes_per_token"] * args.steps
    return report | {"reading_gb_s": nbytes / reading / 1e9 if reading else None}


def replayed(args: argparse.Namespace, plan: dict, k: int, hits: float, disk_gb_s=None) -> float:
    """Return the seconds of a step by the costs of a plan, at this hit rate and disk speed."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.plan.speed_model import Costs, Geometry, decode_step

    model = Geometry.from_checkpoint(Checkpoint.open(args.path))
    costs = Costs(**{name: inf if v is None else v for name, v in plan["costs"].items()})
    if disk_gb_s:
        costs = replace(costs, disk_gb_s=disk_gb_s)
    return decode_step(model, costs, k, hits, context=args.prompt).seconds


def here(args: argparse.Namespace, case: dict) -> dict:
    """Measure one case: plan, run, plan."""
    limit = runs.nbytes(case["limit"])

    def child(what: str) -> dict:
        command = [sys.executable, __file__, str(args.path), "--child", json.dumps([what, case])]
        for name in ("prompt", "steps", "seed", "raw_seconds", "probe_seconds"):
            if getattr(args, name) is not None:
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        return runs.run(command, limit=limit, keep=args.keep_cache)

    before, run, after = child("plan"), child("run"), child("plan")
    cold, both = run["cold"], (before, after)

    def mean(seconds: Callable[[dict], float]) -> float:
        return sum(map(seconds, both)) / 2

    k, hits = run["experts"], cold["expected_hit_rate"]
    step, first = mean(lambda p: p["step"]), mean(lambda p: p["first_token"])
    same = mean(lambda p: replayed(args, p, k, hits))
    same_disk = mean(lambda p: replayed(args, p, k, hits, run["reading_gb_s"]))
    measured = cold["tokens_per_second_mean"]
    return {
        "k": k,
        "slots": run["slots"],
        "slots_planned": before["slots"],
        "hit_rate": cold["hit_rate"],
        "hit_rate_replayed": hits,
        "hit_rate_uniform": round(before["hit_rate"], 4),
        "measured": measured,
        "predicted": round(1 / same, 3),
        "off": round(1 / same / measured - 1, 3),
        "off_own_disk": round(1 / same_disk / measured - 1, 3),
        "off_uniform": round(1 / step / measured - 1, 3),
        "bound": before["bound"],
        "first_token": cold["time_to_first_token"],
        "first_token_predicted": round(first, 2),
        "first_token_off": round(first / cold["time_to_first_token"] - 1, 3),
        "cores_of_others": cold["cores_of_others"],
        "raw_gb_s": run.get("raw_gb_s"),
        "reading_gb_s": run["reading_gb_s"],
        "plans": both,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        parents=[streaming.options("?")],
    )
    parser.add_argument("--case", action="append", help='such as "memory=3GB k=4"')
    parser.add_argument(
        "--room", default="1GB", help="limit of the cgroup minus the memory, or none"
    )
    parser.add_argument("--probe-seconds", type=float, help="seconds of each probe of the plan")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.set_defaults(prompt=128, steps=32, io="direct", raw_seconds=1.0)
    args = parser.parse_args()
    args.warm = False
    if args.child:
        what, case = json.loads(args.child)
        print(json.dumps({"plan": planned, "run": ran}[what](args, case)))
        return
    result: dict = {"benchmark": "plan"}
    with hollow() as path:
        result |= {"published": published(path), "macs": macs(path)}
    if args.path is not None:
        cases = {}
        for text in args.case or CASES:
            case = streaming.parse_case(text, streaming.base_case(args))
            room = runs.nbytes(args.room)
            case["limit"] = None if room is None else runs.nbytes(case["memory"]) + room
            cases[text] = case
        result["here"] = runs.alternated(cases, args.rounds, lambda case: here(args, case))
    for row in result["published"]:
        print(
            f"{row['what']}, K={row['k']}: predicted {row['predicted']} tokens/s, "
            f"published {row['published']}, {row['off']:+.0%}"
        )
    for name, row in result.get("here", {}).items():
        print(
            f"{name}: predicted {row['predicted']} tokens/s, measured {row['measured']}, "
            f"{row['off']:+.0%}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
