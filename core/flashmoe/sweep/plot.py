"""The plot of a sweep: KL against bytes a token. An SVG for light pages and for dark ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from .report import token_nbytes

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 76, 730, 56, 404
#: Between the lowest tick and the axis, on which lies what is 0, or LEAST and rounding alone.
ZERO = 28
LEAST = 1e-9

# Of Okabe and Ito, lightened or darkened to be read on white and on black.
_COLOURS = ("#2f86c9", "#d9730d", "#1a9c75", "#b558a8", "#a68a00", "#7d7d7d")
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.axis { stroke: #333; fill: none } .grid { stroke: #888; stroke-opacity: .25 }
.stop { stroke: #c0392b; stroke-dasharray: 5 4; fill: none } .note { fill: #c0392b }
@media (prefers-color-scheme: dark) {
 text { fill: #ddd } .axis { stroke: #ddd } .stop { stroke: #ff7b6b } .note { fill: #ff7b6b }
}
"""


def svg(found: dict) -> str:
    """The plot of what `flashmoe.sweep.report.report` gave; one line a version."""
    scale = _Scale(found)
    lines: dict[str, list[dict]] = {}
    for point in found["points"]:
        lines.setdefault(point["version"], []).append(point)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(found['model'])}: KL against bytes a token</title>",
        f"<style>{_STYLE}</style>",
        *_axes(scale, found["model"]),
        *_threshold(scale, found["threshold"]),
    ]
    for number, (version, points) in enumerate(lines.items()):
        points.sort(key=token_nbytes)
        parts += _line(scale, number, points, found["stop"])
        parts += _legend(number, version)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From bytes and nats to places. KL is logarithmic, with a row for 0 below."""

    def __init__(self, found: dict):
        sizes = [token_nbytes(p) for p in found["points"]]
        kls = [p["fidelity"]["kl"] for p in found["points"]] + [found["threshold"]]
        kls = [kl for kl in kls if kl > LEAST] or [1.0]
        self.top = 1.25 * max(kls)
        powers = range(math.floor(math.log10(min(kls))), math.ceil(math.log10(self.top)) + 1)
        marks = (1, 2, 5) if len(powers) < 5 else (1,)
        ticks = [mark * 10.0**power for power in powers for mark in marks]
        below = max(t for t in ticks if t <= min(kls))
        self.kls = [t for t in ticks if below <= t <= self.top]
        span = max(sizes) - min(sizes) or max(sizes)
        power = 10 ** math.floor(math.log10(span))
        step = next(s * power for s in (0.1, 0.2, 0.5, 1, 2) if span <= 7 * s * power)
        first, last = min(sizes) // step, -(-max(sizes) // step)
        self.sizes = [i * step for i in range(round(first), round(max(last, first + 1)) + 1)]
        units = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
        self.unit, self.unit_name = next(u for u in units if self.sizes[-1] >= u[0])

    def x(self, nbytes: float) -> float:
        first, last = self.sizes[0], self.sizes[-1]
        return LEFT + (RIGHT - LEFT) * (nbytes - first) / (last - first)

    def y(self, kl: float) -> float:
        if kl < self.kls[0]:
            return BOTTOM
        share = math.log(kl / self.kls[0]) / math.log(self.top / self.kls[0])
        return BOTTOM - ZERO - (BOTTOM - ZERO - TOP) * min(share, 1.0)


def _axes(scale: _Scale, model: str) -> Iterator[str]:
    for kl in scale.kls:
        yield f'<path class="grid" d="M{LEFT} {scale.y(kl):.1f}H{RIGHT}"/>'
        yield _text(LEFT - 8, scale.y(kl) + 4, f"{kl:g}", "end")
    yield _text(LEFT - 8, BOTTOM + 4, "0", "end")
    for nbytes in scale.sizes:
        yield f'<path class="grid" d="M{scale.x(nbytes):.1f} {TOP}V{BOTTOM}"/>'
        yield _text(scale.x(nbytes), BOTTOM + 20, f"{nbytes / scale.unit:g}", "middle")
    yield f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>'
    middle = (LEFT + RIGHT) / 2
    yield _text(middle, BOTTOM + 42, f"{scale.unit_name} that a token needs", "middle")
    yield (
        f'<text transform="translate(20 {(TOP + BOTTOM) / 2:g}) rotate(-90)" text-anchor="middle">'
        "KL from the exact model, nats a token</text>"
    )
    yield _text(LEFT, 22, f"{model}: each point is one K", "start")


def _threshold(scale: _Scale, threshold: float) -> Iterator[str]:
    if threshold > 0:
        y = scale.y(threshold)
        yield f'<path class="stop" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        yield _text(RIGHT, y - 5, f"threshold {threshold:g}", "end", "note")


def _line(scale: _Scale, number: int, points: list[dict], stop: dict | None) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    places = [(scale.x(token_nbytes(p)), scale.y(p["fidelity"]["kl"])) for p in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    for (x, y), point in zip(places, points, strict=True):
        fit, k = point["fidelity"], point["experts"]
        if error := fit["kl_error"]:
            low, high = (scale.y(fit["kl"] + side * error) for side in (-1, 1))
            yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
        yield _marker(number, x, y, colour)
        if stop == {"version": point["version"], "experts": k}:
            yield f'<circle class="stop" cx="{x:.1f}" cy="{y:.1f}" r="10"/>'
        # In its colour: lines come close to each other where K is small.
        yield _text(x + 7, y - 7, str(k), "start", fill=colour)


def _marker(number: int, x: float, y: float, colour: str) -> str:
    """Shapes too, for eyes that tell no colours apart."""
    corners = {
        1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        2: ((0, -5), (5, 4), (-5, 4)),
        3: ((0, -6), (6, 0), (0, 6), (-6, 0)),
        4: ((0, 5), (5, -4), (-5, -4)),
    }.get(number % len(_COLOURS))
    if corners is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _legend(number: int, version: str) -> Iterator[str]:
    x = LEFT + 8 + 110 * number
    yield _marker(number, x, 40, _COLOURS[number % len(_COLOURS)])
    shown = version if len(version) <= 14 else f"...{version[-11:]}"
    yield _text(x + 10, 44, shown if version == "own" else f"{shown} bits", "start")


def _text(
    x: float, y: float, words: str, anchor: str, style: str = "", fill: str | None = None
) -> str:
    kind = f' class="{style}"' if style else ""
    kind += f' style="fill: {fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(words)}</text>'
