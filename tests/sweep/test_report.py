"""The report and the plot of a sweep, from points whose answer is known."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from flashmoe.sweep.plot import svg
from flashmoe.sweep.report import columns, report, rows, summary

DOCS = Path(__file__).parents[2] / "docs"


def point(version: str, k: int, mb: float, kl: float, error: float | None = 0.001, **more) -> dict:
    fit = {"tokens": 100, "nll": 1.0, "excess": 0.0, "excess_error": 0.0, "kl": kl}
    fit |= {"kl_error": error, "same_top": 0.9, "perplexity": 2.7}
    size = {"bits": 4.0, "dense_bytes": 5_000_000, "expert_bytes": int(mb * 1e6)}
    return {"version": version, "experts": k, "size": size, "fidelity": fit, **more}


POINTS = [
    point("own", 10, 20, 0.0, 0.0),
    point("own", 4, 8, 0.06),
    point("own", 1, 2, 1.5),
    point("2", 10, 11, 0.03, 0.02),
    point("2", 4, 4.5, 0.045),
    point("2", 1, 1.1, 1.2),
]


def names(found: list[dict]) -> list[tuple]:
    return [(f["version"], f["experts"]) for f in found]


def test_another_point_is_where_to_stop():
    found = report("toy", POINTS, 0.05)
    # own K=4 and K=1 are both larger and worse than one of fewer bits.
    assert names(found["best"]) == [("own", 10), ("2", 10), ("2", 4), ("2", 1)]
    assert names([found["stop"]]) == [("2", 4)]
    # Two standard errors count: 0.045 + 0.002 is too much, 0.03 + 0.04 too.
    assert names([report("toy", POINTS, 0.0465)["stop"]]) == [("own", 10)]
    assert names([report("toy", POINTS, 0.08)["stop"]]) == [("2", 4)]
    assert names([report("toy", POINTS, 2)["stop"]]) == [("2", 1)]
    assert "stop at 2, K=4: 9.5 MB a token, KL 0.0450 ± 0.0010" in summary(found)[0]
    assert "at most 0.05 nats" in summary(found)[0]


def test_equal_points_hide_each_other():
    twins = [point("own", 10, 20, 0.0), point("2", 10, 20, 0.0)]
    assert len(report("toy", twins, 0.1)["best"]) == 2


def test_row_is_missing_or_wrong():
    found = report("toy", POINTS, 0.05)
    assert columns(found)[-1] == ""
    assert not any("calls" in c or "tok/s" in c for c in columns(found))
    shown = rows(found)
    assert [(r["version"], r["K"]) for r in shown] == [
        (p["version"], str(p["experts"])) for p in POINTS
    ]
    assert shown[4][""] == "best, stop"
    assert shown[1] == {
        "version": "own",
        "K": "4",
        "a token": "13.0 MB",
        "of experts": "8.0 MB",
        "KL": "0.0600 ± 0.0010",
        "perplexity": "2.700",
        "same top": "90.0%",
        "": "",
    }


def test_rates_are_not_shown():
    passed = {"asked": 6, "passed": 5, "right": 4, "cut": 1}
    none = {"asked": 6, "passed": 0, "right": 0, "cut": 0}
    json_rate = {"asked": 3, "passed": 3, "right": None, "cut": 0}
    speed = {"tokens_per_second": 12.34, "hit_rate": 1.0, "read_bytes": 2_000_000}
    more = {
        "calls": {"grammar": passed, "free": none},
        "schemas": {"grammar": json_rate, "free": json_rate},
        "speed": speed,
    }
    found = report("toy", [point("own", 10, 20, 0.0, **more), *POINTS[1:]], 0.05, whole=False)
    (first, second, *_) = rows(found)
    assert first["calls, grammar"] == "4 / 5 of 6"
    assert first["JSON, free"] == "3 of 3"
    assert (first["tok/s"], first["read a token"]) == ("12.3", "2.0 MB")
    assert set(columns(found)) == set(first)
    assert "tok/s" not in second
    said = "\n".join(summary(found))
    assert "calls without a grammar: the exact model passes none" in said
    assert said.count("passes none") == 1
    assert "ended before it was whole" in said


def test_nothing_was_finished():
    found = report("toy", [], 0.05, whole=False)
    assert (found["stop"], found["best"], rows(found)) == (None, [], [])
    assert summary(found) == ["the sweep was ended before it was whole"]


def drawn(points: list[dict], threshold: float = 0.05, name: str = "toy") -> ET.Element:
    return ET.fromstring(svg(report(name, points, threshold)))


def texts(root: ET.Element) -> list[str]:
    return [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    "points",
    [
        POINTS,
        POINTS[:1],
        POINTS[1:2],
        [point("own", 10, 0.0001, 0.0, None)],
        [point("own", 10, 20, 1e-12), point("own", 9, 19, 25.0, 30.0)],
        [point(str(i), 10, 4_250 + i, 10.0**-i) for i in range(9)],
    ],
)
def test_plot_leaves_the_page(points):
    root = drawn(points)
    width, height = map(float, root.get("viewBox").split()[2:])
    places = re.findall(
        r'(?:x|cx)="([\d.-]+)" (?:y|cy)="([\d.-]+)"', svg(report("t", points, 0.05))
    )
    assert len(places) > len(points)
    for x, y in places:
        assert 0 <= float(x) <= max(width, 1100)
        assert 0 <= float(y) <= height
    for p in points:
        assert str(p["experts"]) in texts(root)


def test_plot_has_other_points():
    root = drawn(POINTS)
    said = texts(root)
    assert {"own", "2 bits", "threshold 0.05", "MB that a token needs"} <= set(said)
    lines = [e.get("d") for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("stroke")]
    (own, two) = [d for d in lines if d.count("L") == 2]
    # More bytes to the right, a higher KL further up; 0 lies on the axis.
    for line in (own, two):
        places = [tuple(map(float, p.split())) for p in line[1:].split("L")]
        assert places == sorted(places)
        assert [y for _, y in places] == sorted(y for _, y in places)
    assert own.endswith(" 404.0")
    circles = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if e.get("class")]
    assert len(circles) == 1


def test_name_breaks_the_plot():
    assert any("<&>" in text for text in texts(drawn(POINTS, name="<&>")))


def test_plot_of_the_docs_is_old():
    """It is drawn from the numbers beside it."""
    found = json.loads((DOCS / "plots" / "sweep.json").read_text())
    assert found["whole"]
    assert svg(found) == (DOCS / "plots" / "sweep.svg").read_text()
    assert report(found["model"], found["points"], found["threshold"]) == found
