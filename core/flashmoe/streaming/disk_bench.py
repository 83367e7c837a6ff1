"""Measure how the experts of a checkpoint are read fastest: mode, depth, and split of ranges.

Random experts are read as decoding reads them: some at a time, by the real reader into real slots,
and nothing is computed. Of two ways that are equally fast, the one that takes less processor time
is better, because the processor computes at the same time.
"""

from __future__ import annotations

import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

from .. import macos
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.file_identity import FileIdentity
from .drives import Drive
from .io_modes import BLOCK, IO_MODES
from .reader import Reader, ReadRequest
from .slot_memory import SlotMemory, allocate_pages

DEPTHS = (1, 2, 4, 8, 16)
SPLITS = (0, 1 << 20, 1 << 18)

#: Bytes of each read of a quick measurement: about one matrix of an expert of a real model.
QUICK_NBYTES = 1 << 20

#: Speeds that differ by a smaller share count as equal.
SAME = 0.05


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        drive: how the drive was read.
        gb_per_s: expert bytes read per second, in 10**9.
        cpu_ms_per_gb: user and system time of this process, for 10**9 bytes.
    """

    drive: Drive
    gb_per_s: float
    cpu_ms_per_gb: float


def probe(
    checkpoint: Checkpoint, *, seconds: float = 0.6, report: Callable[[Measured], None] = print
) -> Drive:
    """Return the best way to read this checkpoint on its drive.

    Args:
        seconds: length of each measurement; there are some twenty.
        report: takes each measurement.
    """
    batches = _batches(checkpoint)

    def best(drives: list[Drive]) -> Drive:
        measurements = []
        for drive in drives:
            measurements.append(_measure(checkpoint, drive, batches, seconds))
            report(measurements[-1])
        fastest = max(m.gb_per_s for m in measurements)
        near = [m for m in measurements if m.gb_per_s >= fastest * (1 - SAME)]
        return min(near, key=lambda m: (m.cpu_ms_per_gb, m.drive.depth)).drive

    depth = best([Drive("direct", depth) for depth in DEPTHS]).depth
    ranges = {part.nbytes for layer in checkpoint.expert_layers.values() for part in layer.parts}
    splits = [s for s in SPLITS if s < max(ranges)]
    split = best([Drive("direct", depth, s) for s in splits]).split
    return best([Drive(io, depth, split) for io in IO_MODES])


def quick(checkpoint: Checkpoint, drive: Drive, *, seconds: float = 0.6) -> Measured:
    """Measure one way to read, at random places of the files.

    It takes little memory, and a small model is enough.
    """
    ranges = _ranges(checkpoint)
    # Huge pages, as slots have: fewer pieces for the drive.
    pages = memoryview(allocate_pages(2 * drive.depth * QUICK_NBYTES))
    buffers = [pages[i : i + QUICK_NBYTES] for i in range(0, len(pages), QUICK_NBYTES)]
    for file in checkpoint.files:
        forget(file)
    with Reader(drive.depth, checkpoint.identities, drive.io, drive.split) as reader:

        def read() -> None:
            requests = [
                ReadRequest(file, start, buffer[:nbytes], 0, 0)
                for buffer, (file, start, nbytes) in zip(buffers, ranges, strict=False)
            ]
            for pending in [reader.submit([request]) for request in requests]:
                pending.wait()

        read()  # so that the pages of the buffers exist
        return _timed(drive, reader, read, seconds)


def paced(
    batches: Iterator[list[tuple[Path, int, int]]],
    identities: dict[Path, FileIdentity],
    drive: Drive,
    *,
    pause: float,
    seconds: float,
) -> Measured:
    """Measure batches of ranges with pauses between them, as decoding reads.

    Some drives are faster after a pause.

    Args:
        batches: (file, start, bytes) of the reads that run together, without end.
        pause: seconds between the end of a batch and the next one; they do not count.
    """
    size, pages = 0, memoryview(b"")
    with Reader(drive.depth, identities, drive.io, drive.split) as reader:

        def read() -> float:
            nonlocal size, pages
            batch, at = next(batches), 0
            requests: list[ReadRequest] = []
            needed = sum(nbytes + 2 * BLOCK for _, _, nbytes in batch)
            if needed > size:
                # Huge pages, as slots have: fewer pieces for the drive.
                size, pages = needed, memoryview(allocate_pages(needed))
                pages[:] = bytes(needed)  # so that the pages exist
            for file, start, nbytes in batch:
                # Aligned in blocks as the bytes in the file are, like slots.
                at += (start - at) % BLOCK
                requests.append(ReadRequest(file, start, pages[at : at + nbytes], 0, 0))
                at += nbytes
            begin = perf_counter()
            for pending in [reader.submit([request]) for request in requests]:
                pending.wait()
            return perf_counter() - begin

        read()
        before, cpu, start, reading = reader.stats.bytes, _cpu_seconds(), perf_counter(), 0.0
        while perf_counter() - start < seconds:
            reading += read()
            sleep(pause)
        nbytes = reader.stats.bytes - before
    cpu = _cpu_seconds() - cpu
    return Measured(drive, nbytes / reading / 1e9, 1e3 * cpu / (nbytes / 1e9))


def _ranges(checkpoint: Checkpoint) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, start, bytes) without end.

    The ranges begin at blocks, as the experts of real models mostly do.
    """
    drawn = random.Random(0)
    sizes = {file: identity.nbytes for file, identity in checkpoint.identities.items()}
    while True:
        (file,) = drawn.choices(list(sizes), list(sizes.values()))
        start = drawn.randrange(max(1, sizes[file] - QUICK_NBYTES)) // BLOCK * BLOCK
        yield file, start, min(QUICK_NBYTES, sizes[file])


def _batches(checkpoint: Checkpoint) -> Iterator[list[tuple[int, int]]]:
    """Yield (layer, expert) of the K experts of one token in one layer, without end.

    They seldom repeat.
    """
    drawn = random.Random(0)
    layers = list(checkpoint.expert_layers)
    experts = range(checkpoint.num_experts)
    while True:
        for layer in layers:
            yield [(layer, e) for e in sorted(drawn.sample(experts, checkpoint.top_k))]


def _measure(checkpoint: Checkpoint, drive: Drive, batches: Iterator, seconds: float) -> Measured:
    for file in checkpoint.files:
        forget(file)
    memories = {
        layer: SlotMemory(experts, checkpoint.top_k, on_gpu=False)
        for layer, experts in checkpoint.expert_layers.items()
    }
    with Reader(drive.depth, checkpoint.identities, drive.io, drive.split) as reader:

        def read() -> None:
            pending = [
                reader.submit(memories[layer].requests(expert, slot))
                for slot, (layer, expert) in enumerate(next(batches))
            ]
            for reads in pending:
                reads.wait()

        for _ in checkpoint.expert_layers:
            read()  # so that the pages of the slots exist
        return _timed(drive, reader, read, seconds)


def _timed(drive: Drive, reader: Reader, read: Callable[[], None], seconds: float) -> Measured:
    before, cpu, start = reader.stats.bytes, _cpu_seconds(), perf_counter()
    while perf_counter() - start < seconds:
        read()
    nbytes = reader.stats.bytes - before
    return Measured(
        drive,
        nbytes / (perf_counter() - start) / 1e9,
        1e3 * (_cpu_seconds() - cpu) / (nbytes / 1e9),
    )


def forget(file: Path) -> None:
    """Drop a file from the page cache, where the system can, so that reads reach the disk."""
    if sys.platform == "linux":
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        macos.drop_cached_pages(file)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
