"""Measure the memory of this machine and of this process, in bytes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from .. import macos

#: What a machine keeps for itself when no budget is given: at least this much, and a tenth.
_RESERVE = 10**9

#: The share of Metal's recommended working set beyond which MLX keeps no buffers for reuse (from
#: 0.95 on), and soon after which work fails.
WORKING_SET_SHARE = 0.9

_V1_LIMITS = ("memory.limit_in_bytes",)
_V2_LIMITS = ("memory.max", "memory.high")


def available_by_limit() -> dict[str, int]:
    """Return the bytes left of the "machine" and under the tightest "cgroup" limit (Linux only).

    The key "cgroup" is missing when no memory cgroup limits this process.
    """
    meminfo = _fields(Path("/proc/meminfo").read_text())
    left = {"machine": meminfo["MemAvailable:"] * 1024}
    limits = list(_left_in_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")))
    return left | ({"cgroup": min(limits)} if limits else {})


def available() -> int:
    """Return the bytes that this process may still take before the system swaps or kills.

    Linux: MemAvailable, or what the tightest memory cgroup (v1 or v2) around this process leaves.
    macOS: the free, purgeable and file-backed pages, as `vm_stat` counts them.
    """
    if sys.platform == "darwin":
        import subprocess  # late: importing it takes 10 ms

        return _left_by_vm_stat(subprocess.check_output(["/usr/bin/vm_stat"], text=True))
    return max(0, min(available_by_limit().values()))


def default_budget(free: int) -> int:
    """Return how many of `free` bytes a process takes when it was not told a budget."""
    return max(0, free - max(_RESERVE, free // 10))


def default_total(base: int, working_set: int | None = None) -> int:
    """Return the bytes of a process that was not told a budget, with the `base` that it holds.

    A Mac that gives away nearly all of its memory slows down at once, or stops: there it is at
    most two thirds of the memory and WORKING_SET_SHARE of the working set, and half as much is
    taken of what is free when the system says that memory is short.

    Args:
        working_set: bytes that Metal recommends to use at most, on a Mac's GPU.
    """
    free = available()
    if sys.platform != "darwin":
        return base + default_budget(free)
    if macos.pressure() >= macos.PRESSURE_WARNING:
        free //= 2
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 2 // 3]
    if working_set is not None:
        limits.append(int(working_set * WORKING_SET_SHARE))
    return max(base, min(base + default_budget(free), *limits))


def resident() -> int:
    """Return the bytes of memory that this process holds now.

    On macOS this is its footprint, which counts the memory of the GPU as well.
    """
    if sys.platform == "darwin":
        return macos.footprint()[0]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the most bytes of memory that this process has held so far."""
    if sys.platform == "darwin":
        return macos.footprint()[1]
    # Not getrusage: on Linux its figure starts from what the parent held at the fork.
    status = Path("/proc/self/status").read_text()
    high_water = re.search(r"^VmHWM:\s+([0-9]+) kB", status, re.MULTILINE)
    assert high_water is not None, "Linux has VmHWM in the status of each process"
    return int(high_water[1]) * 1024


def trim() -> None:
    """Give memory that was freed back to the system, where the allocator keeps it (glibc)."""
    release = _malloc_trim()
    if release is not None:
        release(0)


@cache
def _malloc_trim() -> Any:
    if sys.platform != "linux":
        return None
    # Other allocators and other C libraries have no such function.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _fields(text: str) -> dict[str, int]:
    """Parse lines such as "name 12" or "name: 12 kB" of a file in /proc or of a cgroup."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines())}


def _left_in_cgroups(membership: str, mount: Path) -> Iterator[int]:
    """Yield the bytes left under each memory limit around this process.

    In a container the groups above may be out of sight, or its own group may be the mount itself:
    then the walk up finds fewer directories.

    Args:
        membership: the text of /proc/self/cgroup.
        mount: where the cgroup file systems are mounted.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        limits: tuple[str, ...]
        if controllers == "":  # v2
            top, limits, usage = mount, _V2_LIMITS, "memory.current"
            idle = "inactive_file"
        elif "memory" in controllers.split(","):
            top, limits, usage = mount / "memory", _V1_LIMITS, "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for here in (top / group, *(top / parent for parent in group.parents)):
            texts = [(here / name).read_text().strip() for name in limits if (here / name).exists()]
            caps = [int(text) for text in texts if text != "max"]
            if caps:
                # File pages that nobody used of late go before anything is swapped.
                unused = _fields((here / "memory.stat").read_text())[idle]
                yield min(caps) - int((here / usage).read_text()) + unused


def _left_by_vm_stat(text: str) -> int:
    """Return the bytes of free, purgeable and file-backed pages in the output of `vm_stat`."""
    size = re.search(r"page size of ([0-9]+) bytes", text)
    if size is None:
        raise RuntimeError(f"vm_stat printed no page size: {text[:80]!r}")
    count = {
        name: int(n) for name, n in re.findall(r'^"?([^":]+)"?:\s+([0-9]+)\.', text, re.MULTILINE)
    }
    pages = count["Pages free"] + count["Pages purgeable"] + count["File-backed pages"]
    return int(size[1]) * pages
