"""Test the report and the plot of a sweep with points whose results are known."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from flashmoe.errors import SettingError
from flashmoe.sweep.plot import check_plot_file, draw, write_plot
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


def names(points: list[dict]) -> list[tuple]:
    return [(p["version"], p["experts"]) for p in points]


def test_stop_is_the_smallest_point_within_the_threshold():
    result = report("toy", POINTS, 0.05)
    # K=4 and K=1 of the own version are both larger and worse than a point of fewer bits.
    assert names(result["best"]) == [("own", 10), ("2", 10), ("2", 4), ("2", 1)]
    assert names([result["stop"]]) == [("2", 4)]
    # Two standard errors are added: 0.045 + 0.002 exceeds the threshold, as does 0.03 + 0.04.
    assert names([report("toy", POINTS, 0.0465)["stop"]]) == [("own", 10)]
    assert names([report("toy", POINTS, 0.08)["stop"]]) == [("2", 4)]
    assert names([report("toy", POINTS, 2)["stop"]]) == [("2", 1)]
    assert "stop at 2, K=4: 9.5 MB per token, KL 0.0450 ± 0.0010" in summary(result)[0]
    assert "at most 0.05 nats" in summary(result)[0]


def test_equal_points_are_both_among_the_best():
    twins = [point("own", 10, 20, 0.0), point("2", 10, 20, 0.0)]
    assert len(report("toy", twins, 0.1)["best"]) == 2


def test_every_point_has_a_row():
    result = report("toy", POINTS, 0.05)
    assert columns(result)[-1] == ""
    assert not any("calls" in c or "tokens/s" in c for c in columns(result))
    shown = rows(result)
    assert [(r["version"], r["K"]) for r in shown] == [
        (p["version"], str(p["experts"])) for p in POINTS
    ]
    assert shown[4][""] == "best, stop"
    assert shown[1] == {
        "version": "own",
        "K": "4",
        "bytes/token": "13.0 MB",
        "expert bytes": "8.0 MB",
        "KL": "0.0600 ± 0.0010",
        "perplexity": "2.700",
        "same top": "90.0%",
        "": "",
    }


def test_rates_and_speed_are_shown():
    passed = {"asked": 6, "passed": 5, "right": 4, "cut": 1}
    none = {"asked": 6, "passed": 0, "right": 0, "cut": 0}
    json_rate = {"asked": 3, "passed": 3, "right": None, "cut": 0}
    speed = {"tokens_per_second": 12.34, "hit_rate": 1.0, "read_bytes": 2_000_000}
    more = {
        "calls": {"grammar": passed, "free": none},
        "schemas": {"grammar": json_rate, "free": json_rate},
        "speed": speed,
    }
    result = report("toy", [point("own", 10, 20, 0.0, **more), *POINTS[1:]], 0.05, whole=False)
    (first, second, *_) = rows(result)
    assert first["calls, grammar"] == "4 / 5 of 6"
    assert first["JSON, free"] == "3 of 3"
    assert (first["tokens/s"], first["read/token"]) == ("12.3", "2.0 MB")
    assert set(columns(result)) == set(first)
    assert "tokens/s" not in second
    text = "\n".join(summary(result))
    assert "calls without a grammar: the exact model passes none" in text
    assert text.count("passes none") == 1
    assert "stopped before all points were measured" in text


def test_report_without_points_is_empty():
    result = report("toy", [], 0.05, whole=False)
    assert (result["stop"], result["best"], rows(result)) == (None, [], [])
    assert summary(result) == ["the sweep was stopped before all points were measured"]


SVG = "{http://www.w3.org/2000/svg}"


def svg_texts(file: Path) -> list[str]:
    """Return the texts of a plot, which is written as SVG."""
    return [e.text for e in ET.parse(file).iter(f"{SVG}text")]


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
def test_plot_labels_every_point(points, tmp_path):
    write_plot(report("toy", points, 0.05), tmp_path / "plot.svg")
    texts = svg_texts(tmp_path / "plot.svg")
    labels = Counter(str(p["experts"]) for p in points)
    assert all(texts.count(k) >= count for k, count in labels.items())
    assert all(not re.search(r"\de[+-]?\d", text) for text in texts)
    assert {"0", "threshold 0.05", "toy: each point is one K"} <= set(texts)


def test_plot_shows_the_points():
    figure = draw(report("toy", POINTS, 0.05))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "MB that a token needs"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["own", "2 bits"]
    own, two = (container.lines[0] for container in axes.containers)
    assert own.get_xdata().tolist() == [7e6, 13e6, 25e6]
    assert two.get_ydata().tolist() == [1.2, 0.045, 0.03]
    # A KL of 0 has no place on a logarithmic axis: it is at the lower end, whose label is 0.
    zero = axes.get_ylim()[0]
    assert own.get_ydata().tolist() == [1.5, 0.06, zero]
    assert axes.get_yticks()[0] == zero
    assert axes.get_yticklabels()[0].get_text() == "0"
    (stop,) = [line for line in axes.lines if line.get_gid() == "stop"]
    assert (stop.get_xdata(), stop.get_ydata()) == ([9.5e6], [0.045])


def test_name_is_escaped_in_the_plot(tmp_path):
    write_plot(report("<&> $x$", POINTS, 0.05), tmp_path / "plot.svg")
    assert any("<&> $x$" in text for text in svg_texts(tmp_path / "plot.svg"))


@pytest.mark.parametrize(
    ("name", "start"), [("p.svg", b"<?xml"), ("p.png", b"\x89PNG"), ("p.PDF", b"%PDF")]
)
def test_plot_has_the_format_of_its_suffix(tmp_path, name, start):
    for file in (tmp_path / name, tmp_path / f"again-{name}"):
        write_plot(report("toy", POINTS, 0.05), file)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plot", "use .svg, .png or .pdf"),
        ("plot.txt", "use .svg, .png or .pdf"),
        ("none/plot.svg", "there is no directory"),
    ],
)
def test_unusable_plot_file_is_refused(tmp_path, name, text):
    with pytest.raises(SettingError, match=text):
        check_plot_file(tmp_path / name)


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(SettingError, match=r'pip install "llm-flashmoe\[plot\]"'):
        check_plot_file(tmp_path / "plot.svg")


def test_plot_of_the_docs_is_up_to_date(tmp_path):
    """The plot is drawn from the numbers in the JSON file beside it."""
    result = json.loads((DOCS / "plots" / "sweep.json").read_text())
    assert result["whole"]
    write_plot(result, tmp_path / "plot.svg")
    assert svg_texts(tmp_path / "plot.svg") == svg_texts(DOCS / "plots" / "sweep.svg")
    assert report(result["model"], result["points"], result["threshold"]) == result
