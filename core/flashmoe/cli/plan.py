"""`flashmoe plan`: whether a model will run here or on a known Mac, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .. import catalog
from ..options import EngineOptions
from ..plan.routing import REAL
from ..terminal import format_number, json_option, print_json, print_table
from .options import engine_options, with_preset


@click.command()
@click.argument("model", required=False)
@click.option(
    "--context",
    metavar="TOKENS",
    type=int,
    show_default="8192, less where the model or the memory allows no more",
    help="Keep memory for a conversation of this length.",
)
@click.option(
    "--prompt",
    metavar="TOKENS",
    type=int,
    show_default="1000, or the model's limit",
    help="Predict the time to the first token for a prompt of this length.",
)
@engine_options("memory", "experts", "activations")
@click.option(
    "--batch",
    metavar="N",
    default=1,
    show_default=True,
    help="Predict the speed of N requests that are answered together.",
)
@click.option(
    "--hosts",
    metavar="N",
    default=1,
    show_default=True,
    help="Share the experts between N machines like this one; see `flashmoe run --cluster`.",
)
@click.option(
    "--network",
    metavar="GB/S",
    default=1.0,
    show_default=True,
    help="Assume this speed of the network between the N machines.",
)
@click.option(
    "--machine",
    metavar="MAC",
    help="Predict for a Mac such as m3-max-48gb, instead of measuring this machine. 'list' lists "
    "the Macs.",
)
@click.option(
    "--routing",
    type=click.Choice([REAL, "uniform"]),
    default=REAL,
    show_default=True,
    help="Take hit rates from the routing of real models, or assume that all experts are equally "
    "likely.",
)
@json_option
def plan(
    model: str | None, options: EngineOptions, machine: str | None, as_json: bool, **asked: Any
) -> None:
    """Predict whether and how fast a model will run.

    MODEL is a name (see `flashmoe list`), hub:OWNER/NAME, or the directory of an MLX checkpoint. If
    it is not on this disk, only its headers are fetched, less than 1 MB; those of the names that
    flashmoe knows are computed where there is no network. This machine is measured for some five
    seconds. The exit code is 1 if the model will not run.
    """
    from ..plan.machines import find_machine

    if machine == "list":
        _print_machines(as_json=as_json)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    mac = find_machine(machine) if machine else None
    from ..plan.estimate import PlanOptions, estimate  # late: MLX
    from ..plan.report import render_json, render_text
    from ..plan.sources import open_model

    with open_model(model) as (checkpoint, source):
        options = with_preset(options, catalog.model(model))
        asked |= {"memory": options.memory, "experts": options.experts}
        result = estimate(
            model,
            checkpoint,
            source,
            PlanOptions(**asked),
            machine=mac,
            activations=options.activations,
        )
        if as_json:
            print_json(render_json(result))
        else:
            rows = [{"field": label, "value": text} for label, text in render_text(result)]
            print_table(rows, ("field", "value"), style=_style)
    click.get_current_context().exit(0 if result.runs else 1)


def _style(row: Mapping[str, Any]) -> str:
    if row["field"] != "runs":
        return ""
    return "green" if row["value"] == "yes" else "red"


def _print_machines(*, as_json: bool) -> None:
    from ..plan.machines import known_machines

    known = known_machines().values()
    if as_json:
        print_json(
            [
                {
                    "name": mac.name,
                    "memory": mac.memory,
                    "memory_gb_per_s": mac.memory_gb_s,
                    "ssd_gb_per_s": mac.costs.disk_gb_s,
                    "ssd_source": mac.source,
                }
                for mac in known
            ]
        )
        return
    rows = [
        {
            "machine": mac.name,
            "memory": f"{mac.memory >> 30} GB",
            "memory GB/s": format_number(mac.memory_gb_s),
            "SSD GB/s": format_number(mac.costs.disk_gb_s),
            "source": mac.source,
        }
        for mac in known
    ]
    print_table(rows, list(rows[0]), right=("memory", "memory GB/s", "SSD GB/s"))
