"""What `flashmoe plan` found about a model, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..errors import BudgetError, ContextError
from ..files import disk_too_full
from ..sizes import format_size
from ..terminal import format_number, format_seconds, waiting_line


@dataclass(frozen=True)
class Source:
    """Where the headers are from. directory: where the weights are, or would be downloaded to;
    repo, commit: of the hub, None when they are here; to_fetch, free: bytes."""

    directory: Path
    repo: str | None = None
    commit: str | None = None
    to_fetch: int = 0
    free: int = 0

    @property
    def here(self) -> bool:
        return self.repo is None

    @property
    def fits(self) -> bool:
        return self.here or self.to_fetch < self.free


class Planned:
    """What was found, for people and for programs."""

    def __init__(self, name, checkpoint: Checkpoint, source: Source, mac, activations, asked):
        from . import estimate as planning  # late: MLX

        self.name, self.checkpoint, self.source, self.mac = name, checkpoint, source, mac
        self.asked = planning.check(checkpoint, planning.Asked(**asked))
        self.k = self.asked.experts
        self.memory = self.speed = self.why = self.disk = None
        try:
            self.memory = planning.plan_of_memory(checkpoint, self.asked, mac)
        except (BudgetError, ContextError) as e:
            self.why = str(e)
            return
        self.routing, _, _ = planning.expected(checkpoint, self.asked, self.memory.slots)
        disk = None
        if mac is not None:
            costs = mac.costs
        else:
            costs, disk = self._measured(activations)
        self.speed = planning.speed(checkpoint, self.asked, self.memory, costs, disk)
        if mac is None and not source.fits:
            way_out = "download the model to another disk"
            self.why = disk_too_full(source.directory, source.to_fetch, source.free, way_out)

    def _measured(self, activations: str):
        from . import speed_probe

        with waiting_line("measuring (the very first time compiles kernels, some 30 s)"):
            costs = speed_probe.kernels(self.checkpoint, self.k, activations)
        scratch = None if self.source.here else self.source.directory

        def disk(misses: int, pause: float) -> float:
            self.disk = speed_probe.disk(
                self.checkpoint, misses=misses, pause=pause, scratch=scratch
            )
            return self.disk.gb_per_s

        return costs, disk

    @property
    def runs(self) -> bool:
        return self.why is None

    def as_json(self) -> dict:
        c = self.checkpoint
        found = {
            "model": self.name,
            "runs": self.runs,
            "why_not": self.why,
            "prediction": self.mac is not None,
            "machine": self.mac.name if self.mac else "this machine",
            "assumed": list(self.mac.assumed) if self.mac else [],
            "repo": self.source.repo,
            "commit": self.source.commit,
            "bytes": sum(i.nbytes for i in c.identities.values()),
            "to_fetch": self.source.to_fetch,
            "free": self.source.free if not self.source.here else None,
            "layers": c.num_layers,
            "experts": c.num_experts,
            "trained_k": c.top_k,
            "k": self.k,
            "bits": c.expert_bits,
            "asked": asdict(self.asked),
        }
        if self.memory is not None:
            found["memory"] = asdict(self.memory)
            found["memory"]["plan"]["total"] = self.memory.plan.total
        if self.speed is not None:
            found["routing"] = {"name": self.routing.name, "what": self.routing.what}
            found["routing"] |= {"doubts": self.routing.doubts, "hit_rate": self.speed.hit_rate}
            # What takes no time is null: JSON has no infinity.
            costs = {n: v if isfinite(v) else None for n, v in asdict(self.speed.costs).items()}
            found |= {"costs": costs, "disk_probe": asdict(self.disk) if self.disk else None}
            found["token"] = asdict(self.speed.token)
            found["token"]["tokens_per_second"] = self.speed.token.tokens_per_second
            found["prompt"] = asdict(self.speed.prompt)
        return found

    def lines(self) -> Iterator[tuple[str, str]]:
        c, source = self.checkpoint, self.source
        size = format_size(sum(i.nbytes for i in c.identities.values()))
        yield (
            "model",
            f"{self.name}: {c.model_type}, {c.num_layers} layers of {c.num_experts} experts, "
            f"K={self.k}"
            + (f" of {c.top_k}, pruned: not exact" if self.k != c.top_k else "")
            + f", {format_number(c.expert_bits)} bits, {size}",
        )
        if self.mac is not None:
            assumed = ", ".join(self.mac.assumed)
            yield "machine", f"PREDICTION for {self.mac.describe()}; assumed: {assumed}"
        elif not source.here:
            yield (
                "disk",
                f"{format_size(source.to_fetch)} to fetch of {source.repo}, "
                f"{format_size(source.free)} free in {source.directory}; headers only so far",
            )
        else:
            yield "disk", f"on this disk: {source.directory}"
        if self.memory is not None:
            yield from self._of_memory()
        if self.speed is not None:
            yield from self._of_speed()
        if self.why is None:
            yield "runs", "yes"
        else:
            yield "runs", f"NO: {self.why}"

    def _of_memory(self) -> Iterator[tuple[str, str]]:
        m, experts = self.memory, self.checkpoint.num_experts
        yield "memory", m.plan.describe().removeprefix("memory ")
        rows = f" x {self.asked.batch} requests" if self.asked.batch > 1 else ""
        yield (
            "context",
            f"{self.asked.context} tokens: keys, values and states {format_size(m.keys)}{rows}",
        )
        hosts = f" on {self.asked.hosts} hosts" if self.asked.hosts > 1 else ""
        yield "slots", f"{m.slots} of {experts} experts per layer in decode{hosts}"

    def _of_speed(self) -> Iterator[tuple[str, str]]:
        s, step, costs, prompt = self.speed, self.speed.token, self.speed.costs, self.speed.prompt
        yield (
            "hit rate",
            f"{s.hit_rate:.0%} expected, from {self.routing.what} ({self.routing.doubts})",
        )
        if self.mac is None:
            yield (
                "measured",
                f"weights {format_number(costs.weights_gb_s)} GB/s, a layer without them "
                f"{_ms(costs.layer_seconds)}, prompts {format_number(costs.prompt_gflops)} GFLOPS; "
                f"disk {format_number(costs.disk_gb_s)} GB/s (io={self.disk.drive.io}, "
                f"{self.disk.what})",
            )
        yield "speed", self._how_fast()
        yield (
            "bound",
            f"{step.bound}: a step takes {_ms(step.seconds)} = launches {_ms(step.launches)} + "
            f"weights {_ms(step.compute)} + waiting for the disk {_ms(step.waiting)}"
            + (f" + network {_ms(step.network)}" if costs.hosts > 1 else ""),
        )
        yield "formula", formula(self.checkpoint, self.k, s)
        passes = f"{prompt.sweeps} pass{'es' if prompt.sweeps > 1 else ''} through the layers"
        yield (
            "prompt",
            f"{prompt.tokens} tokens in {passes}: computing takes "
            f"{format_seconds(prompt.compute)}, and meanwhile reading "
            f"{format_size(round(prompt.read_nbytes))} takes {format_seconds(prompt.reading)}",
        )

    def _how_fast(self) -> str:
        step, first = self.speed.token, self.speed.prompt.seconds
        each = ""
        if step.rows > 1:
            rate = step.tokens_per_second / step.rows
            each = (
                f" for {step.rows} requests together, {format_number(rate, 2)} each "
                f"({step.needed} experts per layer and step)"
            )
        return (
            f"{format_number(step.tokens_per_second, 2)} tokens/s{each}; first token after "
            f"{format_seconds(first)} ({self.asked.prompt} prompt tokens)"
        )


def formula(checkpoint: Checkpoint, k: int, speed) -> str:
    """The formula of a step with its numbers in it."""
    from .speed_model import Geometry

    model, costs, step = Geometry.of(checkpoint), speed.costs, speed.token
    n, hits = step.needed, speed.hit_rate

    def through(nbytes: float) -> str:
        return f"{format_size(round(nbytes))} / {format_number(costs.weights_gb_s)} GB/s"

    reads = (
        f"{n} x {1 - hits:.2f} misses x {format_size(round(model.expert_nbytes))} / "
        f"{format_number(costs.disk_gb_s)} GB/s"
    )
    if costs.hosts > 1:
        reads += f" / {costs.hosts} hosts"
    if step.rows > 1 or costs.hosts > 1:
        own = model.layer_nbytes + model.shared_nbytes + k * model.expert_nbytes / costs.hosts
        each = f"{step.rows} x ({_ms(costs.layer_seconds)} + {through(own)})"
        together = f"max({each}, {reads})" if step.rows > 1 else f"about {each} beside {reads}"
        network = f" + network {_ms(step.network / model.layers)}" if costs.hosts > 1 else ""
        return (
            f"{model.layers} layers x ({together}{network}) + {step.rows} x head "
            f"{through(model.head_nbytes)}; the mean over how many miss; "
            f"{format_size(round(step.read_nbytes))} read per step"
        )
    if costs.as_they_land:
        shared = model.shared_nbytes + n * model.expert_nbytes
        experts = f"max({through(shared)}, {reads})"
    else:
        shared = model.shared_nbytes + n * hits * model.expert_nbytes
        misses = through(n * (1 - hits) * model.expert_nbytes)
        experts = f"max({through(shared)}, {reads}) + {misses}"
    return (
        f"{model.layers} layers x ({_ms(costs.layer_seconds)} + "
        f"{through(model.layer_nbytes)} + {experts}) + head {through(model.head_nbytes)}; "
        f"the mean over how many miss; {format_size(round(step.read_nbytes))} read per step"
    )


def _ms(seconds: float) -> str:
    return f"{format_number(1e3 * seconds)} ms"
