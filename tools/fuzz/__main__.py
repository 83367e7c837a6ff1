"""Run the fuzzers: `python -m fuzz [checkpoints[=COUNT]] [requests[=COUNT]] [--seed N]`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from random import SystemRandom
from time import monotonic

from .findings import Findings

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run what the command line asks for; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["checkpoints", "requests"], metavar="WHAT")
    parser.add_argument("--seconds", type=float, help="of each; 120 where no count is given")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="run one input alone")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="with --replay: write it")
    args = parser.parse_args()
    counts = {what: count for what, _, count in (text.partition("=") for text in args.what)}
    if unknown := set(counts) - {"checkpoints", "requests"}:
        parser.error(f"{unknown.pop()!r} is neither checkpoints nor requests")
    if any(count and not count.isdecimal() for count in counts.values()):
        parser.error("a count is a number, as in checkpoints=1000")
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    # What was written is removed, and what was found is printed, however the run ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.replay:
        seed, number = map(int, args.replay.split(":"))
        _replay(next(iter(counts)), seed, number, args.keep)
        return
    seed = SystemRandom().randrange(10**6) if args.seed is None else args.seed
    found = stopped = False
    for what, count in counts.items():
        seconds = args.seconds or (float("inf") if count else 120)
        print(f"{what}: seed {seed}", flush=True)
        findings = Findings()
        start = monotonic()
        run = _make(what, seed, args.jobs, findings)
        try:
            run.run(args.first, int(count) if count else None, start + seconds)
        except KeyboardInterrupt:
            stopped = True
            print("stopped")
        finally:
            run.close()
        if findings.broken is not None:
            raise findings.broken
        print(f"{what}: seed {seed}, {monotonic() - start:.0f} s\n{findings.summary()}", flush=True)
        found = found or bool(findings.kinds)
        if stopped:
            break
    sys.exit(found)


def _make(what: str, seed: int, jobs: int, findings: Findings):
    if what == "checkpoints":
        from .checkpoints import Run
    else:
        from .requests import Run
    return Run(seed, jobs, findings)


def _replay(what: str, seed: int, number: int, keep: Path | None) -> None:
    run = _make(what, seed, 1, Findings())
    try:
        if keep is not None:
            run.keep(number, keep)
        print(json.dumps(run.changes(number), indent=1))
        print(json.dumps(run.replay(number), indent=1))
    finally:
        run.close()


if __name__ == "__main__":
    main()
