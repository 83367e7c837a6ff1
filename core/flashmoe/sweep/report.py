"""The results of a sweep as plain data, as rows of a table and as sentences.

No point is ever left out.
"""

from __future__ import annotations

from typing import Any

from ..sizes import format_size
from ..terminal import format_number

COLUMNS = ("version", "K", "bytes/token", "expert bytes", "KL", "perplexity", "same top")
_RATES = (("calls", "calls"), ("schemas", "JSON"))
_KINDS = (("grammar", "grammar"), ("free", "free"))


def report(
    name: str, points: list[dict], threshold: float, *, whole: bool = True
) -> dict[str, Any]:
    """Return the results of a sweep as JSON data.

    Args:
        name: the model.
        points: the measured points, from `flashmoe.sweep.run.Sweep.points`.
        threshold: KL divergence in nats per token that is acceptable.
        whole: whether all points were measured.

    Returns:
        The arguments and two results: "best", the points for which no other point has both fewer
        bytes per token and a lower KL (Pareto), and "stop", the point with the fewest bytes whose
        KL plus two standard errors is at most the threshold, or None.
    """
    best = [
        p
        for p in points
        if not any(q is not p and _dominates(_place(q), _place(p)) for q in points)
    ]
    near = [p for p in points if upper_kl(p) <= threshold]
    stop = min(near, key=_place, default=None)
    return {
        "model": name,
        "whole": whole,
        "threshold": threshold,
        "stop": stop and _key(stop),
        "best": [_key(p) for p in best],
        "points": points,
    }


def token_nbytes(point: dict) -> int:
    """Return the bytes that a token needs, dense weights and experts together."""
    return point["size"]["dense_bytes"] + point["size"]["expert_bytes"]


def upper_kl(point: dict) -> float:
    """Return the KL of a point plus two standard errors, if the error is known."""
    return point["fidelity"]["kl"] + 2 * (point["fidelity"]["kl_error"] or 0.0)


def columns(results: dict) -> list[str]:
    """Return the names of the columns of `rows`; parts that were not measured have none."""
    names = list(COLUMNS)
    for part, label in _RATES:
        if any(part in p for p in results["points"]):
            names += [f"{label}, {kind}" for _, kind in _KINDS]
    if any("speed" in p for p in results["points"]):
        names += ["tokens/s", "read/token"]
    return [*names, ""]


def rows(results: dict) -> list[dict]:
    """Return a row for each point: texts by column name."""
    return [_row(point, results) for point in results["points"]]


def summary(results: dict) -> list[str]:
    """Return sentences about where to stop and about what the columns do not tell."""
    lines = []
    points = {_key_of(p): p for p in results["points"]}
    if (stop := results["stop"]) is not None:
        point = points[tuple(stop.values())]
        fit = point["fidelity"]
        lines.append(
            f"stop at {stop['version']}, K={stop['experts']}: "
            f"{format_size(token_nbytes(point))} per token, "
            f"KL {_plus_minus(fit['kl'], fit['kl_error'])}. This is the point with the fewest "
            "bytes whose KL plus two standard errors is at most "
            f"{format_number(results['threshold'])} nats (--threshold)"
        )
    exact = results["points"][0] if results["points"] else {}
    for part, label in _RATES:
        for kind, words in (("grammar", "with the grammar"), ("free", "without a grammar")):
            if part in exact and exact[part][kind]["passed"] == 0:
                lines.append(
                    f"{label} {words}: the exact model passes none, so this column does not show "
                    "what pruning or bits cost"
                )
    if not results["whole"]:
        lines.append("the sweep was stopped before all points were measured")
    return lines


def _row(point: dict, results: dict) -> dict:
    fit, size = point["fidelity"], point["size"]
    row = {
        "version": point["version"],
        "K": str(point["experts"]),
        "bytes/token": format_size(token_nbytes(point)),
        "expert bytes": format_size(size["expert_bytes"]),
        "KL": _plus_minus(fit["kl"], fit["kl_error"]),
        "perplexity": f"{fit['perplexity']:.3f}",
        "same top": f"{fit['same_top']:.1%}",
    }
    for part, label in _RATES:
        for kind, name in _KINDS:
            if part in point:
                row[f"{label}, {name}"] = _rate(point[part][kind])
    if speed := point.get("speed"):
        row["tokens/s"] = f"{speed['tokens_per_second']:.1f}"
        row["read/token"] = format_size(speed["read_bytes"])
    key = _key(point)
    marks = ["best"] * (key in results["best"]) + ["stop"] * (key == results["stop"])
    return row | {"": ", ".join(marks)}


def _rate(rate: dict) -> str:
    """Return "right / passed of asked" for calls and "passed of asked" for JSON."""
    right = "" if rate["right"] is None else f"{rate['right']} / "
    return f"{right}{rate['passed']} of {rate['asked']}"


def _plus_minus(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error else "")


def _place(point: dict) -> tuple[int, float]:
    return token_nbytes(point), point["fidelity"]["kl"]


def _dominates(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _key(point: dict) -> dict:
    return {"version": point["version"], "experts": point["experts"]}


def _key_of(point: dict) -> tuple[str, int]:
    return point["version"], point["experts"]
