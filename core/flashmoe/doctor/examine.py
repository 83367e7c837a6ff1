"""Collect facts about this machine and a model, and what is wrong with them.

Nothing is printed here. Whatever fails becomes a problem in the report, with its way out, so that
the rest is still examined.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from .. import catalog
from ..checkpoint.checkpoint import Checkpoint
from ..errors import FlashMoEError
from ..files import nearest_existing_parent
from ..generation.prompt_cache import PromptStore
from ..memory.system import default_budget
from ..process_limits import WANTED
from ..streaming import drives
from ..system_errors import explain
from . import machine

_REPORT = "report it, with the output of `flashmoe doctor --json`"

#: Returns the facts of a section, and adds the problems to the report. None: no such section.
Examiner = Callable[["Report"], dict[str, Any] | None]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        section: the part of the report that it belongs to.
        what: what is wrong.
        way_out: what the user can do; "" if `what` says so.
    """

    section: str
    what: str
    way_out: str


@dataclass
class Report:
    """What was examined.

    Attributes:
        sections: facts by section, as plain data, in the order in which they are shown.
        problems: what is wrong.
        seconds: how long the examination took.
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add_problem(self, section: str, what: str, way_out: str) -> None:
        """Note something that is wrong."""
        self.problems.append(Problem(section, what, way_out))

    def as_json(self) -> dict[str, Any]:
        """Return all facts and problems, without the user's name."""
        problems = [asdict(p) for p in self.problems]
        content = {"ok": self.ok, "problems": problems, **self.sections, "seconds": self.seconds}
        return machine.anonymous(content)


def examine(name: str | None = None) -> Report:
    """Examine this machine and, if a name is given, that model.

    This never raises an Exception: what fails is a problem in the report.
    """
    start = perf_counter()
    report = Report()
    # The first three come before the others, whose imports set variables and limits of their own.
    sections: dict[str, Examiner] = {
        "versions": _versions,
        "environment": lambda r: machine.environment(),
        "open files": _open_files,
        "backend": _backend,
        "ops": _ops,
        "memory": _memory,
        "cache": _cache,
    }
    with _warnings(report):
        for section, facts in sections.items():
            _add(report, section, facts)
        checkpoint = _checkpoint(report, name)
        _add(report, "reading", lambda r: _reading(checkpoint))
        if name is not None and checkpoint is not None:
            _add(report, "model", lambda r: _model(r, name, checkpoint))
        _add(report, "self-test", _self_test)
        # numba knows its threading layer only after the first launch, hence after the self-test.
        _add(report, "cpu", lambda r: machine.processor())
    report.seconds = round(perf_counter() - start, 2)
    return report


def _add(report: Report, section: str, examiner: Examiner) -> None:
    with _guarded(report, section):
        facts = examiner(report)
        if facts is not None:
            report.sections[section] = facts


@contextmanager
def _guarded(report: Report, section: str) -> Iterator[None]:
    """Make what fails in the block a problem in the report."""
    try:
        yield
    except FlashMoEError as e:  # its text says the way out
        report.add_problem(section, str(e), "")
    except Exception as e:
        if (text := explain(e)) is not None:
            report.add_problem(section, text, "")
        else:
            report.add_problem(section, f"{type(e).__name__}: {e}", _REPORT)


@contextmanager
def _warnings(report: Report) -> Iterator[None]:
    """Make flashmoe's own warnings, which say their way out, problems in the report."""
    seen: set[str] = set()

    def emit(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and text not in seen:
            seen.add(text)
            report.add_problem("settings", text, "")
        return record.levelno < logging.WARNING

    log = logging.getLogger("flashmoe")
    log.addFilter(emit)
    try:
        yield
    finally:
        log.removeFilter(emit)


def _versions(report: Report) -> dict[str, Any]:
    for needed in machine.unmet():
        report.add_problem("versions", needed, f"pip install --upgrade {machine.DISTRIBUTION}")
    return machine.versions()


def _backend(report: Report) -> dict[str, Any]:
    try:
        import mlx.core as mx
    except ImportError as e:
        way_out = "pip install --force-reinstall mlx, on Linux 'mlx[cpu]' or 'mlx[cuda13]'"
        report.add_problem("backend", f"MLX cannot be loaded: {e}", way_out)
        return {"name": None}
    gpu = mx.default_device() == mx.gpu
    info = mx.device_info()
    name = ("Metal" if mx.metal.is_available() else "CUDA") if gpu else "CPU"
    facts = {"name": name, "device": info.get("device_name"), "info": dict(info)}
    if not gpu and Path("/dev/nvidiactl").exists():
        facts["note"] = (
            "there is an NVIDIA GPU, which MLX's CPU package does not use: docs/commands.md says "
            "what to install"
        )
    return facts


def _ops(report: Report) -> dict[str, Any]:
    from ..ops import backend as backends

    asked = os.environ.get(backends.ENV)
    why = f"selected by {backends.ENV}" if asked else "the fastest for this device"
    facts = {"used": None, "why": why, "asked": asked, "missing": backends.missing()}
    try:
        facts["used"] = backends.pick().name
    except FlashMoEError as e:
        report.add_problem("ops", str(e), f"unset {backends.ENV}")
    return facts


def _memory(report: Report) -> dict[str, Any]:
    backend = report.sections.get("backend", {})
    working_set = backend.get("info", {}).get("max_recommended_working_set_size")
    facts = machine.memory_facts(working_set if backend.get("name") == "Metal" else None)
    if backend.get("name") == "CUDA":
        from ..streaming.cuda import device_memory

        if device_memory() is not None:
            free = backend["info"]["free_memory"]
            facts |= {"limit": "card", "default": default_budget(free)}
    return facts


def _open_files(report: Report) -> dict[str, Any]:
    facts = machine.open_files()
    if not facts["shards"]:
        report.add_problem(
            "open files",
            f"the hard limit on open files is {facts['hard']}, too low for a model",
            f"ask for {WANTED} (limits.conf, or the container's)",
        )
    return facts


def _cache(report: Report) -> dict[str, Any]:
    store = PromptStore()
    entries = store.entries()
    parent = nearest_existing_parent(store.directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        report.add_problem(
            "cache",
            f"{store.directory} cannot be written: each process processes conversations again",
            "change its permissions, or set FLASHMOE_CACHE",
        )
    return {
        "path": str(store.directory),
        "states": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "limit": store.limit,
    }


def _checkpoint(report: Report, name: str | None) -> Checkpoint | None:
    """Return the checkpoint of the model, or by default of the demo; None if it does not open."""
    with _guarded(report, "model"):
        return Checkpoint.open(catalog.find(name or catalog.DEMO))


def _reading(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return how the drives of all models are read, and a quick measurement of the first."""
    first = [checkpoint.path] if checkpoint else []
    paths = first + [m.path for m in catalog.models() if m.path and m.path.is_dir()]
    by_drive = {os.stat(path).st_dev: path for path in reversed(paths)}
    facts: dict[str, Any] = {
        "drives": [
            asdict(drives.drive_of(path))
            | {"model": path.name, "measured": drives.measured(path) is not None}
            for path in reversed(by_drive.values())
        ]
    }
    if checkpoint:
        facts["probe"] = _probe(checkpoint)
    return facts


def _probe(checkpoint: Checkpoint) -> dict[str, Any]:
    from ..streaming.disk_bench import quick

    measured = quick(checkpoint, drives.drive_of(checkpoint.path))
    return {
        "model": checkpoint.path.name,
        "bytes": checkpoint.nbytes,
        "gb_per_s": round(measured.gb_per_s, 3),
        "cpu_ms_per_gb": round(measured.cpu_ms_per_gb),
    }


def _model(report: Report, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    from ..checkpoint.tokenizer import read_tokenizer
    from ..models.loading import drive_for, plan_memory

    shards = len(checkpoint.files)
    if shards > (limit := report.sections["open files"]["shards"]):
        what = f"{name} has {shards} shards, but the limit on open files allows {limit}"
        report.add_problem("open files", what, "convert the model again, with larger shards")
    facts: dict[str, Any] = {
        "name": name,
        "path": str(checkpoint.path),
        "family": checkpoint.model_type,
        "shards": shards,
        "bytes": checkpoint.nbytes,
        "bits": checkpoint.expert_bits,
        "experts": checkpoint.num_experts,
        "K": checkpoint.top_k,
    }
    _check_files(report, checkpoint)
    with _guarded(report, "model"):
        read_tokenizer(checkpoint)
    with _guarded(report, "model"):
        plan = plan_memory(checkpoint)
        facts |= {"plan": asdict(plan), "memory": plan.describe()}
        facts |= {"reading": asdict(drive_for(checkpoint, plan))}
    return facts


def _check_files(report: Report, checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        stat = file.stat()
        # A download that allocates its file first and is interrupted leaves blocks unwritten.
        if stat.st_blocks * 512 < stat.st_size // 2:
            what = f"{file.name} holds {stat.st_blocks * 512} of {stat.st_size} bytes on disk"
            way_out = "if its file system does not compress, download it again"
            report.add_problem("model", what, way_out)


def _self_test(report: Report) -> dict[str, Any] | None:
    if not report.sections.get("ops", {}).get("used"):
        return None  # which is a problem in the report already
    from . import self_test

    start = perf_counter()
    checks = self_test.run(catalog.find(catalog.DEMO))
    for check in checks:
        if not check.passed:
            way_out = "install flashmoe again"
            if check.name != "demo file":
                way_out = f"FLASHMOE_OPS=reference may give correct answers; {_REPORT}"
            report.add_problem("self-test", f"{check.name}: {check.result}", way_out)
    seconds = round(perf_counter() - start, 2)
    return {"checks": [check.as_json() for check in checks], "seconds": seconds}
