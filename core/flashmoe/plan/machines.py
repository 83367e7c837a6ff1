"""Macs that are known by name, for predictions without the machine. The data is machines.json; what
nobody measured says so there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import SettingError
from .speed_model import Costs

_SMALL = 36  # GB up to which Metal recommends two thirds


@dataclass(frozen=True)
class Machine:
    """memory: bytes; usable: those that a process should take. assumed: fields of `costs` and of
    this that nobody measured there. source: of the SSD's speed."""

    name: str
    memory: int
    usable: int
    memory_gb_s: float
    costs: Costs
    assumed: tuple[str, ...]
    source: str

    def describe(self) -> str:
        return (
            f"{self.name}: {self.memory >> 30} GB at {self.memory_gb_s:g} GB/s, SSD "
            f"{self.costs.disk_gb_s:g} GB/s ({self.source})"
        )


def machine(name: str) -> Machine:
    """
    Raises:
        SettingError: it is not known; lists those that are.
    """
    known = machines()
    found = known.get(name.strip().lower())
    if found is None:
        raise SettingError(
            f"machine {name[:60]!r} is not known. These are: {', '.join(known)}. For this machine, "
            "leave --machine out: it is measured"
        )
    return found


@cache
def machines() -> dict[str, Machine]:
    """All of them, by name."""
    data = json.loads((Path(__file__).parent / "machines.json").read_text())
    return {
        f"{chip}-{gb}gb": _machine(data, chip, gb)
        for chip in data["chips"]
        for gb in data["memory_gb"][chip]
    }


def _machine(data: dict, chip: str, gb: int) -> Machine:
    entry = data["chips"][chip]
    share = 2 / 3 if gb <= _SMALL else data["working_set"]["value"]
    general = ("weights_share", "flops_share", "working_set", "layer_ms")
    costs = Costs(
        weights_gb_s=entry["memory_gb_s"] * data["weights_share"]["value"],
        layer_seconds=data["layer_ms"]["value"] / 1e3,
        disk_gb_s=entry["ssd_gb_s"],
        prompt_gflops=entry["tflops"] * 1e3 * data["flops_share"]["value"],
        as_they_land=False,  # as the GPU's kernels take them
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
