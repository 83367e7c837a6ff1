"""Measures how the experts of a checkpoint are read fastest: mode, depth, and split of ranges.

Random experts are read as decoding reads them: some at a time, by the real reader into real slots,
and nothing is computed. Of two ways that are as fast, the one that takes less of the processor is
better: it is what computes meanwhile.
"""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

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

#: Speeds that differ by less are the same.
SAME = 0.05


@dataclass(frozen=True)
class Measured:
    """gb_per_s: of expert bytes. cpu_ms_per_gb: processor time of this process, user and system."""

    drive: Drive
    gb_per_s: float
    cpu_ms_per_gb: float


def probe(
    checkpoint: Checkpoint, *, seconds: float = 0.6, report: Callable[[Measured], None] = print
) -> Drive:
    """The best way to read this checkpoint on its drive.

    Args:
        seconds: of each measurement; there are some twenty.
        report: takes each of them.
    """
    batches = _batches(checkpoint)

    def best(drives: list[Drive]) -> Drive:
        found = []
        for drive in drives:
            found.append(_measure(checkpoint, drive, batches, seconds))
            report(found[-1])
        fastest = max(m.gb_per_s for m in found)
        near = [m for m in found if m.gb_per_s >= fastest * (1 - SAME)]
        return min(near, key=lambda m: (m.cpu_ms_per_gb, m.drive.depth)).drive

    depth = best([Drive("direct", depth) for depth in DEPTHS]).depth
    ranges = {part.nbytes for layer in checkpoint.expert_layers.values() for part in layer.parts}
    splits = [s for s in SPLITS if s < max(ranges)]
    split = best([Drive("direct", depth, s) for s in splits]).split
    return best([Drive(io, depth, split) for io in IO_MODES])


def quick(checkpoint: Checkpoint, drive: Drive, *, seconds: float = 0.6) -> Measured:
    """One way to read, at random places of the files: little memory, and a small model will do."""
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

        read()  # takes the pages of the buffers
        return _timed(drive, reader, read, seconds)


def paced(
    batches: Iterator[list[tuple[Path, int, int]]],
    identities: dict[Path, FileIdentity],
    drive: Drive,
    *,
    pause: float,
    seconds: float,
) -> Measured:
    """How fast a drive gives batches of ranges with pauses between them, as decoding reads: some
    drives give more to one who rests.

    Args:
        batches: (file, start, bytes) of the reads that go on together, without end.
        pause: seconds between the end of a batch and the next one; they do not count.
    """
    room, pages = 0, None
    with Reader(drive.depth, identities, drive.io, drive.split) as reader:

        def read() -> float:
            nonlocal room, pages
            batch, at, requests = next(batches), 0, []
            needed = sum(nbytes + 2 * BLOCK for _, _, nbytes in batch)
            if needed > room:
                # Huge pages, as slots have: fewer pieces for the drive.
                room, pages = needed, memoryview(allocate_pages(needed))
                pages[:] = bytes(needed)  # takes them
            for file, start, nbytes in batch:
                # In blocks as the bytes in the file, as slots lie.
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
    """(file, start, bytes), without end: whole blocks, as the experts of real models mostly are."""
    drawn = random.Random(0)
    sizes = {file: identity.nbytes for file, identity in checkpoint.identities.items()}
    while True:
        (file,) = drawn.choices(list(sizes), list(sizes.values()))
        start = drawn.randrange(max(1, sizes[file] - QUICK_NBYTES)) // BLOCK * BLOCK
        yield file, start, min(QUICK_NBYTES, sizes[file])


def _batches(checkpoint: Checkpoint) -> Iterator[list[tuple[int, int]]]:
    """(layer, expert) of the K experts of one token in one layer, without end, seldom repeating."""
    drawn = random.Random(0)
    layers = list(checkpoint.expert_layers)
    experts = range(checkpoint.num_experts)
    while True:
        for layer in layers:
            yield [(layer, e) for e in sorted(drawn.sample(experts, checkpoint.top_k))]


def _measure(checkpoint: Checkpoint, drive: Drive, batches: Iterator, seconds: float) -> Measured:
    for file in checkpoint.files:
        forget(file)
    banks = {
        layer: SlotMemory(experts, checkpoint.top_k, on_gpu=False)
        for layer, experts in checkpoint.expert_layers.items()
    }
    with Reader(drive.depth, checkpoint.identities, drive.io, drive.split) as reader:

        def read() -> None:
            pending = [
                reader.submit(banks[layer].requests(expert, slot))
                for slot, (layer, expert) in enumerate(next(batches))
            ]
            for reads in pending:
                reads.wait()

        for _ in checkpoint.expert_layers:
            read()  # takes the pages of the slots
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


def forget(file) -> None:
    """Drop a file from the page cache, where the system can: buffered reads must reach the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
