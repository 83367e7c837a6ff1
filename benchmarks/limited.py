"""Decode a checkpoint in a process that may hold only a part of its size.

    python benchmarks/synth.py /tmp/synth397 --layers 4 --experts 512
    python benchmarks/limited.py /tmp/synth397 --fraction 0.25

The process runs in a memory cgroup (v1, needs root) whose limit is that fraction of the checkpoint;
page cache counts against it. The budget given to flashmoe is a share of the limit, so that buffered
reads have pages to go through.

The physics: with random routing a slot hits with the probability slots / experts, so a token reads
layers * K * (1 - slots / experts) experts of 7.08 MB, and cannot be faster than that over the
bandwidth of the disk. Ends with one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

CGROUPS = Path("/sys/fs/cgroup/memory")


def run(path: Path, memory: int, tokens: int, k: int | None, io: str) -> dict:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.checkpoint import Checkpoint
    from flashmoe.loading import load_streaming
    from flashmoe.memory import peak

    checkpoint = Checkpoint.open(path)
    start = time.perf_counter()
    model = load_streaming(checkpoint, memory=memory, experts=k, io=io)
    found = {"load_seconds": round(time.perf_counter() - start, 2)}
    print(model.plan.describe(), file=sys.stderr)
    cache = make_prompt_cache(model)
    drawn = np.random.default_rng(2).integers(0, checkpoint.text_config["vocab_size"], tokens)

    def step(piece):
        mx.eval(model(mx.array([piece]), cache=cache), [c.state for c in cache])

    step(drawn[:2].tolist())
    before, times = model.stats, []
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    for token in drawn[2:].tolist():
        start = time.perf_counter()
        step([token])
        times.append(time.perf_counter() - start)
    stats = model.stats - before
    counters = Path("/proc/self/io").read_text().splitlines()
    disk = dict(line.split(": ") for line in counters)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {
        "experts": model.experts,
        "slots": model.plan.slots_per_layer,
        "tokens_per_second": round(1 / median(times), 3),
        "hit_rate": round(stats.hit_rate, 4),
        "bytes_per_token": stats.reads.bytes // len(times),
        "read_gb_s": round(stats.reads.bytes / sum(times) / 1e9, 3),
        "wait_share": round(stats.reads.wait_seconds / sum(times), 3),
        "disk_bytes": int(disk["read_bytes"]),
        "cpu_ms_per_token": round(1e3 * (usage.ru_utime + usage.ru_stime - cpu) / len(times), 1),
        "peak_rss": peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--fraction", type=float, default=0.25, help="limit / checkpoint size")
    parser.add_argument("--share", type=float, default=0.8, help="budget / limit")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--k", type=int)
    parser.add_argument("--io", default="buffered")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(run(args.path, args.memory, args.tokens, args.k, args.io)))
        return
    size = sum(f.stat().st_size for f in args.path.glob("*.safetensors"))
    limit = int(size * args.fraction)
    group = CGROUPS / f"flashmoe-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        # Only what is read in the group counts, so the cache must be cold.
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        command = [sys.executable, __file__, str(args.path), "--tokens", str(args.tokens)]
        command += ["--memory", str(int(limit * args.share)), "--io", args.io]
        command += ["--k", str(args.k)] if args.k else []
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the limited process ended with {process.returncode}")
        result = json.loads(out.splitlines()[-1])
        result["cgroup_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    print(json.dumps({"benchmark": "limited", "checkpoint": size, "limit": limit} | result))


if __name__ == "__main__":
    main()
