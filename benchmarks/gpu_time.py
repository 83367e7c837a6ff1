"""What a GPU is busy with, by its own clock: PyTorch's profiler sees MLX's launches, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable


def busy(run: Callable[[], None], calls: int, rounds: int = 5) -> dict[str, float]:
    """us of each kernel in one of the calls that `run` makes, by a short name, and of "all", in
    which kernels that run side by side count once; of `rounds` runs, after two that compile.

    Raises:
        SystemExit: no PyTorch.
    """
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        raise SystemExit("PyTorch is missing: the GPU's own times come from its profiler") from None
    run()
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            run()
    times: dict[str, float] = defaultdict(float)
    spans = []
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            span = event.time_range
            times[_short(event.name)] += span.end - span.start
            spans.append((span.start, span.end))
    times["all"] = union(spans)
    return {name: round(us / calls / rounds, 2) for name, us in times.items()}


def union(spans: list[tuple[float, float]]) -> float:
    """The length of what spans (start, end) cover."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _short(name: str) -> str:
    """A kernel's own name, without what its types say."""
    return name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1][:40]
