"""What `flashmoe doctor` finds: facts about this machine and a model, and what is wrong.

Nothing is printed here. Whatever breaks becomes a problem with its way out, so that the rest is
still found.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

from .. import catalog
from ..checkpoint.checkpoint import Checkpoint
from ..errors import FlashMoEError
from ..files import nearest_existing_parent
from ..generation.prompt_cache import PromptStore
from ..streaming import drives
from . import machine

_REPORT = "report it, with the output of `flashmoe doctor --json`"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: where (a section), what, and the way out."""

    section: str
    what: str
    way_out: str


@dataclass
class Report:
    """sections: facts by section, plain data, in the order in which they are shown."""

    sections: dict[str, dict] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def wrong(self, section: str, what: str, way_out: str) -> None:
        self.problems.append(Problem(section, what, way_out))

    def as_json(self) -> dict:
        """Everything, without the user's name."""
        problems = [asdict(p) for p in self.problems]
        found = {"ok": self.ok, "problems": problems, **self.sections, "seconds": self.seconds}
        return machine.anonymous(found)


def examine(name: str | None = None) -> Report:
    """Look at everything. name: also at this model.

    It never raises an Exception: what fails is a problem of the report.
    """
    start = perf_counter()
    report = Report()
    # Before the others: imports set variables and limits of their own.
    sections = {"versions": _versions, "environment": _environment, "open files": _open_files}
    sections |= {"backend": _backend, "ops": _ops, "memory": _memory, "cache": _cache}
    with _warnings(report):
        for section, find in sections.items():
            _add(report, section, find)
        checkpoint = _checkpoint(report, name)
        _add(report, "reading", lambda r: _reading(checkpoint))
        if name is not None and checkpoint is not None:
            _add(report, "model", lambda r: _model(r, name, checkpoint))
        _add(report, "self-test", _self_test)
        _add(
            report, "cpu", lambda r: machine.processor()
        )  # numba names its threads after the first launch
    report.seconds = round(perf_counter() - start, 2)
    return report


def _add(report: Report, section: str, find: Callable[[Report], dict | None]) -> None:
    with _guarded(report, section):
        found = find(report)
        if found is not None:
            report.sections[section] = found


@contextmanager
def _guarded(report: Report, section: str) -> Iterator[None]:
    """What fails in here is a problem of the report."""
    try:
        yield
    except FlashMoEError as e:  # says its own way out
        report.wrong(section, str(e), "")
    except Exception as e:
        report.wrong(section, f"{type(e).__name__}: {e}", _REPORT)


@contextmanager
def _warnings(report: Report) -> Iterator[None]:
    """Make flashmoe's own warnings, such as those of broken settings, problems of the report."""
    seen = set()

    def emit(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and text not in seen:
            seen.add(text)
            report.wrong("settings", text, "mend that file, or remove it")
        return record.levelno < logging.WARNING

    log = logging.getLogger("flashmoe")
    log.addFilter(emit)
    try:
        yield
    finally:
        log.removeFilter(emit)


def _versions(report: Report) -> dict:
    for needed in machine.unmet():
        report.wrong("versions", needed, f"pip install --upgrade {machine.DISTRIBUTION}")
    return machine.versions()


def _environment(report: Report) -> dict:
    return machine.environment()


def _backend(report: Report) -> dict:
    try:
        import mlx.core as mx
    except ImportError as e:
        way_out = "pip install --force-reinstall mlx, on Linux 'mlx[cpu]' or 'mlx[cuda13]'"
        report.wrong("backend", f"MLX cannot be loaded: {e}", way_out)
        return {"name": None}
    gpu = mx.default_device() == mx.gpu
    info = mx.device_info()
    name = ("Metal" if mx.metal.is_available() else "CUDA") if gpu else "CPU"
    found = {"name": name, "device": info.get("device_name"), "info": dict(info)}
    if not gpu and Path("/dev/nvidiactl").exists():
        found["note"] = "there is an NVIDIA GPU, which MLX's CPU package does not use (see README)"
    return found


def _ops(report: Report) -> dict:
    from ..ops import backend as ops

    asked = os.environ.get(ops.ENV)
    why = f"{ops.ENV} asks for them" if asked else "the fastest for this device"
    found = {"asked": asked, "missing": ops.missing()}
    try:
        used = ops.pick().name
    except FlashMoEError as e:
        report.wrong("ops", str(e), f"unset {ops.ENV}")
        return {"used": None, "why": why, **found}
    return {"used": used, "why": why, **found}


def _memory(report: Report) -> dict:
    found = machine.memory_facts()
    if report.sections.get("backend", {}).get("name") == "CUDA":
        from ..streaming.cuda import device_memory

        if device_memory() is not None:
            free = report.sections["backend"]["info"]["free_memory"]
            found |= {"limit": "card", "default": machine.memory.default_budget(free)}
    return found


def _open_files(report: Report) -> dict:
    found = machine.open_files()
    if not found["shards"]:
        needed = machine.MLX_LM_FILES[1]
        what = (
            f"the hard limit on open files is {found['hard']}: mlx-lm, which sets {needed}, fails"
        )
        report.wrong("open files", what, f"ask for {needed} (limits.conf, or the container's)")
    return found


def _cache(report: Report) -> dict:
    store = PromptStore()
    states = store.entries()
    there = nearest_existing_parent(store.directory)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = f"{store.directory} cannot be written: conversations are read again in each process"
        report.wrong("cache", what, "change its permissions, or set FLASHMOE_CACHE")
    nbytes = sum(s.nbytes for s in states)
    return {
        "path": str(store.directory),
        "states": len(states),
        "bytes": nbytes,
        "limit": store.limit,
    }


def _checkpoint(report: Report, name: str | None) -> Checkpoint | None:
    """That of the model, else the demo's; None when it does not open, which is a problem."""
    with _guarded(report, "model"):
        return Checkpoint.open(catalog.find(name or catalog.DEMO))


def _reading(checkpoint: Checkpoint | None) -> dict:
    """How the drives of the models are read, and how fast the first of them is at a glance."""
    first = [checkpoint.path] if checkpoint else []
    paths = first + [m.path for m in catalog.models() if m.path and m.path.is_dir()]
    by_drive = {os.stat(path).st_dev: path for path in reversed(paths)}
    found = [
        asdict(drives.drive_of(path))
        | {"model": path.name, "measured": drives.measured(path) is not None}
        for path in reversed(by_drive.values())
    ]
    return {"drives": found} | ({"probe": _probe(checkpoint)} if checkpoint else {})


def _probe(checkpoint: Checkpoint) -> dict:
    from ..streaming.disk_bench import quick

    found = quick(checkpoint, drives.drive_of(checkpoint.path))
    measured = {"gb_per_s": round(found.gb_per_s, 3), "cpu_ms_per_gb": round(found.cpu_ms_per_gb)}
    nbytes = sum(i.nbytes for i in checkpoint.identities.values())
    return {"model": checkpoint.path.name, "bytes": nbytes, **measured}


def _model(report: Report, name: str, checkpoint: Checkpoint) -> dict:
    from ..checkpoint.tokenizer import read_tokenizer
    from ..models.loading import drive_for, plan_memory

    shards = len(checkpoint.files)
    if shards > (most := report.sections["open files"]["shards"]):
        what = f"{name} has {shards} shards, open files suffice for {most}"
        report.wrong("open files", what, "join the shards: convert it again with larger ones")
    found = {
        "name": name,
        "path": str(checkpoint.path),
        "family": checkpoint.model_type,
        "shards": shards,
        "bytes": sum(i.nbytes for i in checkpoint.identities.values()),
        "bits": checkpoint.expert_bits,
        "experts": checkpoint.num_experts,
        "K": checkpoint.top_k,
    }
    _check_files(report, checkpoint)
    with _guarded(report, "model"):
        read_tokenizer(checkpoint)
    with _guarded(report, "model"):
        plan = plan_memory(checkpoint)
        found |= {"plan": asdict(plan), "memory": plan.describe()}
        found |= {"reading": asdict(drive_for(checkpoint, plan))}
    return found


def _check_files(report: Report, checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        stat = file.stat()
        # A download that takes its room first leaves blocks that nobody wrote.
        if stat.st_blocks * 512 < stat.st_size // 2:
            what = f"{file.name} holds {stat.st_blocks * 512} of {stat.st_size} bytes on disk"
            report.wrong("model", what, "if its file system does not compress, download it again")


def _self_test(report: Report) -> dict | None:
    if not report.sections.get("ops", {}).get("used"):
        return None  # a problem already
    from .self_test import run

    start = perf_counter()
    checks = run(catalog.find(catalog.DEMO))
    for check in checks:
        if not check.passed:
            way_out = "install flashmoe again"
            if check.name != "demo file":
                way_out = f"FLASHMOE_OPS=reference may give right answers; {_REPORT}"
            report.wrong("self-test", f"{check.name}: {check.result}", way_out)
    return {"checks": [asdict(c) for c in checks], "seconds": round(perf_counter() - start, 2)}
