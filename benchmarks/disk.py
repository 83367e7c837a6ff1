"""Measure how fast the drive reads experts when nothing is computed: the bound of streaming.

    python benchmarks/disk.py CHECKPOINT [--depth 8] [--seconds 2]

It reads whole ranges of random experts (the sizes that streaming reads), as many at a time as
streaming does, past the page cache (O_DIRECT) into aligned buffers whose pages were touched before.
A token that misses M bytes cannot take less than M / this bandwidth. Figures count the bytes of the
ranges, without those that alignment adds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

ALIGNMENT = 4096
Range = tuple[Path, int, int]  # file, first byte, bytes


def experts(path: Path, seed: int = 0) -> Iterator[Range]:
    """Yield the ranges of random experts of an MLX checkpoint, without end."""
    from flashmoe.checkpoint.checkpoint import Checkpoint

    layers = list(Checkpoint.open(path).expert_layers.values())
    draw = random.Random(seed)
    while True:
        layer = draw.choice(layers)
        expert = draw.randrange(layer.num_experts)
        for part in layer.parts:
            yield part.file, part.range(expert)[0], part.nbytes


def pieces(path: Path, size: int, seed: int = 0) -> Iterator[Range]:
    """Yield random ranges of `size` bytes of one file, without end."""
    draw = random.Random(seed)
    places = path.stat().st_size // size
    while True:
        yield path, draw.randrange(places) * size, size


def bandwidth(ranges: Iterator[Range], depth: int, seconds: float) -> float | None:
    """Return bytes per second with `depth` reads in flight; None where O_DIRECT does not work."""
    if not hasattr(os, "O_DIRECT"):
        return None
    next(ranges)  # a generator may open a checkpoint first
    lock = threading.Lock()
    files: dict[Path, int] = {}
    done: list[tuple[int, float]] = []
    begin = threading.Barrier(depth)

    def work() -> None:
        buffer = mmap.mmap(-1, 1 << 23, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)  # as slots do: twice as fast on some drives
        buffer.write(bytes(len(buffer)))  # allocates its pages
        view = memoryview(buffer)
        begin.wait()
        stop = perf_counter() + seconds
        while perf_counter() < stop:
            with lock:
                path, start, nbytes = next(ranges)
                if path not in files:
                    files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
            first = start // ALIGNMENT * ALIGNMENT
            end = -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
            while first < end:
                got = os.preadv(files[path], [view[: min(end - first, len(view))]], first)
                first += got
                if got == 0 or got % ALIGNMENT:  # the end of the file
                    break
            done.append((nbytes, perf_counter()))

    def safely() -> None:
        try:
            work()
        except OSError as e:
            done.append((-1, 0.0))
            print(f"disk: {e}", file=sys.stderr)

    threads = [threading.Thread(target=safely) for _ in range(depth)]
    started = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd in files.values():
        os.close(fd)
    if any(nbytes < 0 for nbytes, _ in done):
        return None
    return sum(nbytes for nbytes, _ in done) / (max(end for _, end in done) - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    speed = bandwidth(experts(args.path), args.depth, args.seconds)
    print(json.dumps({"benchmark": "disk", "depth": args.depth, "bytes_per_second": speed}))


if __name__ == "__main__":
    main()
