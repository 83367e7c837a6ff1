"""Rounds a checkpoint to fewer bits, tensor by tensor and expert by expert.

Memory holds one block of rows at a time, whatever the size of the checkpoint: about 0.1 GB besides
imported modules. A calibration adds 4 bytes for each row of gate and each column of a layer's
input.

A shard gets its final name only when it is complete, synced and read back. Its checksum is kept
beside it until the end, so that a run that was killed resumes after the last good shard.
config.json is written last: before that, nothing takes the directory for a model.
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
from typing import Any

import numpy as np

from ..checkpoint.quantization import Quantization
from ..checkpoint.safetensors_header import INDEX_NAME, Tensor, read_header
from ..checkpoint.safetensors_writer import ShardWriter, index_of
from ..errors import CheckpointError, QuantizeError
from ..files import PARTIAL, disk_too_full, free_nbytes, write_json
from ..terminal import format_number
from .extra_files import NOTE, copy_file, extra_files
from .recipe import QuantizePlan, TensorPlan
from .rounding import Rounded, round_weights, weighted_squares
from .weights import narrow, read_back, read_bytes, read_weights

#: Name of the directory, inside the one being filled, that a run keeps its state in until the end.
WORK = ".quantize"

#: Weights that are rounded together: 8 MB of float32, and the same again a few times.
BLOCK_WEIGHTS = 2 * 2**20
COPY_NBYTES = 8 * 2**20

_MARGIN_NBYTES = 16 * 2**20

#: (layer, role, expert) -> importance of each column of a matrix; None: all count the same.
Importance = Callable[[int, str, int], "np.ndarray | None"]


@dataclass
class RoundingErrors:
    """Sums of importance * square over the weights of one role.

    Attributes:
        error: sum for the rounding errors.
        plain: sum for the errors that plain rounding would make.
        energy: sum for the weights themselves.
    """

    error: float = 0.0
    plain: float = 0.0
    energy: float = 0.0

    def add(self, error: float, plain: float, energy: float) -> None:
        """Add the sums of further weights."""
        self.error += error
        self.plain += plain
        self.energy += energy

    def summary(self) -> dict[str, float]:
        """Return the errors relative to the weights: 0.1 is an error of a tenth."""
        energy = self.energy or 1.0
        return {
            "error": round(math.sqrt(self.error / energy), 6),
            "plain": round(math.sqrt(self.plain / energy), 6),
        }


@dataclass
class Quantizer:
    """Writes one quantised checkpoint into a directory that `prepare_directory` has accepted.

    Attributes:
        plan: what to write.
        directory: where to write it.
        note: what is noted beside the weights, in the file NOTE; the errors are added.
        advance: called with the amount of work done, in the plan's work units.
        importance: importance of the columns of a matrix.
        errors: sums by role.
    """

    plan: QuantizePlan
    directory: Path
    note: dict
    advance: Callable[[int], None] = lambda done: None
    importance: Importance = lambda layer, role, expert: None
    errors: dict[str, RoundingErrors] = field(default_factory=dict)

    def write(self) -> dict:
        """Write everything that is not written yet, and return the note.

        Raises:
            QuantizeError: the disk is full, or does not return what was written.
            CheckpointError: the source is corrupt.
        """
        with _writing(self.directory):
            for name, tensors in self.plan.shards.items():
                shard = read_finished_shard(self.directory, name)
                if shard is None:
                    shard = self._write_shard(name, tensors)
                else:
                    self.advance(sum(tensor.work_units for tensor in tensors))
                for role, sums in shard["errors"].items():
                    self.errors.setdefault(role, RoundingErrors()).add(**sums)
            return self._finish()

    def _write_shard(self, name: str, tensors: list[TensorPlan]) -> dict:
        errors: dict[str, RoundingErrors] = {}
        path = self.directory / name
        with ShardWriter(path, [target for t in tensors for target in t.targets]) as out:
            for tensor in tensors:
                if tensor.new is None:
                    self._copy(tensor, out)
                else:
                    sums = errors.setdefault(tensor.role, RoundingErrors())
                    self._round(tensor, tensor.new, out, sums)
            out.sync()
            shard: dict[str, Any] = {"nbytes": out.nbytes, "sha256": _digest(out.partial)}
            _check_header(out.partial, tensors)
            shard["errors"] = {role: asdict(sums) for role, sums in errors.items()}
            out.publish()
        write_json(self.directory / WORK / f"{name}.json", shard)
        return shard

    def _copy(self, tensor: TensorPlan, out: ShardWriter) -> None:
        for source in tensor.sources.values():
            with self._open(source) as fd:
                for start in range(0, source.nbytes, COPY_NBYTES):
                    data = read_bytes(fd, source, start, min(COPY_NBYTES, source.nbytes - start))
                    out.write(source.name, start, data)
                    self.advance(len(data))

    def _round(
        self, tensor: TensorPlan, new: Quantization, out: ShardWriter, errors: RoundingErrors
    ) -> None:
        *experts, rows, width = tensor.shape
        step = max(1, BLOCK_WEIGHTS // width)
        dtype = tensor.targets[1].dtype
        with self._open_all(tensor) as fds:
            for expert in range(math.prod(experts)):
                importance = None
                if tensor.layer is not None:
                    importance = self.importance(tensor.layer, tensor.role, expert)
                h = np.ones(width, np.float32) if importance is None else importance
                for first in range(0, rows, step):
                    start = expert * rows + first
                    w = read_weights(tensor, fds, start, min(step, rows - first))
                    rounded = round_weights(w, h, new.bits, new.group_size, dtype)
                    _store(tensor, out, start, rounded)
                    error, energy = weighted_squares(
                        w, h, read_back(tensor, new, out, start, len(w))
                    )
                    _check_block(tensor, expert, out, error, energy, rounded.plain)
                    errors.add(rounded.error, rounded.plain, energy)
                    self.advance(w.size)

    @contextmanager
    def _open(self, source: Tensor) -> Iterator[int]:
        try:
            fd = os.open(source.file, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(
                f"cannot read {source.file} ({e.strerror}): check the source checkpoint"
            ) from e
        try:
            change = self.plan.checkpoint.identities[source.file].change(fd)
            if change:
                raise CheckpointError(f"{source.file} {change}: start again with a new directory")
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _open_all(self, tensor: TensorPlan) -> Iterator[dict[str, int]]:
        fds: dict[str, int] = {}
        try:
            for name, source in tensor.sources.items():
                with self._open(source) as fd:
                    fds[name] = os.dup(fd)
            yield fds
        finally:
            for fd in fds.values():
                os.close(fd)

    def _finish(self) -> dict:
        directory = self.directory
        for name, file in extra_files(self.plan.checkpoint.path).items():
            copy_file(file, directory / name)
        index = index_of(
            {
                name: [target for tensor in tensors for target in tensor.targets]
                for name, tensors in self.plan.shards.items()
            }
        )
        note = self.note | {"errors": {r: e.summary() for r, e in self.errors.items()}}
        for name, content in ((NOTE, note), (INDEX_NAME, index), ("config.json", self.plan.config)):
            write_json(directory / name, content)
        shutil.rmtree(directory / WORK)
        return note


def prepare_directory(plan: QuantizePlan, directory: Path, settings: dict) -> None:
    """Prepare an empty directory, or accept one in which a run with the same settings started.

    Args:
        settings: see `run_settings`.

    Raises:
        QuantizeError: the directory holds something else, or the disk has too little space.
        CheckpointError: the source has files that must not be copied, see `extra_files`.
    """
    source = plan.checkpoint.path
    if directory.exists() and directory.samefile(source):
        raise QuantizeError(f"{directory} is the source itself: choose a new directory")
    if directory.exists() and not directory.is_dir():
        raise QuantizeError(f"{directory} is not a directory: choose a new directory")
    state = directory / WORK / "settings.json"
    if state.is_file():
        if _read_json(state) != settings:
            raise QuantizeError(
                f"{directory} holds an unfinished quantisation with other options or from another "
                "source: run it again with the same options, or choose a new directory"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise QuantizeError(f"{directory} is not empty: choose a new directory")
    extra_files(source)
    check_free_space(plan, directory)
    with _writing(directory):
        write_json(state, settings)


def check_free_space(plan: QuantizePlan, directory: Path) -> None:
    """Check that the disk has space for everything that is not written yet.

    Raises:
        QuantizeError: it has too little.
    """
    needed = sum(
        sum(tensor.nbytes for tensor in tensors)
        for name, tensors in plan.shards.items()
        if not (directory / name).is_file()
    )
    needed += _MARGIN_NBYTES
    # A partial shard of an earlier run is overwritten, so its bytes count as free.
    kept = sum(f.stat().st_size for f in directory.glob(f"*{PARTIAL}"))
    free = free_nbytes(directory) + kept
    if free < needed:
        way_out = "choose a directory on another disk"
        raise QuantizeError(disk_too_full(directory, needed, free, way_out))


def run_settings(plan: QuantizePlan, shard_nbytes: int, calibration: dict | None) -> dict:
    """Return the settings that must be the same for a run to resume an earlier one.

    Args:
        calibration: see `flashmoe.quantize.calibration.describe`; None: no calibration.
    """
    return {
        "version": 2,
        "recipe": asdict(plan.recipe),
        "shard": shard_nbytes,
        "source": {"config": plan.checkpoint.config, "files": plan.checkpoint.files_identity},
        "calibration": calibration,
    }


def read_finished_shard(directory: Path, name: str) -> dict | None:
    """Return what an earlier run noted about a shard; None unless the shard is still as it was."""
    try:
        shard = _read_json(directory / WORK / f"{name}.json")
        if (directory / name).stat().st_size != shard["nbytes"]:
            return None
        return shard if _digest(directory / name) == shard["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(tensor: TensorPlan, out: ShardWriter, row: int, rounded: Rounded) -> None:
    weight, scales, biases = tensor.targets
    out.write(weight.name, row * rounded.weight[0].nbytes, rounded.weight.data)
    for target, values in ((scales, rounded.scales), (biases, rounded.biases)):
        data = narrow(values, target.dtype)
        out.write(target.name, row * data[0].nbytes, data.data)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Allow one run at a time in a directory, and turn disk errors into QuantizeError."""
    try:
        (directory / WORK).mkdir(parents=True, exist_ok=True)
        with open(directory / WORK / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise QuantizeError(
                    f"another process is writing to {directory}: wait until it ends"
                ) from e
            yield
    except OSError as e:
        raise QuantizeError(
            f"cannot write {e.filename or directory} ({e.strerror}): fix that and run the same "
            "command again; finished shards are kept"
        ) from e


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while data := f.read(COPY_NBYTES):
            digest.update(data)
    return digest.hexdigest()


def _check_block(
    tensor: TensorPlan, expert: int, out: ShardWriter, error: float, energy: float, plain: float
) -> None:
    """Check a block that was written and read back.

    Args:
        error: sum of importance * square of the errors that were read back.
        energy: the same sum for the weights.
        plain: the same sum for plain rounding, which no block may exceed.
    """
    where = tensor.path + (f", expert {expert}" if tensor.layer is not None else "")
    if not math.isfinite(energy):
        raise CheckpointError(
            f"{where} has weights that are not finite numbers: "
            f"{tensor.sources['weight'].file.name} is corrupt, download it again"
        )
    # Sums of float32 differ in their last digits.
    if not error <= plain * 1.001 + 1e-9 * energy:
        raise QuantizeError(
            f"{where}: the weights read back from {out.partial} have the error "
            f"{format_number(error, 6)}, and rounding allows only {format_number(plain, 6)}: check "
            "the disk and the memory, one of them is faulty"
        )


def _check_header(path: Path, tensors: list[TensorPlan]) -> None:
    written = {t.name: (t.dtype, t.shape) for t in read_header(path)[1]}
    if written != {t.name: (t.dtype, t.shape) for p in tensors for t in p.targets}:
        raise QuantizeError(f"{path} does not hold what was written: check the disk, it is faulty")
