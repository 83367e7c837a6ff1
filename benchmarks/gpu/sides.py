"""Run the sides of a comparison, each in a process of its own.

MLX reads its settings once. flashmoe sets some of them (`flashmoe.ops.gpu.fused.SETTINGS`), which
users of stock mlx-lm do not have, so stock is timed with MLX's own settings and with flashmoe's.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from flashmoe.ops.gpu.fused import SETTINGS

#: Name of a side -> whose code it runs, and whether it has our settings.
SIDES = {
    "stock": ("stock", False),
    "stock, our settings": ("stock", True),
    "ours": ("ours", True),
}


class Sides:
    """Processes that each prepare one side of a comparison, and run its functions on request.

    Args:
        make: called in each process with "stock" or "ours" and `arguments`; returns the functions
            of this side by name.
    """

    def __init__(self, make: Callable[..., dict[str, Callable[[], Any]]], **arguments):
        self._make, self._arguments = make, arguments
        self._pipes: dict[str, Any] = {}

    def __enter__(self) -> Sides:
        context = multiprocessing.get_context("spawn")
        for name, (side, ours) in SIDES.items():
            pipe, other = context.Pipe()
            work = (other, self._make, side, self._arguments, ours)
            context.Process(target=_work, args=work, daemon=True).start()
            other.close()
            pipe.recv()  # start one after the other: they read the same disk, and compile
            self._pipes[name] = pipe
        return self

    def __exit__(self, *_) -> None:
        for pipe in self._pipes.values():
            pipe.close()

    def run(self, side: str, what: str) -> tuple[float, Any]:
        """Run a function of a side; return its seconds and its result."""
        self._pipes[side].send(what)
        return self._pipes[side].recv()

    def alternated(self, what: str, rounds: int) -> dict[str, float]:
        """Return the median seconds of each side; each round runs all sides once."""
        times: dict[str, list[float]] = {side: [] for side in self._pipes}
        for side in times:
            self.run(side, what)
            self.run(side, what)
        for _ in range(rounds):
            for side, seconds in times.items():
                seconds.append(self.run(side, what)[0])
        return {side: statistics.median(seconds) for side, seconds in times.items()}


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Return the times of the other sides, divided by ours."""
    return {n: round(t / times["ours"], 2) for n, t in times.items() if n != "ours"}


def _work(pipe, make, side: str, arguments: dict, ours: bool) -> None:
    # The settings are inherited from the parent, and MLX has not read them yet.
    for name, value in SETTINGS.items():
        if not ours and os.environ.get(name) == value:
            del os.environ[name]
    runs = make(side, **arguments)
    pipe.send(sorted(runs))
    while True:
        try:
            run = runs[pipe.recv()]
        except EOFError:
            return
        start = time.perf_counter()
        result = run()
        pipe.send((time.perf_counter() - start, result))
