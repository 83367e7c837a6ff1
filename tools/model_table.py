"""Compute what each model of the catalogue needs, from its shapes, and print it as a table.

    python tools/model_table.py            # the table of docs/models.md
    python tools/model_table.py --short    # the table of README.md

Nothing is downloaded. The layout of each checkpoint is computed (`flashmoe.hub.layouts`) and opened
with a hole in place of the weights; `flashmoe plan`'s own code plans its memory and its speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.checkpoint.checkpoint import Checkpoint

# Predictions are made for these Macs; docs/plan.md says how well they agree with measurements.
MACHINES = {"m4-24gb": "24 GB M4", "m3-max-48gb": "48 GB M3 Max"}

# Total size of the memory of Macs, in GiB.
MAC_GB = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)

# Names in the catalogue, in the order of the table.
NAMES = (
    "qwen3-30b-instruct",
    "qwen3.5-35b",
    "qwen3-next-80b",
    "qwen3.5-122b",
    "qwen3-235b",
    "qwen3.5-397b",
    "qwen3-coder-480b",
)


@dataclass(frozen=True)
class Needs:
    """What a model needs; all but the counts are bytes.

    least: the smallest memory budget that it runs in, with the trained K; pruned_least: with K=4.
    speeds, pruned_speeds: predicted tokens per second on each of `MACHINES`; None: too small.
    """

    name: str
    repo: str
    disk: int
    k: int
    num_experts: int
    dense: int
    expert: int
    least: int
    pruned_least: int
    smallest_mac: int
    speeds: list[float | None]
    pruned_speeds: list[float | None]


def needs(name: str) -> Needs:
    """Plan the model `name` of the catalogue."""
    from flashmoe.hub.known_models import CATALOGUE
    from flashmoe.hub.layouts import compute_layout, open_computed_checkpoint
    from flashmoe.models.loading import PREFILL_SLOTS, plan_memory
    from flashmoe.options import LoadOptions

    known = CATALOGUE[name]
    layout = compute_layout(known)
    assert layout is not None, "the catalogue's layouts are known"
    with open_computed_checkpoint(layout) as checkpoint:
        # As on a GPU with memory to spare, which takes a little more than a CPU.
        least, pruned_least = (
            plan_memory(
                checkpoint,
                LoadOptions(slots=k + PREFILL_SLOTS, experts=k, prompt_cache=None),
                mac=2**50,
            ).total
            for k in (checkpoint.top_k, 4)
        )
        return Needs(
            name=name,
            repo=known.repo,
            disk=layout.nbytes,
            k=checkpoint.top_k,
            num_experts=checkpoint.num_experts,
            dense=checkpoint.dense_nbytes,
            expert=next(iter(checkpoint.expert_layers.values())).expert_nbytes,
            least=least,
            pruned_least=pruned_least,
            # Metal recommends 75 % of the memory, up to 36 GB two thirds: see docs/plan.md.
            smallest_mac=next(
                gb for gb in MAC_GB if (gb << 30) * (2 / 3 if gb <= 36 else 0.75) >= least
            ),
            speeds=[predicted(checkpoint, mac, checkpoint.top_k) for mac in MACHINES],
            pruned_speeds=[predicted(checkpoint, mac, 4) for mac in MACHINES],
        )


def predicted(checkpoint: Checkpoint, mac: str, k: int) -> float | None:
    """Return the tokens per second that `flashmoe plan` predicts; None where it does not fit."""
    from flashmoe.errors import BudgetError
    from flashmoe.plan.estimate import PlanOptions, estimate_speed, split_memory
    from flashmoe.plan.machines import find_machine

    options, machine = PlanOptions(experts=k), find_machine(mac)
    try:
        split = split_memory(checkpoint, options, machine)
    except BudgetError:
        return None
    return estimate_speed(checkpoint, options, split, machine.costs).token.tokens_per_second


# The models of the short table.
SHORT = ("qwen3.5-35b", "qwen3-next-80b", "qwen3.5-122b", "qwen3-235b", "qwen3.5-397b")


def short() -> Iterator[str]:
    """Yield the lines of the table in README.md."""
    yield from _head("model, 4 bits", "name", "disk", "memory, at least", *MACHINES.values())
    for model in map(needs, SHORT):
        title = model.repo.split("/")[1].removesuffix("-4bit")
        yield _row(
            *(title, f"`{model.name}`", f"{model.disk / 1e9:.0f} GB"),
            *(f"{model.least / 1e9:.0f} GB", *map(_rate, model.speeds)),
        )


def full() -> Iterator[str]:
    """Yield the lines of the table in docs/models.md."""
    yield from _head(
        *("name", "disk", "experts, K", "dense weights", "one expert"),
        *("memory, at least: K; K=4", "smallest Mac"),
        *(f"{mac}, tokens/s: K; K=4" for mac in MACHINES.values()),
    )
    for model in map(needs, NAMES):
        speeds = zip(model.speeds, model.pruned_speeds, strict=True)
        yield _row(
            *(f"`{model.name}`", f"{model.disk / 1e9:.0f} GB", f"{model.num_experts}, {model.k}"),
            *(f"{model.dense / 1e9:.1f} GB", f"{model.expert / 1e6:.1f} MB"),
            f"{model.least / 1e9:.1f} GB; {model.pruned_least / 1e9:.1f} GB",
            f"{model.smallest_mac} GB",
            *(f"{_rate(exact)}; {_rate(pruned)}" for exact, pruned in speeds),
        )


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield f"|{'---|' * len(names)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(value: float | None) -> str:
    return "no" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the table of README.md")
    for line in short() if parser.parse_args().short else full():
        print(line)


if __name__ == "__main__":
    main()
