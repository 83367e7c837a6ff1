"""How much memory there is, and how a budget is split between dense weights, work and slots.

All sizes are bytes. Text uses decimal units, as drives and Apple's memory figures do.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from pathlib import Path, PurePosixPath

from ..errors import BudgetError, SettingError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*((?:[KMGT]I?)?)B?\s*", re.IGNORECASE)

# What a machine keeps for itself when no budget is given: at least this much, and a tenth.
_RESERVE = 10**9

_V1_LIMITS = ("memory.limit_in_bytes",)
_V2_LIMITS = ("memory.max", "memory.high")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "8GB" (8 * 10**9), "7.5GiB" or 800000000; `SettingError` else."""
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        nbytes = int(Decimal(match[1]) * _UNITS[match[2].upper()]) if match else 0
    else:
        nbytes = text if isinstance(text, int) and not isinstance(text, bool) else 0
    if nbytes < 1:
        raise SettingError(
            f'{text!r} is not a memory size: write it as "8GB", "7.5GiB", "800MB" or as bytes'
        )
    return nbytes


def format_size(nbytes: int) -> str:
    """`nbytes` for people, such as "7.1 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size * 0.99995:  # 999,960,000 is "1.0 GB", not "1000.0 MB"
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def rooms() -> dict[str, int]:
    """Linux: bytes that are left, of the "machine" and under the tightest limit of a "cgroup"."""
    meminfo = _fields(Path("/proc/meminfo").read_text())
    found = {"machine": meminfo["MemAvailable:"] * 1024}
    limits = list(_cgroup_rooms(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")))
    return found | ({"cgroup": min(limits)} if limits else {})


def available() -> int:
    """Bytes that this process may still take before the system swaps or kills.

    Linux: MemAvailable, or the room in the tightest memory cgroup (v1 or v2) around this process.
    macOS: the free, purgeable and file-backed pages, as `vm_stat` counts them.
    """
    if sys.platform == "darwin":
        import subprocess  # late: 10 ms

        return _vm_stat_room(subprocess.check_output(["/usr/bin/vm_stat"], text=True))
    return max(0, min(rooms().values()))


def spare(free: int) -> int:
    """Bytes of `free` ones that a process may take, when it was not told how many."""
    return max(0, free - max(_RESERVE, free // 10))


def resident() -> int:
    """Bytes of memory this process holds now (on macOS the same as `peak`)."""
    if sys.platform == "darwin":
        return peak()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most bytes of memory this process has held so far."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage: on Linux its figure starts from what the parent held at the fork.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+([0-9]+) kB", status, re.MULTILINE)[1]) * 1024


@dataclass(frozen=True)
class Plan:
    """How the memory of the process is split; all but the two counts are bytes.

    budget: what the process may hold at its peak. resident: what it held before loading.
    working: prefill scratch and KV cache. slot_nbytes: one slot in each of the `num_layers` MoE
    layers, summed. passing: the part of `working` that only a prompt takes, while it is read.
    least_slots, most_slots: of a layer; between them slots give way to prompts and come back.
    """

    budget: int
    resident: int
    dense: int
    working: int
    slots_per_layer: int
    num_layers: int
    slot_nbytes: int
    passing: int = 0
    least_slots: int = 0
    most_slots: int = 0

    @property
    def elastic(self) -> bool:
        """Whether the number of slots may change while the model is loaded."""
        return self.least_slots < self.most_slots

    @property
    def slots_nbytes(self) -> int:
        """Bytes of all slots of all layers."""
        return self.slots_per_layer * self.slot_nbytes

    @property
    def total(self) -> int:
        """Bytes of everything: the peak that is planned for."""
        return self.resident + self.dense + self.working + self.slots_nbytes

    def parts(self) -> str:
        """The terms of `total`, for people."""
        return (
            f"program {format_size(self.resident)} + dense weights {format_size(self.dense)} + "
            f"working memory {format_size(self.working)} + {self.slots_per_layer} slots x "
            f"{self.num_layers} layers x {format_size(self.slot_nbytes // self.num_layers)}"
        )

    def describe(self) -> str:
        """The plan in one line."""
        return f"memory {format_size(self.total)} of {format_size(self.budget)}: {self.parts()}"


def plan(
    *,
    budget: int | None,
    slots: int | None,
    base: int,
    dense: int,
    working: int,
    layer_slot_nbytes: list[int],
    num_experts: int,
    minimum: int,
    passing: int = 0,
    elastic: bool = False,
) -> Plan:
    """Split `budget` (bytes), giving to slots what nothing else needs; every layer gets as many.

    budget: for the peak of the whole process; None is what the machine can spare now.
    slots: slots per layer, cut to `num_experts`; None is as many as fit. Given without a budget,
        they are taken as asked, whatever the machine has.
    base: bytes the process holds already. layer_slot_nbytes: bytes of one slot of each MoE layer.
    minimum: the fewest slots per layer the model can run with.
    passing: the part of working that only a prompt takes. elastic: slots may be made fewer and more
        after loading, within the budget.
    Raises `BudgetError`, which says how much is needed.
    """
    minimum = min(minimum, num_experts)
    slot_nbytes = sum(layer_slot_nbytes)
    fixed = base + dense + working

    def with_slots(count: int, budget: int) -> Plan:
        layers = len(layer_slot_nbytes)
        return Plan(budget, base, dense, working, count, layers, slot_nbytes, passing)

    if slots is not None:
        if slots < minimum:
            raise BudgetError(
                f"{slots} slots per layer are too few: this model needs at least {minimum}; pass "
                f"slots={minimum} or more, or fewer experts with experts=K"
            )
        slots = min(slots, num_experts)
        if budget is None:
            return with_slots(slots, fixed + slots * slot_nbytes)
        needed = with_slots(slots, budget)
        if needed.total > budget:
            raise BudgetError(
                f"memory {format_size(budget)} is too small for {slots} slots per layer, which "
                f"need {format_size(needed.total)} ({needed.parts()}); pass "
                f'memory="{round_up(needed.total)}" or more, or fewer slots'
            )
        return needed

    named = f"memory {format_size(budget or 0)} is"
    if budget is None:
        budget = base + spare(available())
        named = f"the memory this machine can spare, {format_size(budget)}, is"
    fits = (budget - fixed) // slot_nbytes
    if fits < minimum:
        least = with_slots(minimum, budget)
        raise BudgetError(
            f"{named} too small: this model needs at least {format_size(least.total)} "
            f'({least.parts()}); pass memory="{round_up(least.total)}" or more, or fewer experts '
            "with experts=K"
        )
    found = with_slots(min(fits, num_experts), budget)
    if not elastic:
        return found
    most = min((budget - fixed + passing) // slot_nbytes, num_experts)
    return replace(found, least_slots=minimum, most_slots=most)


def round_up(nbytes: int) -> str:
    """A short size that `parse_size` reads as `nbytes` or a little more."""
    size, unit = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{(Decimal(nbytes) / size).quantize(Decimal('0.1'), ROUND_CEILING)}{unit}"


def _fields(text: str) -> dict[str, int]:
    """Lines such as "name 12" or "name: 12 kB" of a file in /proc or of a cgroup."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines())}


def _cgroup_rooms(membership: str, mount: Path) -> Iterator[int]:
    """The room under each memory limit around this process, given /proc/self/cgroup's text.

    In a container the groups above may be out of sight, or its own group may be the mount itself:
    then the walk up finds fewer directories.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
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
            caps = [(here / name).read_text().strip() for name in limits if (here / name).exists()]
            caps = [int(cap) for cap in caps if cap != "max"]
            if caps:
                # File pages that nobody used of late go before anything is swapped.
                unused = _fields((here / "memory.stat").read_text())[idle]
                yield min(caps) - int((here / usage).read_text()) + unused


def _vm_stat_room(text: str) -> int:
    """Bytes of free, purgeable and file-backed pages in the output of macOS's `vm_stat`."""
    page = int(re.search(r"page size of ([0-9]+) bytes", text)[1])
    count = {
        name: int(n) for name, n in re.findall(r'^"?([^":]+)"?:\s+([0-9]+)\.', text, re.MULTILINE)
    }
    return page * (count["Pages free"] + count["Pages purgeable"] + count["File-backed pages"])
