"""`flashmoe doctor`: what `flashmoe.doctor.examine` found, on one screen."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator

import click

from ..doctor import machine
from ..doctor.examine import Report, examine
from ..sizes import format_size
from ..terminal import json_option, record

_WIDTH, _HEIGHT = 100, 45
_LABEL = 13
#: Lines that a problem or a long fact may take; --json has the whole.
_MOST_LINES = 3
_MOST_PROBLEMS = 5


@click.command()
@click.argument("name", metavar="[MODEL]", required=False)
@json_option
@click.pass_context
def doctor(context: click.Context, name: str | None, as_json: bool) -> None:
    """Check this machine, and MODEL when one is given: what is used, and what is wrong.

    The exit code is 1 when something is wrong.
    """
    waiting = sys.stderr.isatty() and not as_json
    if waiting:
        text = "looking (the first time compiles kernels: some 30 s, on CUDA minutes)"
        click.echo(click.style(text, dim=True), nl=False, err=True)
    report = examine(name)
    if waiting:
        click.echo("\r\x1b[K", nl=False, err=True)
    if as_json:
        record(report.as_json(), as_json=True)
    else:
        _show(report)
    context.exit(0 if report.ok else 1)


def _show(report: Report) -> None:
    problems = list(_problems(report))
    facts = list(_facts(report))
    room = _HEIGHT - len(problems)
    if len(facts) > room:
        facts = [*facts[: room - 1], _lines("", "... the rest: see --json")[0]]
    for line in facts + problems:
        click.echo(line)


def _facts(report: Report) -> Iterator[str]:
    for section, facts in machine.anonymous(report.sections).items():
        for number, text in enumerate(SHOWN[section](facts)):
            most = 6 if section == "environment" else _MOST_LINES
            yield from _lines("" if number else section, text, most=most)


def _problems(report: Report) -> Iterator[str]:
    if report.ok:
        yield from _lines("all is well", f"in {report.seconds:.1f} s", fg="green")
    for problem in report.problems[:_MOST_PROBLEMS]:
        way_out = f" -> {problem.way_out}" if problem.way_out else ""
        text = f"{problem.section}: {problem.what}{way_out}"
        yield from _lines("PROBLEM", machine.anonymous(text), fg="red", most=4)
    if (more := len(report.problems) - _MOST_PROBLEMS) > 0:
        yield from _lines("PROBLEM", f"and {more} more: see --json", fg="red")


def _lines(label: str, text: str, fg: str | None = None, most: int = _MOST_LINES) -> list[str]:
    """The text beside its label, as lines of the screen; cut after `most`."""
    lines = textwrap.wrap(" ".join(text.split()), _WIDTH - _LABEL) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: _WIDTH - _LABEL - 4] + " ..."]
    labels = [label] + [""] * (len(lines) - 1)
    return [
        click.style(f"{shown:<{_LABEL}}", fg=fg, bold=True) + line
        for shown, line in zip(labels, lines, strict=True)
    ]


def _versions(found: dict) -> Iterator[str]:
    yield ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())


def _environment(found: dict) -> Iterator[str]:
    shown = [textwrap.shorten(f"{n}={v}", 80, placeholder="...") for n, v in found.items()]
    yield " ".join(shown) or "nothing that matters"


def _backend(found: dict) -> Iterator[str]:
    memory = found.get("info", {}).get("memory_size") or found.get("info", {}).get("total_memory")
    of = f", {format_size(memory)}" if memory else ""
    yield f"MLX on {found['name']}: {found.get('device')}{of}" if found["name"] else "none"
    if "note" in found:
        yield found["note"]


def _ops(found: dict) -> Iterator[str]:
    yield f"{found['used'] or 'none'}: {found['why']}"
    yield "not here: " + "; ".join(f"{name} {why}" for name, why in found["missing"].items())


def _memory(found: dict) -> Iterator[str]:
    yield (
        f"{format_size(found['total'])}, {format_size(found['available'])} available (limit: "
        f"{found['limit']}); a load takes up to {format_size(found['default'])} by default"
    )


def _open_files(found: dict) -> Iterator[str]:
    soft, hard, shards = ("no limit" if found[n] is None else found[n] for n in found)
    limits = f"limit {soft} (hard {hard}), mlx-lm sets {machine.MLX_LM_FILES[0]}"
    yield f"{limits}: a model of {shards} shards" if shards else f"{limits}, which fails"


def _cache(found: dict) -> Iterator[str]:
    sizes = f"{format_size(found['bytes'])} of {format_size(found['limit'])}"
    yield f"{found['states']} prompt states, {sizes}, in {found['path']}"


def _reading(found: dict) -> Iterator[str]:
    for drive in found["drives"][:2]:
        why = "measured" if drive["measured"] else "default; `flashmoe bench disk` measures"
        split = format_size(drive["split"]) if drive["split"] else "none"
        how = f"io={drive['io']} depth={drive['depth']} split={split} ({why})"
        yield f"drive of {drive['model']}: {how}"
    if probe := found.get("probe"):
        yield (
            f"a quick look: {probe['gb_per_s']:.2f} GB/s, {probe['cpu_ms_per_gb']} ms of CPU a GB, "
            f"on the {format_size(probe['bytes'])} of {probe['model']}; caches may help"
        )


def _model(found: dict) -> Iterator[str]:
    yield (
        f"{found['name']}: {found['family']}, {found['experts']} experts, K={found['K']}, "
        f"{found['bits']:g} bits, {format_size(found['bytes'])} in {found['shards']} shards, "
        f"{found['path']}"
    )
    if "memory" in found:
        drive = found["reading"]
        yield f"a load: {found['memory']}; io={drive['io']} depth={drive['depth']}"


def _self_test(found: dict) -> Iterator[str]:
    for check in found["checks"]:
        yield f"{'pass' if check['passed'] else 'FAIL'}  {check['name']}: {check['result']}"


def _cpu(found: dict) -> Iterator[str]:
    features = " ".join(found["features"]) or "no vector features that the kernels use"
    yield (
        f"{found['usable']} of {found['cores']} cores, {found['name']}: {features}; int8 by "
        f"{found['int8']}; numba: {found['numba threads']} threads"
        + (f", {found['threading layer']}" if found["threading layer"] else "")
    )


SHOWN = {
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
