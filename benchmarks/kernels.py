"""Measure how close the CPU kernels come to the speed of memory.

A token reads each weight of its experts once and uses it for one multiply-add, so decode cannot be
faster than memory: the bound is bytes of weights (with scales and biases) / read bandwidth. To
mask, convert and add a 4-bit weight takes about 3/16 of a 512-bit instruction, so with few cores
arithmetic is the bound instead; with x rounded to int8 it is memory again. Prefill uses each weight
for R rows: the product that unpacks the weights for each row is compared with `gemm`, which unpacks
them once for all rows; the crossover decides which one `matmul` takes. The bound there is
arithmetic. For comparison, BLAS multiplies a matrix that was unpacked into memory first.

The experts are spread over --gib of memory, far more than the caches hold. Rounds alternate between
all kernels and a plain read of memory, because a shared machine drifts; figures are medians. The
last line is JSON.

    python benchmarks/kernels.py [--gib 1] [--rounds 7]
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable

import click
import numba
import numpy as np

from flashmoe.ops.cpu import gemm
from flashmoe.ops.cpu.matvec import Packed, dequantize, gate_up, matvec

HIDDEN, EXPERT, DENSE = 4096, 1024, 12288  # Qwen3.5-397B-A17B
GROUP = 64
WAYS = ("packed", "int8", "unpacked", "BLAS")


@numba.njit(parallel=True, nogil=True, fastmath=True)
def read(array):
    """Read an array once, on all threads."""
    total = 0
    for i in numba.prange(array.size):
        total += array[i]
    return total


def stack(pool: np.ndarray, height: int, width: int, bits: int = 4) -> Packed:
    """Return as many matrices as the pool of bytes holds: random codes, scales of zero."""
    row = width * bits // 8
    slots = pool.size // (height * row)
    weight = pool[: slots * height * row].reshape(slots, height, row)
    if bits == 16:
        return Packed(weight, None, None, bits, 0, "bfloat16")
    scales = np.zeros((slots, height, width // GROUP), np.uint16)
    return Packed(weight, scales, scales.copy(), bits, GROUP, "bfloat16")


def size(w: Packed) -> int:
    """Return the bytes of one matrix."""
    parts = (w.weight, w.scales, w.biases)
    return sum(part[0].nbytes for part in parts if part is not None)


def decode(stacks, pairs: int):
    """Return a function that multiplies the next `pairs` matrices, and the bytes that it reads."""
    w = stacks[0]
    _, height, width = w.shape
    x, out = np.ones((1, width), np.float32), np.empty((pairs, height), np.float32)
    rows, first = np.zeros(pairs, np.int64), 0

    def call():
        nonlocal first
        slots = (np.arange(pairs) + first) % w.shape[0]
        first += pairs
        if len(stacks) == 2:
            gate_up(*stacks, slots, x, rows, out)
        else:
            matvec(w, slots, x, rows, out)

    return call, pairs * sum(map(size, stacks))


def seconds(call, repeat: int) -> list[float]:
    """Return the seconds of each of `repeat` calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def multiply(way: str, w, x, out):
    """Return a function that multiplies several rows in one of WAYS, by a new matrix each time."""
    slot, rows = 0, np.arange(len(x))
    tile = np.empty(w.shape[1:], np.float32)
    if way == "int8":
        w = dataclasses.replace(w, activations="int8")

    def call():
        nonlocal slot
        slot = (slot + 1) % w.shape[0]
        if way == "unpacked":
            gemm.product(w, slot, x, out)
        elif way == "BLAS":
            dequantize(w, slot, tile)
            np.matmul(x, tile.T, out=out)
        else:
            matvec(w, np.full(len(x), slot), x, rows, out)

    return call


@click.command()
@click.option("--gib", default=1.0, help="GiB of memory that the experts are spread over.")
@click.option("--rounds", default=7)
def main(gib: float, rounds: int) -> None:
    pool = np.random.default_rng(0).integers(0, 2**63, int(gib * 2**27), np.int64)
    noise = pool.view(np.uint8)
    calls = {"read memory": (lambda: read(pool), pool.nbytes)}
    up = stack(noise, EXPERT, HIDDEN)
    down = stack(noise, HIDDEN, EXPERT)
    cases: dict[str, tuple] = {}
    for pairs in (1, 4, 10):
        cases[f"gate_up 4-bit K={pairs}"] = (up, up), pairs
        cases[f"matvec 4-bit {HIDDEN}->{EXPERT} K={pairs}"] = (up,), pairs
        cases[f"matvec 4-bit {EXPERT}->{HIDDEN} K={pairs}"] = (down,), pairs
    cases[f"matvec 4-bit {HIDDEN}->{DENSE}"] = (stack(noise, DENSE, HIDDEN),), 1
    for bits in (2, 3, 5, 6, 8, 16):
        name = "bf16" if bits == 16 else f"{bits}-bit"
        w = stack(noise, EXPERT, HIDDEN, bits)
        cases[f"matvec {name} {HIDDEN}->{EXPERT} K=4"] = (w,), 4
    for name, (stacks, pairs) in cases.items():
        calls[name] = decode(stacks, pairs)
        rounded = [dataclasses.replace(w, activations="int8") for w in stacks]
        if rounded[0].rounds_x:
            calls[f"{name} int8"] = decode(rounded, pairs)
    tile = np.empty((EXPERT, HIDDEN), np.float32)
    calls["dequantize 4-bit"] = lambda: dequantize(up, 0, tile), size(up)

    prefill: dict[tuple, Callable] = {}
    blas: dict[tuple, Callable] = {}
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 40, 64, 128, 512):
        x, out = np.ones((rows, HIDDEN), np.float32), np.empty((rows, EXPERT), np.float32)
        for way in WAYS:
            part = blas if way == "BLAS" else prefill
            part[rows, way] = multiply(way, up, x, out)

    times: dict = defaultdict(list)
    # BLAS is last: its threads spin for a while after a call and slow down what comes next.
    for part in ({key: call for key, (call, _) in calls.items()}, prefill, blas):
        for number in range(rounds + 1):
            for key, call in part.items():
                long = key == "read memory" or key[0] in (128, 512)
                taken = seconds(call, 1 if long else 10)
                if number:  # the first round compiles
                    times[key] += taken
    medians = {key: float(np.median(taken)) for key, taken in times.items()}

    speeds = {key: total / medians[key] / 1e9 for key, (_, total) in calls.items()}
    for name, speed in speeds.items():
        print(f"{name:38} {speed:6.1f} GB/s {100 * speed / speeds['read memory']:5.0f} %")
    print(f"\nmatmul {HIDDEN}->{EXPERT}, GFLOPS: rows " + " ".join(f"{way:>8}" for way in WAYS))
    table = []
    for rows in sorted({rows for rows, _ in prefill}):
        flops = [2e-9 * rows * HIDDEN * EXPERT / medians[rows, way] for way in WAYS]
        table.append([rows, *flops])
        print(f"{rows:31} " + " ".join(f"{f:8.1f}" for f in flops))
    result = {"threads": numba.get_num_threads(), "gb_per_s": speeds, "matmul_gflops": table}
    print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
