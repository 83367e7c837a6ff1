"""Draws the results of a sweep with matplotlib: KL divergence against bytes per token."""

from __future__ import annotations

from math import ceil, floor, log10
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from ..errors import SettingError
from ..terminal import format_number
from .report import token_nbytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The smallest KL that is more than rounding; smaller ones are drawn as 0.
LEAST_KL = 1e-9

# Okabe and Ito's colours, which colour-blind people can tell apart, darkened to be read on white;
# and shapes, for eyes that tell no colours apart.
_COLOURS = ("#2f86c9", "#d9730d", "#1a9c75", "#b558a8", "#a68a00", "#6d6d6d")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STOP_COLOUR = "#c0392b"


def check_plot_file(file: Path) -> None:
    """Check that a plot can be written, before the sweep takes its time.

    Raises:
        SettingError: matplotlib is not installed, the directory does not exist, or the format is
            not supported.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as e:
        raise SettingError(
            '--plot needs matplotlib: install it with pip install "llm-flashmoe[plot]"'
        ) from e
    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in formats:
        raise SettingError(
            f"--plot {file} has a format that is not supported: use .svg, .png or .pdf"
        )
    if not file.absolute().parent.is_dir():
        raise SettingError(
            f"there is no directory {file.parent}: choose a file in another one for --plot"
        )


def write_plot(results: dict, file: Path) -> None:
    """Draw the results and write the plot in the format that the suffix of the file names.

    Args:
        results: from `flashmoe.sweep.report.report`, with at least one point.

    Raises:
        SettingError: the file cannot be written; also see `check_plot_file`.
    """
    check_plot_file(file)
    from matplotlib import rc_context

    # Text stays text in an SVG, and equal results give equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "flashmoe"}):
        figure = draw(results)
        # A date would make equal results different files; only an SVG and a PDF have one.
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        metadata = dates.get(file.suffix.lower())
        try:
            figure.savefig(file, dpi=150, bbox_inches="tight", metadata=metadata)
        except OSError as e:
            raise SettingError(
                f"cannot write {file} ({e.strerror}): choose another file for --plot"
            ) from e


def draw(results: dict) -> Figure:
    """Return the plot: a line for each version with a point for each K, and the threshold."""
    from matplotlib.figure import Figure

    points, threshold = results["points"], results["threshold"]
    figure = Figure(figsize=(8.2, 5))
    axes = figure.add_subplot()
    zero = _scale_kl(axes, [p["fidelity"]["kl"] for p in points] + [threshold])
    unit, unit_name = _unit(max(map(token_nbytes, points)))
    axes.xaxis.set_major_formatter(lambda nbytes, _: format_number(nbytes / unit, 6))
    versions: dict[str, list[dict]] = {}
    for point in points:
        versions.setdefault(point["version"], []).append(point)
    # The labels of the smaller versions are below their lines, so that they meet fewer other lines.
    by_size = sorted(versions, key=lambda v: mean(map(token_nbytes, versions[v])))
    for number, (version, line) in enumerate(versions.items()):
        _draw_version(axes, number, line, zero, below=by_size.index(version) < len(by_size) // 2)
    _draw_stop(axes, results, zero)
    axes.set_xlabel(f"{unit_name} that a token needs")
    axes.set_ylabel("KL from the exact model, nats per token")
    axes.set_title(_plain(f"{results['model']}: each point is one K"), loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    return figure


def _scale_kl(axes: Axes, kls: list[float]) -> float:
    """Make the y axis logarithmic with a place for 0 at its lower end, and return that place."""
    positive = [kl for kl in kls if kl > LEAST_KL] or [1.0]
    least, top = min(positive), 1.6 * max(positive)
    first, last = floor(log10(least)), ceil(log10(top))
    marks = (1, 2, 5) if last - first < 4 else (1,)
    ticks = [mark * 10.0**power for power in range(first, last + 1) for mark in marks]
    ticks = [t for t in ticks if max(t for t in ticks if t <= least) <= t <= top]
    zero = ticks[0] / (2 if len(marks) > 1 else 3)
    axes.set_yscale("log")
    axes.set_ylim(zero, top)
    axes.set_yticks([zero, *ticks], ["0", *map(format_number, ticks)])
    axes.minorticks_off()
    return zero


def _unit(nbytes: int) -> tuple[int, str]:
    units = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
    return next(unit for unit in units if nbytes >= unit[0])


def _draw_version(axes: Axes, number: int, points: list[dict], zero: float, *, below: bool) -> None:
    version = points[0]["version"]
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    points = sorted(points, key=token_nbytes)
    sizes = [token_nbytes(p) for p in points]
    kls = [max(p["fidelity"]["kl"], zero) for p in points]
    shown = version if len(version) <= 20 else f"...{version[-17:]}"
    axes.errorbar(
        sizes,
        kls,
        yerr=[p["fidelity"]["kl_error"] or 0.0 for p in points],
        color=colour,
        marker=marker,
        linewidth=1.6,
        clip_on=False,
        label=_plain(shown if version == "own" else f"{shown} bits"),
    )
    for point, size, kl in zip(points, sizes, kls, strict=True):
        # In the colour of the line: lines come close to each other where K is small.
        axes.annotate(
            str(point["experts"]),
            (size, kl),
            (-5, -4) if below else (5, 4),
            textcoords="offset points",
            ha="right" if below else "left",
            va="top" if below else "bottom",
            color=colour,
            fontsize=9,
        )


def _draw_stop(axes: Axes, results: dict, zero: float) -> None:
    """Draw the threshold, and a circle around the point to stop at."""
    threshold, stop = results["threshold"], results["stop"]
    for point in results["points"]:
        if {"version": point["version"], "experts": point["experts"]} == stop:
            kl = max(point["fidelity"]["kl"], zero)
            axes.plot(
                token_nbytes(point),
                kl,
                marker="o",
                markersize=15,
                fillstyle="none",
                color=_STOP_COLOUR,
                clip_on=False,
                gid="stop",
            )
    if threshold > 0:
        axes.axhline(threshold, color=_STOP_COLOUR, linestyle="--", linewidth=1)
        axes.annotate(
            f"threshold {format_number(threshold)}",
            (1, threshold),
            (-2, 3),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            color=_STOP_COLOUR,
        )


def _plain(text: str) -> str:
    """Escape a name for matplotlib, to which $ starts a formula."""
    return text.replace("$", r"\$")
