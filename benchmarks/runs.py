"""What the benchmarks of whole models share: tokens, processes under a limit, cases, medians.

Knows neither flashmoe nor MLX, so that llama.cpp's benchmark runs without them.

The cgroup is of version 1 and needs root. Everything that its process holds counts against the
limit: its memory, and the pages of files that it reads through the page cache. Pages that were
cached before would be free of charge, so a run under a limit begins with an empty page cache.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

CGROUPS = Path("/sys/fs/cgroup/memory")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def nbytes(size: str | int | None) -> int | None:
    """Bytes of a size such as "4GB" (4 * 10**9) or "800MB"; of "none", None."""
    if size in (None, "none"):
        return None
    text = str(size)
    match = re.fullmatch(r"([0-9.]+)(GB|MB|)", text)
    if match is None:
        raise SystemExit(f"{text!r} is no size: write 4GB, 800MB, bytes or none")
    return int(float(match[1]) * {"GB": 10**9, "MB": 10**6, "": 1}[match[2]])


def tokens(file: Path | None, count: int, vocab: int, seed: int) -> list[int]:
    """The first `count` ids of a file of numbers between white space, or drawn ones."""
    if file is None:
        return np.random.default_rng(seed).integers(0, vocab, count).tolist()
    ids = [int(word) for word in file.read_text().split()]
    if len(ids) < count:
        raise SystemExit(f"{file} has {len(ids)} tokens, {count} are needed: ask for fewer")
    if not all(0 <= i < vocab for i in ids[:count]):
        raise SystemExit(f"{file} has ids beyond the vocabulary of {vocab}")
    return ids[:count]


def can_limit() -> bool:
    """Whether this process may make cgroups."""
    return os.access(CGROUPS, os.W_OK)


def can_drop() -> bool:
    """Whether this process may drop the page cache."""
    return os.access(DROP_CACHES, os.W_OK)


def run(command: Sequence[str], *, limit: int | None, keep: bool = False) -> dict:
    """Run a command that ends with one JSON line; that line. What it prints else goes to stderr.

    With a limit the line also has the most that the cgroup held and how often it met its limit,
    which costs nothing as long as there are pages of files to drop.

    Args:
        limit: bytes of the cgroup; None: no cgroup.
        keep: leave the page cache as it is. Else it is dropped, if that is allowed.
    """
    if cold := can_drop() and not keep:
        subprocess.run(["sync"], check=True)
        DROP_CACHES.write_text("3")
    group = CGROUPS / f"flashmoe-{os.getpid()}"
    if limit is not None:
        if not can_limit():
            raise SystemExit(f"a limit needs root and {CGROUPS}: try without one")
        group.mkdir()
    try:
        if limit is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        process = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=None if limit is None else lambda: _join(group),
        )
        *rest, last = process.stdout.splitlines() or [""]
        print(*rest, sep="\n", end="\n" * bool(rest), file=sys.stderr)
        if process.returncode:
            raise SystemExit(f"{command[1]} ended with {process.returncode}")
        result = json.loads(last) | {"page_cache_dropped": cold}
        if limit is not None:
            result["cgroup_limit"] = limit
            result["cgroup_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
            result["cgroup_failcnt"] = int((group / "memory.failcnt").read_text())
    finally:
        if limit is not None:
            group.rmdir()
    return result


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


class Usage:
    """What this process used since this was made, and what others took meanwhile."""

    def __init__(self):
        self._before = self._now()

    @staticmethod
    def _now() -> np.ndarray:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        lines = Path("/proc/self/io").read_text().splitlines()
        disk = dict(line.split(": ") for line in lines)
        # user, nice, system, idle, iowait, irq, softirq, steal: of all cores.
        ticks = np.array(Path("/proc/stat").read_text().split()[1:9], float)
        busy = (ticks.sum() - ticks[3:5].sum()) / os.sysconf("SC_CLK_TCK")
        cpu = usage.ru_utime + usage.ru_stime
        return np.array([perf_counter(), cpu, busy, usage.ru_majflt, int(disk["read_bytes"])])

    def so_far(self) -> dict:
        """seconds; cpu: seconds of cores; others: cores that all else took, on average (near 0 on
        an idle machine, whose figures can be trusted); faults: pages that it waited for a disk for;
        disk_bytes: what the disk gave for it, read ahead or not."""
        seconds, cpu, busy, faults, disk = self._now() - self._before
        return {
            "seconds": seconds,
            "cpu": cpu,
            "others": round(max(0.0, busy - cpu) / seconds, 2),
            "faults": int(faults),
            "disk_bytes": int(disk),
        }


def swapped() -> int:
    """Bytes of this process that are in swap."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmSwap:\s+([0-9]+) kB", status, re.M)[1]) * 1024


def alternated(cases: dict[str, Any], rounds: int, measure: Callable[[Any], dict]) -> dict:
    """name -> medians over the rounds. Each round measures each case once, so that a machine that
    drifts, or that others use, does so under all of them."""
    found: dict[str, list[dict]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, case in cases.items():
            found[name].append(measure(case))
            print(f"round {turn + 1}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr)
    return {name: medians(results) for name, results in found.items()}


def medians(results: Sequence[Any]) -> Any:
    """Of equally built results, the same with the median at each number."""
    first = results[0]
    if isinstance(first, dict):
        return {key: medians([r[key] for r in results]) for key in first}
    if isinstance(first, bool) or not isinstance(first, int | float):
        return first
    middle = median(results)
    return round(middle) if isinstance(first, int) else round(middle, 4)


def figure():
    """(figure, axes) of a plot; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "flashmoe"  # the same picture for the same numbers
    return plt.subplots(figsize=(7, 4.5))


def save(figure, axes, path: Path) -> None:
    """Write a plot as SVG."""
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
