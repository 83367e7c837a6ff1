"""Rounds a checkpoint to fewer bits, tensor by tensor and expert by expert.

Memory holds one block of rows at a time, whatever the checkpoint's size: some 0.1 GB beside what is
imported. A calibration adds 4 bytes for each row of gate and each column of a layer's input.

A shard gets its name when it is whole, synced and read back; its checksum is kept beside it until
the end, so that a run which was killed goes on behind the last good shard. config.json is written
last: before that, nothing takes the directory for a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..checkpoint.safetensors_header import INDEX_NAME, read_header
from ..checkpoint.safetensors_writer import ShardWriter
from ..errors import CheckpointError, QuantizeError
from ..files import PARTIAL, disk_too_full, free_nbytes, write_json
from .recipe import Part, Plan
from .rounding import Rounded, search, weighed
from .weights import narrow, read_back, read_bytes, read_weights

#: What a run keeps in the directory that it fills, until the end.
WORK = ".quantize"
NOTE = "flashmoe_quantize.json"

#: Weights that are rounded at one time: 8 MB of them, and as much again a few times.
BLOCK_WEIGHTS = 2 * 2**20
COPY_NBYTES = 8 * 2**20

_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_MARGIN_NBYTES = 16 * 2**20

#: importance(layer, role, expert): of each column of a matrix, or None where all count the same.
Importance = Callable[[int, str, int], "np.ndarray | None"]


@dataclass
class Errors:
    """Sums over the weights of a role of importance * square: of the error, of the error of plain
    rounding, and of the weights."""

    error: float = 0.0
    plain: float = 0.0
    energy: float = 0.0

    def add(self, error: float, plain: float, energy: float) -> None:
        self.error += error
        self.plain += plain
        self.energy += energy

    def summary(self) -> dict:
        """As parts of the weights: 0.1 is an error of a tenth."""
        energy = self.energy or 1.0
        return {
            "error": round(math.sqrt(self.error / energy), 6),
            "plain": round(math.sqrt(self.plain / energy), 6),
        }


@dataclass
class Run:
    """One quantisation into `directory`. advance is told of work done, in the plan's units."""

    plan: Plan
    directory: Path
    note: dict
    advance: Callable[[int], None] = lambda done: None
    importance: Importance = lambda layer, role, expert: None
    errors: dict[str, Errors] = field(default_factory=dict)

    def run(self) -> dict:
        """Write all that is not there yet. Returns the note.

        Raises:
            QuantizeError: the disk is full, or does not give back what was written.
            CheckpointError: the source is corrupt.
        """
        with _writing(self.directory):
            for name, parts in self.plan.shards.items():
                found = finished(self.directory, name)
                if found is None:
                    found = self._shard(name, parts)
                else:
                    self.advance(sum(part.work for part in parts))
                for role, sums in found["errors"].items():
                    self.errors.setdefault(role, Errors()).add(**sums)
            return self._finish()

    def _shard(self, name: str, parts: list[Part]) -> dict:
        errors: dict[str, Errors] = {}
        path = self.directory / name
        with ShardWriter(path, [t for p in parts for t in p.targets]) as out:
            for part in parts:
                if part.new is None:
                    self._copy(part, out)
                else:
                    self._round(part, out, errors.setdefault(part.role, Errors()))
            out.sync()
            found = {"nbytes": out.nbytes, "sha256": _digest(out.partial)}
            _check_header(out.partial, parts)
            found["errors"] = {role: asdict(sums) for role, sums in errors.items()}
            out.publish()
        write_json(self.directory / WORK / f"{name}.json", found)
        return found

    def _copy(self, part: Part, out: ShardWriter) -> None:
        for tensor in part.sources.values():
            with self._open(tensor) as fd:
                for start in range(0, tensor.nbytes, COPY_NBYTES):
                    data = read_bytes(fd, tensor, start, min(COPY_NBYTES, tensor.nbytes - start))
                    out.write(tensor.name, start, data)
                    self.advance(len(data))

    def _round(self, part: Part, out: ShardWriter, errors: Errors) -> None:
        *experts, rows, width = part.shape
        step = max(1, BLOCK_WEIGHTS // width)
        with self._opened(part) as fds:
            for expert in range(math.prod(experts)):
                given = None
                if part.layer is not None:
                    given = self.importance(part.layer, part.role, expert)
                h = np.ones(width, np.float32) if given is None else given
                for first in range(0, rows, step):
                    start = expert * rows + first
                    w = read_weights(part, fds, start, min(step, rows - first))
                    dtype = part.targets[1].dtype
                    found = search(w, h, part.new.bits, part.new.group_size, dtype)
                    self._store(part, out, start, found)
                    error, energy = weighed(w, h, read_back(part, out, start, len(w)))
                    _check_block(part, expert, out, error, energy, found.plain)
                    errors.add(found.error, found.plain, energy)
                    self.advance(w.size)

    def _store(self, part: Part, out: ShardWriter, row: int, found: Rounded) -> None:
        weight, scales, biases = part.targets
        out.write(weight.name, row * found.weight[0].nbytes, found.weight.data)
        for target, values in ((scales, found.scales), (biases, found.biases)):
            data = narrow(values, target.dtype)
            out.write(target.name, row * data[0].nbytes, data.data)

    @contextmanager
    def _open(self, tensor) -> Iterator[int]:
        try:
            fd = os.open(tensor.file, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(f"cannot read {tensor.file}: {e.strerror}") from e
        try:
            change = self.plan.checkpoint.identities[tensor.file].change(fd)
            if change:
                raise CheckpointError(f"{tensor.file} {change}: begin again in a new directory")
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _opened(self, part: Part) -> Iterator[dict[str, int]]:
        fds: dict[str, int] = {}
        try:
            for name, tensor in part.sources.items():
                with self._open(tensor) as fd:
                    fds[name] = os.dup(fd)
            yield fds
        finally:
            for fd in fds.values():
                os.close(fd)

    def _finish(self) -> dict:
        source, directory = self.plan.checkpoint.path, self.directory
        for file in sorted(source.iterdir()):
            if file.name in ("config.json", INDEX_NAME, NOTE) or not file.is_file():
                continue
            if file.suffix in _COPIED or file.name.startswith("LICENSE"):
                shutil.copyfile(file, directory / file.name)
        weight_map = {
            t.name: name
            for name, parts in self.plan.shards.items()
            for part in parts
            for t in part.targets
        }
        total = {"total_size": self.plan.nbytes()[1]}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        note = self.note | {"errors": {r: e.summary() for r, e in self.errors.items()}}
        for name, content in ((NOTE, note), (INDEX_NAME, index), ("config.json", self.plan.config)):
            write_json(directory / name, content)
        shutil.rmtree(directory / WORK)
        return note


def begin(plan: Plan, directory: Path, settings: dict) -> None:
    """Make the directory ready, or find in it an earlier run with the same settings.

    Raises:
        QuantizeError: something else is there, or the disk has too little room.
    """
    source = plan.checkpoint.path
    if directory.exists() and directory.samefile(source):
        raise QuantizeError(f"{directory} is the source itself: give a new directory")
    if directory.exists() and not directory.is_dir():
        raise QuantizeError(f"{directory} is not a directory: give a new one")
    state = directory / WORK / "settings.json"
    if state.is_file():
        if _read_json(state) != settings:
            raise QuantizeError(
                f"{directory} holds a quantisation that was begun with other options or from "
                "another source: repeat those, or give a new directory"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise QuantizeError(f"{directory} is not empty: give a new directory")
    check_room(plan, directory)
    with _writing(directory):
        write_json(state, settings)


def check_room(plan: Plan, directory: Path) -> None:
    """Raises QuantizeError where the disk cannot take what is not written yet."""
    needed = sum(
        sum(part.nbytes for part in parts)
        for name, parts in plan.shards.items()
        if not (directory / name).is_file()
    )
    needed += _MARGIN_NBYTES
    kept = sum(f.stat().st_size for f in directory.glob(f"*{PARTIAL}"))
    free = free_nbytes(directory) + kept
    if free < needed:
        way_out = "give a directory on another disk"
        raise QuantizeError(disk_too_full(directory, needed, free, way_out))


def fingerprint(plan: Plan, shard_nbytes: int, calibration: dict | None) -> dict:
    """What must be the same for a run to go on with what an earlier one left."""
    return {
        "version": 2,
        "recipe": asdict(plan.recipe),
        "shard": shard_nbytes,
        "source": {"config": plan.checkpoint.config, "files": plan.checkpoint.files_identity},
        "calibration": calibration,
    }


def finished(directory: Path, name: str) -> dict | None:
    """What an earlier run noted of a shard, if the shard still is what that run wrote."""
    try:
        found = _read_json(directory / WORK / f"{name}.json")
        if (directory / name).stat().st_size != found["nbytes"]:
            return None
        return found if _digest(directory / name) == found["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """One run at a time in a directory; errors of the disk are told to the user."""
    try:
        (directory / WORK).mkdir(parents=True, exist_ok=True)
        with open(directory / WORK / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise QuantizeError(f"another process is filling {directory}: wait for it") from e
            yield
    except OSError as e:
        raise QuantizeError(
            f"cannot write {e.filename or directory}: {e.strerror}. What is finished is kept: "
            "mend that, and run the same command again"
        ) from e


def _read_json(file: Path):
    return json.loads(file.read_text())


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while data := f.read(COPY_NBYTES):
            digest.update(data)
    return digest.hexdigest()


def _check_block(
    part: Part, expert: int, out: ShardWriter, error: float, energy: float, plain: float
) -> None:
    """error: of what was read back; energy: of the weights; plain: what rounding allows."""
    where = part.path + (f", expert {expert}" if part.layer is not None else "")
    if not math.isfinite(energy):
        raise CheckpointError(
            f"{where} has weights that are no finite numbers: "
            f"{part.sources['weight'].file.name} is corrupt; download it again"
        )
    # Sums of float32 differ in their last digits.
    if not error <= plain * 1.001 + 1e-9 * energy:
        raise QuantizeError(
            f"{where}: what {out.partial} gives back has the error {error:.6g}, and rounding "
            f"allows {plain:.6g}: the disk or the memory is faulty"
        )


def _check_header(path: Path, parts: list[Part]) -> None:
    found = {t.name: (t.dtype, t.shape) for t in read_header(path)[1]}
    if found != {t.name: (t.dtype, t.shape) for p in parts for t in p.targets}:
        raise QuantizeError(f"{path} does not hold what was written: the disk is faulty")
