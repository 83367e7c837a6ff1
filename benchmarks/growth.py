"""Measure tokens per second against the memory budget: does more memory help as it should?

    python benchmarks/synth.py /tmp/synth --layers 4 --experts 256
    python benchmarks/growth.py /tmp/synth --io direct --rounds 3 --plot docs/plots/growth.svg

Each budget runs as in streaming.py, in a cgroup that is larger than the budget by --room, and the
budgets alternate. The expected speed follows from three figures of the same run: the hit rate of
its routing, replayed through the slots alone; C, the time of a step that misses nothing (from the
largest budget, where all experts should be resident); and B, the bandwidth of the disk when nothing
is computed:

    missed    = layers * K * (1 - replayed hit rate) * bytes of an expert
    serial    = C + missed / B          nothing is computed while the disk works
    overlap   = max(C, missed / B)      everything is computed while the disk works

The measured speed should be between the two: reads go on while resident experts are computed, but
the router of a layer needs the layer before, and reads take some of the same cores. A third
expectation uses the steps of the smallest and the largest budget in place of B and C, so it shows
whether speed follows the hit rate, whatever a byte costs in this process:

    line      = a step is a straight line in `missed`, through those two

Deviations are measured / expected - 1, in tokens per second. With random tokens and routers the hit
rate is slots / experts; real routing hits more often. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import runs

import streaming


def expect(results: dict[str, dict]) -> dict[str, dict]:
    """Return expected tokens per second of each budget, and how far the measured ones are off."""
    most, least = list(results.values())[-1], next(iter(results.values()))

    def seconds(case: dict) -> float:
        return 1 / case["cold"]["tokens_per_second"]

    def missed(case: dict) -> float:
        return case["needed_bytes"] * (1 - case["cold"]["expected_hit_rate"])

    compute = most["cold"]["compute_ms"] / 1e3
    between = missed(least) - missed(most)
    slope = (seconds(least) - seconds(most)) / between if between else 0.0
    rows = {}
    for name, case in results.items():
        raw = case["raw_gb_s"] * 1e9
        expected = {
            "serial": compute + missed(case) / raw,
            "overlap": max(compute, missed(case) / raw),
            "line": seconds(most) + slope * (missed(case) - missed(most)),
        }
        speed = case["cold"]["tokens_per_second"]
        row = {"slots": case["slots"], "tokens_per_second": speed}
        row |= {key: case["cold"][key] for key in ("hit_rate", "expected_hit_rate")}
        row["raw_gb_s"] = case["raw_gb_s"]
        for form, step in expected.items():
            row[form] = round(1 / step, 3)
            row[f"{form}_deviation"] = round(speed * step - 1, 3)
        rows[name] = row
    return rows


def plot(path: Path, budgets: list[float], rows: dict[str, dict]) -> None:
    """Draw measured and expected speeds and the hit rates against the budgets, in GB."""
    figure, axes = runs.figure()
    for form, style in (("serial", "--"), ("overlap", ":"), ("line", "-.")):
        axes.plot(budgets, [row[form] for row in rows.values()], style, label=f"expected, {form}")
    speeds = [row["tokens_per_second"] for row in rows.values()]
    axes.plot(budgets, speeds, "o-", linewidth=2, label="measured")
    hits = axes.twinx()
    hits.plot(budgets, [row["hit_rate"] for row in rows.values()], "x", color="grey")
    hits.set(ylabel="hit rate (x)", ylim=(0, 1.05))
    axes.set(xlabel="memory budget, GB", ylabel="tokens/s", title="Speed against memory")
    axes.set_ylim(bottom=0)
    runs.save(figure, axes, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], parents=[streaming.options()]
    )
    parser.add_argument("--budgets", nargs="+", default=["3GB", "4GB", "6GB", "8GB", "10GB"])
    parser.add_argument(
        "--room", default="1GB", help="limit of the cgroup minus the budget, or none"
    )
    parser.set_defaults(prompt=128, warm=False)
    args = parser.parse_args()
    cases = {}
    for budget in args.budgets:
        room = runs.nbytes(args.room)
        limit = None if room is None else runs.nbytes(budget) + room
        cases[budget] = streaming.base_case(args, memory=budget, limit=limit)
    results = runs.alternated(cases, args.rounds, lambda case: streaming.run_case(args, case))
    rows = expect(results)
    if args.plot:
        plot(args.plot, [runs.nbytes(budget) / 1e9 for budget in cases], rows)
    result = {"benchmark": "growth", "rounds": args.rounds, "budgets": rows}
    print(json.dumps(result | {"settings": streaming.base_case(args)}))


if __name__ == "__main__":
    main()
