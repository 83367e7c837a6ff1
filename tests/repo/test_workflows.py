"""Tests what the jobs of .github/workflows run."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
JOBS = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
#: Files that launch kernels for other reasons than to see what a GPU computes.
OTHERS = {"doctor/test_examine.py", "repo/test_benchmarks.py"}


def test_job_with_metal_runs_every_file_that_launches_kernels():
    commands = [step.get("run", "") for step in JOBS["metal"]["steps"]]
    (words,) = [c.split() for c in commands if c.startswith("python -m pytest tests")]
    run = {f for word in words[3:] for f in [ROOT / word, *(ROOT / word).rglob("test_*.py")]}
    assert all((ROOT / word).exists() for word in words[3:])
    launching = re.compile(r"\b(launched|on_device|on_metal|kernel\.available)\b")
    files = (ROOT / "tests").rglob("test_*.py")
    missing = {f for f in files if launching.search(f.read_text())} - run - {Path(__file__)}
    assert {str(f.relative_to(ROOT / "tests")) for f in missing} <= OTHERS


def test_commands_of_the_jobs_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in JOBS.values():
        for step in job["steps"]:
            made = re.findall(r"^\s*make (\S+)", step.get("run", ""), re.MULTILINE)
            assert set(made) <= targets, step
            for path in re.findall(r"\btests/[\w/.]+", step.get("run", "")):
                assert (ROOT / path).exists(), path
