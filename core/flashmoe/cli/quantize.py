"""`flashmoe quantize`: a checkpoint with its experts at fewer bits."""

from __future__ import annotations

from pathlib import Path

import click

from ..catalog import find
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..memory.budget import format_size, parse_size
from ..quantize.recipe import SHARD_NBYTES, Plan, Recipe, make_plan
from ..terminal import json_option, progress, record


def _dense(context, option, value: str) -> int | None:
    if value == "keep":
        return None
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a number of bits nor keep")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("directory", metavar="DST", type=click.Path(path_type=Path))
@click.option("--bits", type=int, help="Bits of all three matrices of an expert.")
@click.option("--gate-up", type=int, help="Bits of gate and up.  [default: 2]")
@click.option("--down", type=int, help="Bits of down.  [default: 4]")
@click.option(
    "--dense",
    default="keep",
    show_default=True,
    callback=_dense,
    help="Bits of dense weights. Routers and norms stay as they are.",
)
@click.option("--group-size", type=int, help="32, 64 or 128.  [default: 64 where rows allow]")
@click.option(
    "--calibrate",
    "text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weigh errors by what SRC computes on this text.",
)
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Of FILE.")
@click.option("--memory", metavar="SIZE", help="For --calibrate: peak memory, such as 8GB.")
@click.option("--shard-size", metavar="SIZE", help="Of a file of DST.  [default: 5GB]")
@click.option("--dry-run", is_flag=True, help="Show the sizes, and write nothing.")
@json_option
def quantize(source, directory, text, tokens, memory, shard_size, dry_run, as_json, **bits):
    """Write SRC (a name or an MLX checkpoint) to the directory DST with fewer bits.

    The same command again goes on where an interrupted one ended.
    """
    shard = SHARD_NBYTES if shard_size is None else parse_size(shard_size)
    plan = make_plan(Checkpoint.open(find(source)), _recipe(**bits), shard)
    from ..quantize import writer as driver  # late: numba and MLX

    found = _sizes(plan)
    if dry_run:
        driver.check_room(plan, directory)
    if dry_run or not as_json:
        _show(found, as_json=as_json)
    if not dry_run:
        note = _write(driver, plan, directory, text, tokens, memory, shard)
        _done(found, note, directory, as_json=as_json)


def _recipe(bits: int | None, gate_up: int | None, down: int | None, **others) -> Recipe:
    if bits is not None and (gate_up is not None or down is not None):
        raise SettingError("give --bits, or --gate-up and --down, not both")
    both = Recipe() if bits is None else Recipe(bits, bits)
    gate_up = both.gate_up if gate_up is None else gate_up
    return Recipe(gate_up, both.down if down is None else down, **others)


def _sizes(plan: Plan) -> dict:
    found = {}
    for name, roles in (
        ("gate and up", ("gate_up",)),
        ("down", ("down",)),
        ("dense", ("dense", "other")),
        ("all", ()),
    ):
        before, after = plan.nbytes(*roles)
        found[name] = {"before": before, "after": after}
    return found


def _show(found: dict, *, as_json: bool) -> None:
    if not as_json:
        found = {
            name: f"{format_size(sizes['before'])} -> {format_size(sizes['after'])}"
            for name, sizes in found.items()
        }
    record(found, as_json=as_json)


def _write(driver, plan: Plan, directory: Path, text, tokens, memory, shard: int) -> dict:
    from dataclasses import asdict

    from ..quantize.calibration import describe

    calibration = None if text is None else describe(text, tokens)
    driver.begin(plan, directory, driver.fingerprint(plan, shard, calibration))
    note = {
        "source": plan.checkpoint.path.absolute().name,
        "recipe": asdict(plan.recipe),
        "calibration": calibration,
    }
    run = driver.Run(plan, directory, note)
    if text is not None:
        run.importance = _importance(driver, plan, directory, text, tokens, memory)
    with progress("rounding", sum(part.work for part in plan.parts)) as run.advance:
        return run.run()


def _importance(driver, plan: Plan, directory: Path, text: Path, tokens: int, memory):
    from ..quantize.calibration import Importance, calibrate

    kept = directory / driver.WORK / "importance.npz"
    if not kept.is_file():
        layers = len(plan.checkpoint.expert_layers)
        with progress("calibrating", layers) as advance:
            found = calibrate(plan.checkpoint, text, tokens=tokens, memory=memory, advance=advance)
        found.save(kept)
    return Importance.load(kept)


def _done(sizes: dict, note: dict, directory: Path, *, as_json: bool) -> None:
    if as_json:
        record({"path": str(directory), "sizes": sizes, **note}, as_json=True)
        return
    for role, found in note["errors"].items():
        name = {"gate_up": "gate and up"}.get(role, role)
        click.echo(
            f"{name}: relative error {found['error']:.4f}, plain rounding {found['plain']:.4f}"
        )
    click.echo(f"{directory} is ready: flashmoe run {directory} PROMPT")
