"""The output of `flashmoe plan`: an estimate as text for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..sizes import format_size
from ..terminal import format_number, format_seconds
from .estimate import MemorySplit, PlanEstimate, SpeedEstimate
from .speed_model import Geometry

# The names in the JSON that differ from the attributes.
_MEMORY_NAMES = {
    "context_nbytes": "keys",
    "pass_tokens": "sweep",
    "prefill_slots": "prompt_slots",
}
_TOKEN_NAMES = {"sequences": "rows"}
_PROMPT_NAMES = {"passes": "sweeps"}


def render_json(estimate: PlanEstimate) -> dict[str, Any]:
    """Return the estimate as a JSON object."""
    checkpoint, source, machine = estimate.checkpoint, estimate.source, estimate.machine
    memory, speed = estimate.memory, estimate.speed
    result: dict[str, Any] = {
        "model": estimate.name,
        "runs": estimate.runs,
        "why_not": estimate.why_not,
        "prediction": machine is not None,
        "machine": machine.name if machine else "this machine",
        "assumed": list(machine.assumed) if machine else [],
        "repo": source.repo,
        "commit": source.commit,
        "computed": source.unreachable is not None,
        "layout": source.layout,
        "bytes": _nbytes(checkpoint),
        "to_fetch": source.to_fetch,
        "free": source.free if not source.here else None,
        "layers": checkpoint.num_layers,
        "experts": checkpoint.num_experts,
        "trained_k": checkpoint.top_k,
        "k": estimate.options.experts,
        "bits": checkpoint.expert_bits,
        "asked": asdict(estimate.options),
    }
    if memory is not None:
        result["memory"] = _rename(asdict(memory), _MEMORY_NAMES)
        result["memory"]["plan"]["total"] = memory.plan.total
    if speed is not None:
        routing = speed.routing
        result["routing"] = {"name": routing.name, "what": routing.what}
        result["routing"] |= {"doubts": routing.doubts, "hit_rate": speed.hit_rate}
        # An infinite speed becomes null: JSON has no infinity.
        costs = {n: v if isfinite(v) else None for n, v in asdict(speed.costs).items()}
        result["costs"] = costs
        result["disk_probe"] = asdict(estimate.disk) if estimate.disk else None
        result["token"] = _rename(asdict(speed.token), _TOKEN_NAMES)
        result["token"]["tokens_per_second"] = speed.token.tokens_per_second
        result["prompt"] = _rename(asdict(speed.prompt), _PROMPT_NAMES)
    return result


def render_text(estimate: PlanEstimate) -> Iterator[tuple[str, str]]:
    """Yield the lines of the estimate for people, as pairs of a label and a text."""
    checkpoint, source, k = estimate.checkpoint, estimate.source, estimate.options.experts
    yield (
        "model",
        f"{estimate.name}: {checkpoint.model_type}, {checkpoint.num_layers} layers of "
        f"{checkpoint.num_experts} experts, K={k}"
        + (f" of {checkpoint.top_k}, pruned: not exact" if k != checkpoint.top_k else "")
        + f", {format_number(checkpoint.expert_bits)} bits, {format_size(_nbytes(checkpoint))}",
    )
    if estimate.machine is not None:
        assumed = ", ".join(estimate.machine.assumed)
        yield "machine", f"PREDICTION for {estimate.machine.describe()}; assumed: {assumed}"
    elif not source.here:
        yield (
            "disk",
            f"{format_size(source.to_fetch)} to download from {source.repo}, "
            f"{format_size(source.free)} free in {source.directory}",
        )
    else:
        yield "disk", f"on this disk: {source.directory}"
    if source.unreachable is not None:
        yield "headers", f"COMPUTED from the known layout, not fetched: {source.unreachable}"
    elif not source.here:
        yield "headers", f"fetched{f'; {source.layout}' if source.layout else ''}"
    if estimate.memory is not None:
        yield from _memory_lines(estimate, estimate.memory)
    if estimate.speed is not None:
        yield from _speed_lines(estimate, estimate.speed)
    yield "runs", "yes" if estimate.why_not is None else f"NO: {estimate.why_not}"


def _memory_lines(estimate: PlanEstimate, memory: MemorySplit) -> Iterator[tuple[str, str]]:
    options = estimate.options
    yield "memory", memory.plan.describe().removeprefix("memory ")
    requests = f" x {options.batch} requests" if options.batch > 1 else ""
    yield (
        "context",
        f"{memory.context} tokens: keys, values and states "
        f"{format_size(memory.context_nbytes)}{requests}",
    )
    machines = f" on {options.hosts} machines" if options.hosts > 1 else ""
    yield (
        "slots",
        f"{memory.slots} of {estimate.checkpoint.num_experts} experts per layer in decode"
        f"{machines}",
    )


def _speed_lines(estimate: PlanEstimate, speed: SpeedEstimate) -> Iterator[tuple[str, str]]:
    step, costs, prompt = speed.token, speed.costs, speed.prompt
    yield (
        "hit rate",
        f"{speed.hit_rate:.0%} expected, from {speed.routing.what} ({speed.routing.doubts})",
    )
    if estimate.disk is not None:
        yield (
            "measured",
            f"weights {format_number(costs.weights_gb_s)} GB/s, a layer without them "
            f"{_ms(costs.layer_seconds)}, prompts {format_number(costs.prompt_gflops)} GFLOPS; "
            f"disk {format_number(costs.disk_gb_s)} GB/s (io={estimate.disk.drive.io}, "
            f"{estimate.disk.what})",
        )
    yield "speed", _speed_text(speed)
    yield (
        "bound",
        f"{step.bound}: a step takes {_ms(step.seconds)} = launches {_ms(step.launches)} + "
        f"weights {_ms(step.compute)} + waiting for the disk {_ms(step.waiting)}"
        + (f" + network {_ms(step.network)}" if costs.hosts > 1 else ""),
    )
    yield "formula", formula(estimate.checkpoint, estimate.options.experts, speed)
    passes = f"{prompt.passes} pass{'es' if prompt.passes > 1 else ''} through the layers"
    yield (
        "prompt",
        f"{prompt.tokens} tokens in {passes}: computing takes {format_seconds(prompt.compute)}, "
        f"and meanwhile reading {format_size(round(prompt.read_nbytes))} takes "
        f"{format_seconds(prompt.reading)}",
    )


def _speed_text(speed: SpeedEstimate) -> str:
    step = speed.token
    each = ""
    if step.sequences > 1:
        rate = step.tokens_per_second / step.sequences
        each = (
            f" for {step.sequences} requests together, {format_number(rate, 2)} each "
            f"({step.needed} experts per layer and step)"
        )
    return (
        f"{format_number(step.tokens_per_second, 2)} tokens/s{each}; first token after "
        f"{format_seconds(speed.prompt.seconds)} ({speed.prompt.tokens} prompt tokens)"
    )


def formula(checkpoint: Checkpoint, k: int, speed: SpeedEstimate) -> str:
    """Return the formula of a decode step with the numbers of an estimate in it."""
    model, costs, step = Geometry.from_checkpoint(checkpoint), speed.costs, speed.token
    n, hit_rate = step.needed, speed.hit_rate

    def through(nbytes: float) -> str:
        return f"{format_size(round(nbytes))} / {format_number(costs.weights_gb_s)} GB/s"

    reads = (
        f"{n} x {1 - hit_rate:.2f} misses x {format_size(round(model.expert_nbytes))} / "
        f"{format_number(costs.disk_gb_s)} GB/s"
    )
    if costs.hosts > 1:
        reads += f" / {costs.hosts} machines"
    if step.sequences > 1 or costs.hosts > 1:
        own = model.layer_nbytes + model.shared_nbytes + k * model.expert_nbytes / costs.hosts
        each = f"{step.sequences} x ({_ms(costs.layer_seconds)} + {through(own)})"
        layer = f"max({each}, {reads})" if step.sequences > 1 else f"about {each} beside {reads}"
        network = f" + network {_ms(step.network / model.layers)}" if costs.hosts > 1 else ""
        return (
            f"{model.layers} layers x ({layer}{network}) + {step.sequences} x head "
            f"{through(model.head_nbytes)}; the mean over how many miss; "
            f"{format_size(round(step.read_nbytes))} read per step"
        )
    if costs.as_they_land:
        shared = model.shared_nbytes + n * model.expert_nbytes
        experts = f"max({through(shared)}, {reads})"
    else:
        shared = model.shared_nbytes + n * hit_rate * model.expert_nbytes
        misses = through(n * (1 - hit_rate) * model.expert_nbytes)
        experts = f"max({through(shared)}, {reads}) + {misses}"
    return (
        f"{model.layers} layers x ({_ms(costs.layer_seconds)} + "
        f"{through(model.layer_nbytes)} + {experts}) + head {through(model.head_nbytes)}; "
        f"the mean over how many miss; {format_size(round(step.read_nbytes))} read per step"
    )


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(identity.nbytes for identity in checkpoint.identities.values())


def _rename(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}


def _ms(seconds: float) -> str:
    # Below a microsecond there is only the rounding of sums that should be 0.
    if seconds >= 1:
        return format_seconds(seconds)
    return f"{format_number(round(1e3 * seconds, 3))} ms"
