"""Measure how long a GPU is busy, by its own clock: PyTorch's profiler sees MLX's launches too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable


def busy(run: Callable[[], None], calls: int, rounds: int = 5) -> dict[str, float]:
    """Return the us of each kernel in one call, by a short name of the kernel.

    "all" is the time of all kernels together, in which kernels that run side by side count once.

    Args:
        run: makes the calls.
        calls: how many calls `run` makes.
        rounds: how often it is measured, after two runs that compile.

    Raises:
        SystemExit: PyTorch is not installed.
    """
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        raise SystemExit(
            "PyTorch is not installed. The GPU's own times come from its profiler: install torch, "
            "or leave the section out with --only."
        ) from None
    run()
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
    times: dict[str, float] = defaultdict(float)
    spans = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            span = event.time_range
            times[_short(event.name)] += span.end - span.start
            spans.append((span.start, span.end))
    times["all"] = union(spans)
    return {name: round(us / calls / rounds, 2) for name, us in times.items()}


def union(spans: list[tuple[float, float]]) -> float:
    """Return the total length that spans (start, end) cover."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _short(name: str) -> str:
    """Return the name of a kernel without its types."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1][:40]
