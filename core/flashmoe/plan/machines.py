"""Macs that predictions can be made for without having the machine.

The data is machines.json, which marks every figure that nobody has measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import SettingError
from ..terminal import format_number
from .speed_model import Costs

_SMALL = 36  # GB up to which Metal recommends to use two thirds of the memory


@dataclass(frozen=True)
class Machine:
    """A Mac and its speeds.

    Attributes:
        name: chip and memory, such as "m3-max-48gb".
        memory: bytes.
        usable: bytes of memory that a process should use at most.
        memory_gb_s: memory bandwidth in GB/s.
        costs: speeds for the speed model.
        assumed: names of the figures that nobody has measured on this machine.
        source: source of the SSD's speed.
    """

    name: str
    memory: int
    usable: int
    memory_gb_s: float
    costs: Costs
    assumed: tuple[str, ...]
    source: str

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"{self.name}: {self.memory >> 30} GB at {format_number(self.memory_gb_s)} GB/s, SSD "
            f"{format_number(self.costs.disk_gb_s)} GB/s ({self.source})"
        )


def find_machine(name: str) -> Machine:
    """Return the machine of that name; upper and lower case are the same.

    Raises:
        SettingError: there is none; the text lists the known machines.
    """
    machines = known_machines()
    machine = machines.get(name.strip().lower())
    if machine is None:
        raise SettingError(
            f"machine {name[:60]!r} is not known: use one of {', '.join(machines)}, or leave out "
            "--machine to measure this machine"
        )
    return machine


@cache
def known_machines() -> dict[str, Machine]:
    """Return all known machines by name."""
    data = json.loads((Path(__file__).parent / "machines.json").read_text())
    return {
        f"{chip}-{gb}gb": _read_machine(data, chip, gb)
        for chip in data["chips"]
        for gb in data["memory_gb"][chip]
    }


def _read_machine(data: dict, chip: str, gb: int) -> Machine:
    entry = data["chips"][chip]
    share = 2 / 3 if gb <= _SMALL else data["working_set"]["value"]
    general = ("weights_share", "flops_share", "working_set", "layer_ms")
    costs = Costs(
        weights_gb_s=entry["memory_gb_s"] * data["weights_share"]["value"],
        layer_seconds=data["layer_ms"]["value"] / 1e3,
        disk_gb_s=entry["ssd_gb_s"],
        prompt_gflops=entry["tflops"] * 1e3 * data["flops_share"]["value"],
        as_they_land=False,  # the GPU backend computes experts after all reads
        stacks=False,
    )
    return Machine(
        name=f"{chip}-{gb}gb",
        memory=gb << 30,
        usable=int((gb << 30) * share),
        memory_gb_s=entry["memory_gb_s"],
        costs=costs,
        assumed=(*entry["assumed"], *(name for name in general if data[name]["assumed"])),
        source=entry["ssd_source"],
    )
