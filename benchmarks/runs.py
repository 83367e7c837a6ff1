"""Help the benchmarks of whole models: tokens, processes under a limit, rounds, medians.

This module imports neither flashmoe nor MLX, so that llama.cpp's benchmark runs without them.

The cgroup is of version 1 and needs root. Everything that its process holds counts against the
limit: its memory, and the pages of files that it reads through the page cache. Pages that were in
the page cache before would not count, so a run under a limit begins with an empty page cache.
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
    """Return the bytes of a size such as "4GB" (4 * 10**9) or "800MB"; None for "none"."""
    if size in (None, "none"):
        return None
    text = str(size)
    match = re.fullmatch(r"([0-9.]+)(GB|MB|)", text)
    if match is None:
        raise SystemExit(f"{text!r} is not a size: write 4GB, 800MB, a number of bytes, or none.")
    return int(float(match[1]) * {"GB": 10**9, "MB": 10**6, "": 1}[match[2]])


def tokens(file: Path | None, count: int, vocab: int, seed: int) -> list[int]:
    """Return the first `count` ids of a file, which white space separates, or random ids."""
    if file is None:
        return np.random.default_rng(seed).integers(0, vocab, count).tolist()
    ids = [int(word) for word in file.read_text().split()]
    if len(ids) < count:
        raise SystemExit(
            f"{file} has {len(ids)} tokens, {count} are needed: pass a longer file, "
            "or run fewer tokens."
        )
    if not all(0 <= i < vocab for i in ids[:count]):
        raise SystemExit(f"{file} has ids beyond the vocabulary of {vocab}: pass ids of this model")
    return ids[:count]


def can_limit() -> bool:
    """Return whether this process may make cgroups."""
    return os.access(CGROUPS, os.W_OK)


def can_drop() -> bool:
    """Return whether this process may drop the page cache."""
    return os.access(DROP_CACHES, os.W_OK)


def run(command: Sequence[str], *, limit: int | None, keep: bool = False) -> dict:
    """Run a command that prints one JSON line at its end, and return that line.

    Its other output goes to stderr. With a limit, the result also has the peak of the cgroup and
    how often it reached its limit, which costs nothing as long as it has pages of files to drop.

    Args:
        limit: bytes of the cgroup; None: no cgroup.
        keep: leave the page cache as it is. Otherwise it is dropped, if that is allowed.

    Raises:
        SystemExit: the command failed, or a limit is not possible here.
    """
    if cold := can_drop() and not keep:
        subprocess.run(["sync"], check=True)
        DROP_CACHES.write_text("3")
    group = CGROUPS / f"flashmoe-{os.getpid()}"
    if limit is not None:
        if not can_limit():
            raise SystemExit(f"A limit needs root and {CGROUPS}: run without one (none).")
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
            raise SystemExit(f"{command[1]} ended with status {process.returncode}.")
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
    """Measures what this process used since the object was made, and what others used."""

    def __init__(self):
        self._before = self._now()

    @staticmethod
    def _now() -> np.ndarray:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        lines = Path("/proc/self/io").read_text().splitlines()
        disk = dict(line.split(": ") for line in lines)
        # user, nice, system, idle, iowait, irq, softirq, steal: sums over all cores.
        ticks = np.array(Path("/proc/stat").read_text().split()[1:9], float)
        busy = (ticks.sum() - ticks[3:5].sum()) / os.sysconf("SC_CLK_TCK")
        cpu = usage.ru_utime + usage.ru_stime
        return np.array([perf_counter(), cpu, busy, usage.ru_majflt, int(disk["read_bytes"])])

    def so_far(self) -> dict:
        """Return what was used so far.

        seconds: wall-clock time. cpu: core seconds of this process. others: cores that everything
        else took on average; near 0 on an idle machine, whose figures can be trusted. faults: page
        faults that waited for a disk. disk_bytes: bytes that the disk read for this process, with
        what the kernel read ahead.
        """
        seconds, cpu, busy, faults, disk = self._now() - self._before
        return {
            "seconds": seconds,
            "cpu": cpu,
            "others": round(max(0.0, busy - cpu) / seconds, 2),
            "faults": int(faults),
            "disk_bytes": int(disk),
        }


def swapped() -> int:
    """Return the bytes of this process that are in swap."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^VmSwap:\s+([0-9]+) kB", status, re.M)
    assert match is not None, "the kernel writes this line for every process"
    return int(match[1]) * 1024


def alternated(cases: dict[str, Any], rounds: int, measure: Callable[[Any], dict]) -> dict:
    """Measure each case in each round; return the medians over the rounds, by name of the case.

    The cases alternate, so that a machine that drifts, or that others use, affects all of them.
    """
    results: dict[str, list[dict]] = {name: [] for name in cases}
    for number in range(1, rounds + 1):
        for name, case in cases.items():
            results[name].append(measure(case))
            print(f"round {number}, {name}: {json.dumps(results[name][-1])}", file=sys.stderr)
    return {name: medians(rows) for name, rows in results.items()}


def medians(results: Sequence[Any]) -> Any:
    """Return the median of each number of results that have the same structure."""
    first = results[0]
    if isinstance(first, dict):
        return {key: medians([r[key] for r in results]) for key in first}
    if isinstance(first, bool) or not isinstance(first, int | float):
        return first
    middle = median(results)
    return round(middle) if isinstance(first, int) else round(middle, 4)


def figure():
    """Return the figure and the axes of a new plot; needs matplotlib."""
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
