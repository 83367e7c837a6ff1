"""What a sweep found, as plain data and as rows of a table. No point is ever left out."""

from __future__ import annotations

from ..sizes import format_size

COLUMNS = ("version", "K", "a token", "of experts", "KL", "perplexity", "same top")
_RATES = (("calls", "calls"), ("schemas", "JSON"))
_KINDS = (("grammar", "grammar"), ("free", "free"))


def report(name: str, points: list[dict], threshold: float, *, whole: bool = True) -> dict:
    """Everything. best: points than which no other has both fewer bytes a token and a lower KL
    (Pareto). stop: the fewest bytes whose KL, with two standard errors, is at most the threshold.
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
    """Bytes that a token needs, of dense weights and of experts."""
    return point["size"]["dense_bytes"] + point["size"]["expert_bytes"]


def upper_kl(point: dict) -> float:
    """KL with two standard errors, where they are known."""
    return point["fidelity"]["kl"] + 2 * (point["fidelity"]["kl_error"] or 0.0)


def columns(found: dict) -> list[str]:
    """Those of `rows`: only what was measured."""
    names = list(COLUMNS)
    for part, label in _RATES:
        if any(part in p for p in found["points"]):
            names += [f"{label}, {kind}" for _, kind in _KINDS]
    if any("speed" in p for p in found["points"]):
        names += ["tok/s", "read a token"]
    return [*names, ""]


def rows(found: dict) -> list[dict]:
    """A row for each point, of texts by column."""
    return [_row(point, found) for point in found["points"]]


def summary(found: dict) -> list[str]:
    """Where to stop, and what the columns do not say, in sentences."""
    lines = []
    points = {_key_of(p): p for p in found["points"]}
    if (stop := found["stop"]) is not None:
        point = points[tuple(stop.values())]
        fit = point["fidelity"]
        lines.append(
            f"stop at {stop['version']}, K={stop['experts']}: "
            f"{format_size(token_nbytes(point))} a token, "
            f"KL {_plus_minus(fit['kl'], fit['kl_error'])}. It has the fewest bytes whose KL, with "
            f"two standard errors, is at most {found['threshold']:g} nats (--threshold)"
        )
    exact = found["points"][0] if found["points"] else {}
    for part, label in _RATES:
        for kind, words in (("grammar", "with the grammar"), ("free", "without a grammar")):
            if part in exact and exact[part][kind]["passed"] == 0:
                lines.append(
                    f"{label} {words}: the exact model passes none, so this column says nothing "
                    "of what pruning or bits cost"
                )
    if not found["whole"]:
        lines.append("the sweep was ended before it was whole")
    return lines


def _row(point: dict, found: dict) -> dict:
    fit, size = point["fidelity"], point["size"]
    row = {
        "version": point["version"],
        "K": str(point["experts"]),
        "a token": format_size(token_nbytes(point)),
        "of experts": format_size(size["expert_bytes"]),
        "KL": _plus_minus(fit["kl"], fit["kl_error"]),
        "perplexity": f"{fit['perplexity']:.3f}",
        "same top": f"{fit['same_top']:.1%}",
    }
    for part, label in _RATES:
        for kind, name in _KINDS:
            if part in point:
                row[f"{label}, {name}"] = _rate(point[part][kind])
    if speed := point.get("speed"):
        row["tok/s"] = f"{speed['tokens_per_second']:.1f}"
        row["read a token"] = format_size(speed["read_bytes"])
    marks = ["best"] * (_key(point) in found["best"]) + ["stop"] * (_key(point) == found["stop"])
    return row | {"": ", ".join(marks)}


def _rate(found: dict) -> str:
    """Right and passed calls, or passed documents, of those asked for."""
    right = "" if found["right"] is None else f"{found['right']} / "
    return f"{right}{found['passed']} of {found['asked']}"


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
