"""`flashmoe quantize`: a checkpoint with its experts at fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import catalog, macos
from ..checkpoint.checkpoint import Checkpoint
from ..errors import SettingError
from ..options import EngineOptions
from ..quantize.recipe import QuantizePlan, Recipe, make_plan
from ..sizes import format_size, parse_size
from ..terminal import json_option, print_json, print_remark, print_table, progress_bar
from .options import engine_options

#: The names of roles in what is printed.
_NAMES = {"gate_up": "gate and up"}


def _dense_bits(context: click.Context, option: click.Parameter, value: str) -> int | None:
    if value == "keep":
        return None
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a number of bits nor 'keep'")


@click.command()
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--bits", metavar="N", type=int, help="Round all three matrices of an expert to N bits."
)
@click.option(
    "--gate-up",
    metavar="N",
    type=int,
    show_default="as --bits, or 2",
    help="Round gate and up to N bits.",
)
@click.option(
    "--down", metavar="N", type=int, show_default="as --bits, or 4", help="Round down to N bits."
)
@click.option(
    "--dense",
    metavar="N|keep",
    default="keep",
    show_default=True,
    callback=_dense_bits,
    help="Round dense weights to N bits. Routers and norms are always kept.",
)
@click.option(
    "--group-size",
    metavar="N",
    type=int,
    show_default="64 where the rows allow it",
    help="Share a scale between 32, 64 or 128 weights.",
)
@click.option(
    "--calibrate",
    "text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weight errors by the activations of SOURCE on this text. Choose a text like those that "
    "the model is for.",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Use the first N tokens of the text.",
)
@engine_options("memory", memory="With --calibrate: limit the peak memory of the process.")
@click.option(
    "--shard-size",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Write weights to files of this size.",
)
@click.option("--dry-run", is_flag=True, help="Show the sizes, but write nothing.")
@json_option
def quantize(
    source: str,
    directory: Path,
    text: Path | None,
    tokens: int,
    options: EngineOptions,
    shard_size: str,
    dry_run: bool,
    as_json: bool,
    **bits: int | None,
) -> None:
    """Write a copy of a checkpoint with fewer bits.

    SOURCE is a name (see `flashmoe list`) or the directory of an MLX checkpoint, at best in bf16.
    The copy is written to DIRECTORY. Run the same command again to resume an interrupted one.
    """
    shard_nbytes = parse_size(shard_size)
    plan = make_plan(Checkpoint.open(catalog.find(source)), _recipe(**bits), shard_nbytes)
    from ..quantize import writer  # late: numba and MLX

    sizes = _sizes(plan)
    if dry_run:
        writer.check_free_space(plan, directory)
    if dry_run and as_json:
        print_json(sizes)
    if not as_json:
        _print_sizes(sizes)
    if dry_run:
        return
    macos.keep_awake()
    calibration = None if text is None else (text, tokens, options.memory)
    note = _write(plan, directory, calibration, shard_nbytes)
    if as_json:
        print_json({"path": str(directory), "sizes": sizes, **note})
    else:
        _print_errors(note["errors"])
        print_remark(f"\n{directory} is ready: flashmoe run {directory} PROMPT")


def _recipe(bits: int | None, gate_up: int | None, down: int | None, **others: Any) -> Recipe:
    if bits is not None and (gate_up is not None or down is not None):
        raise SettingError("give --bits, or --gate-up and --down, not both")
    default = Recipe() if bits is None else Recipe(bits, bits)
    return Recipe(
        default.gate_up if gate_up is None else gate_up,
        default.down if down is None else down,
        **others,
    )


def _sizes(plan: QuantizePlan) -> dict[str, dict[str, int]]:
    """Return bytes before and after, by kind of weights."""
    roles: dict[str, tuple[str, ...]] = {
        "gate and up": ("gate_up",),
        "down": ("down",),
        "dense": ("dense", "other"),
        "all": (),
    }
    sizes = {name: plan.nbytes(*names) for name, names in roles.items()}
    return {name: {"before": before, "after": after} for name, (before, after) in sizes.items()}


def _print_sizes(sizes: dict[str, dict[str, int]]) -> None:
    rows = [
        {
            "weights": name,
            "before": format_size(size["before"]),
            "after": format_size(size["after"]),
        }
        for name, size in sizes.items()
    ]
    print_table(rows, ("weights", "before", "after"), right=("before", "after"))


def _print_errors(errors: dict[str, dict[str, float]]) -> None:
    rows = [
        {
            "weights": _NAMES.get(role, role),
            "relative error": f"{error['error']:.4f}",
            "plain rounding": f"{error['plain']:.4f}",
        }
        for role, error in errors.items()
    ]
    columns = ("weights", "relative error", "plain rounding")
    if rows:
        click.echo()
        print_table(rows, columns, right=columns[1:])


def _write(
    plan: QuantizePlan,
    directory: Path,
    text: tuple[Path, int, str | int | None] | None,
    shard_nbytes: int,
) -> dict[str, Any]:
    """Write the checkpoint and return what is noted about it.

    Args:
        text: the calibration text, how many of its tokens to use, and the memory limit meanwhile.
    """
    from ..quantize import writer
    from ..quantize.calibration import describe

    calibration = None if text is None else describe(text[0], text[1])
    settings = writer.run_settings(plan, shard_nbytes, calibration)
    writer.prepare_directory(plan, directory, settings)
    note = {
        "source": plan.checkpoint.path.absolute().name,
        "recipe": asdict(plan.recipe),
        "calibration": calibration,
    }
    quantizer = writer.Quantizer(plan, directory, note)
    if text is not None:
        quantizer.importance = _importance(plan, directory / writer.WORK / "importance.npz", *text)
    with progress_bar("rounding", plan.work_units) as quantizer.advance:
        return quantizer.write()


def _importance(
    plan: QuantizePlan, file: Path, text: Path, tokens: int, memory: str | int | None
) -> Any:
    """Return the importance of weights, from the file if an interrupted run has written it."""
    from ..quantize.calibration import ColumnImportance, calibrate

    if not file.is_file():
        layers = len(plan.checkpoint.expert_layers)
        with progress_bar("calibrating", layers) as advance:
            importance = calibrate(
                plan.checkpoint, text, tokens=tokens, memory=memory, advance=advance
            )
        importance.save(file)
    return ColumnImportance.load(file)
