"""`flashmoe doctor`: the report of `flashmoe.doctor.examine` on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import click

from ..doctor import machine
from ..doctor.examine import Report, examine
from ..sizes import format_size
from ..terminal import (
    format_number,
    format_seconds,
    is_terminal,
    json_option,
    print_json,
    print_table,
    waiting_line,
)

# What fits on one screen. In a pipe everything is printed.
_MAX_CHARACTERS = {"environment": 500}
_DEFAULT_MAX_CHARACTERS = 250
_MAX_PROBLEMS = 5


@click.command()
@click.argument("model", required=False)
@json_option
@click.pass_context
def doctor(context: click.Context, model: str | None, as_json: bool) -> None:
    """Check the installation and, if given, a model.

    This shows what is used on this machine and what is wrong, and compares the answers of the
    bundled demo model with those of other implementations. MODEL is a name (see `flashmoe list`) or
    the directory of an MLX checkpoint. The exit code is 1 if anything is wrong. --json is for bug
    reports: it leaves out your name and home directory.
    """
    text = "checking (the first time compiles kernels: some 30 s, on CUDA minutes)"
    with nullcontext() if as_json or not is_terminal() else waiting_line(text):
        report = examine(model)
    if as_json:
        print_json(report.as_json())
    else:
        rows = [*_facts(report), *_problems(report)]
        print_table(rows, ("section", "result"), style=_style)
    context.exit(0 if report.ok else 1)


def _style(row: Mapping[str, Any]) -> str:
    return {"PROBLEM": "red", "all is well": "green"}.get(row["section"], "")


def _facts(report: Report) -> Iterator[dict[str, str]]:
    for section, facts in machine.anonymous(report.sections).items():
        for number, text in enumerate(SHOWN[section](facts)):
            repeated = number > 0 and is_terminal()
            text = _shortened(text, _MAX_CHARACTERS.get(section, _DEFAULT_MAX_CHARACTERS))
            yield {"section": "" if repeated else section, "result": text}


def _problems(report: Report) -> Iterator[dict[str, str]]:
    if report.ok:
        yield {"section": "all is well", "result": f"in {format_seconds(report.seconds)}"}
    shown = report.problems[:_MAX_PROBLEMS] if is_terminal() else report.problems
    for problem in shown:
        way_out = f" -> {problem.way_out}" if problem.way_out else ""
        text = machine.anonymous(f"{problem.section}: {problem.what}{way_out}")
        yield {"section": "PROBLEM", "result": _shortened(text)}
    if (more := len(report.problems) - len(shown)) > 0:
        yield {"section": "PROBLEM", "result": f"and {more} more: see --json"}


def _shortened(text: str, limit: int = _DEFAULT_MAX_CHARACTERS) -> str:
    text = " ".join(text.split())
    if not is_terminal():
        return text
    return textwrap.shorten(text, limit, placeholder=" ... (--json has it all)")


def _versions(facts: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version or 'missing'}" for name, version in facts.items())


def _environment(facts: dict[str, Any]) -> Iterator[str]:
    yield " ".join(f"{name}={value}" for name, value in facts.items()) or "nothing that matters"


def _backend(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["name"]:
        yield "none"
        return
    info = facts.get("info", {})
    memory = info.get("memory_size") or info.get("total_memory")
    size = f", {format_size(memory)}" if memory else ""
    yield f"MLX on {facts['name']}: {facts.get('device')}{size}"
    if "note" in facts:
        yield facts["note"]


def _ops(facts: dict[str, Any]) -> Iterator[str]:
    yield f"{facts['used'] or 'none'}: {facts['why']}"
    yield "not here: " + "; ".join(f"{name} {why}" for name, why in facts["missing"].items())


def _memory(facts: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{format_size(facts['total'])}, {format_size(facts['available'])} available (limit: "
        f"{facts['limit']}); a model takes up to {format_size(facts['default'])} by default"
    )


def _open_files(facts: dict[str, Any]) -> Iterator[str]:
    soft, hard = ("no limit" if facts[n] is None else facts[n] for n in ("soft", "hard"))
    limits = f"limit {soft} (hard {hard}), raised to {facts['raised']}"
    yield f"{limits}: enough for {facts['shards']} shards"


def _cache(facts: dict[str, Any]) -> Iterator[str]:
    sizes = f"{format_size(facts['bytes'])} of {format_size(facts['limit'])}"
    yield f"{facts['states']} prompt cache entries, {sizes}, in {facts['path']}"


def _reading(facts: dict[str, Any]) -> Iterator[str]:
    for drive in facts["drives"][:2]:
        why = "measured" if drive["measured"] else "default; `flashmoe bench disk` measures"
        split = format_size(drive["split"]) if drive["split"] else "none"
        how = f"io={drive['io']} depth={drive['depth']} split={split} ({why})"
        yield f"drive of {drive['model']}: {how}"
    if probe := facts.get("probe"):
        yield (
            f"quick test: {format_number(probe['gb_per_s'])} GB/s, {probe['cpu_ms_per_gb']} ms of "
            f"CPU per GB, on the {format_size(probe['bytes'])} of {probe['model']}, which may be "
            "cached"
        )


def _model(facts: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{facts['name']}: {facts['family']}, {facts['experts']} experts, K={facts['K']}, "
        f"{format_number(facts['bits'])} bits, {format_size(facts['bytes'])}, shards: "
        f"{facts['shards']}, {facts['path']}"
    )
    if "memory" in facts:
        drive = facts["reading"]
        yield f"when loaded: {facts['memory']}; io={drive['io']} depth={drive['depth']}"


def _self_test(facts: dict[str, Any]) -> Iterator[str]:
    for check in facts["checks"]:
        yield f"{'pass' if check['passed'] else 'FAIL'}: {check['name']}: {check['result']}"


def _cpu(facts: dict[str, Any]) -> Iterator[str]:
    features = " ".join(facts["features"]) or "no vector instructions that the kernels use"
    layer = f", {facts['threading layer']}" if facts["threading layer"] else ""
    yield (
        f"{facts['usable']} of {facts['cores']} cores, {facts['name']}: {features}; int8 by "
        f"{facts['int8']}; numba: {facts['numba threads']} threads{layer}"
    )


#: Turns the facts of each section into lines of text.
SHOWN: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "versions": _versions,
    "environment": _environment,
    "backend": _backend,
    "ops": _ops,
    "memory": _memory,
    "open files": _open_files,
    "cache": _cache,
    "reading": _reading,
    "model": _model,
    "self-test": _self_test,
    "cpu": _cpu,
}
