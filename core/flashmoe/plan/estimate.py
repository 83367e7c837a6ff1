"""Estimates how a model would run on a machine: memory, hit rate and speed (`flashmoe plan`).

This module puts together what other modules know: the headers of the checkpoint, the memory split
that a load would make (`flashmoe.models.loading`, `flashmoe.memory`), the hit rates of real routing
(`routing`), the speeds of the machine (measured by `speed_probe`, or known to `machines`), and the
formula (`speed_model`). Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import BudgetError, ContextError, SettingError
from ..files import disk_too_full
from ..memory.budget import MemoryPlan
from ..memory.footprint import PLANNED_CONTEXT, cache_nbytes
from ..memory.prefill import split_for_prefill
from ..models.loading import plan_memory
from ..ops import backend as ops
from ..options import LoadOptions
from ..sizes import parse_size
from ..terminal import format_number, waiting_line
from . import speed_probe
from .machines import Machine
from .routing import REAL, Routing, find_routing
from .sources import Source
from .speed_model import Costs, Geometry, PromptTime, Step, decode_step, prompt_time

#: Seconds until all machines of a cluster have the sum of a few bytes: assumed, with cables.
SUM_SECONDS = 2e-4

#: Tokens of the prompt unless the user says otherwise.
PROMPT_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to estimate.

    Attributes:
        experts: K, experts per token; None: the K that the model was trained with.
        memory: memory budget such as "8GB"; None: what the machine can spare.
        context: tokens that memory is kept for; None: the planned length, or what the model has, or
            what there is memory for.
        prompt: tokens of the prompt before the first answer; None: PROMPT_TOKENS, or what the
            model has.
        batch: requests that are decoded together.
        hosts: number of equal machines that share the experts.
        network: speed of the network between them in GB/s.
        routing: see `flashmoe.plan.routing.find_routing`.
    """

    experts: int | None = None
    memory: str | int | None = None
    context: int | None = None
    prompt: int | None = None
    batch: int = 1
    hosts: int = 1
    network: float = 1.0
    routing: str = REAL


@dataclass(frozen=True, kw_only=True)
class CheckedOptions(PlanOptions):
    """Options that are valid for a checkpoint, with the defaults filled in."""

    experts: int
    prompt: int


@dataclass(frozen=True)
class MemorySplit:
    """How the memory would be used.

    Attributes:
        plan: the split after the model is loaded.
        slots: expert slots of each layer during decode.
        context: tokens of one context that memory is kept for.
        context_nbytes: bytes of keys, values and recurrent states of one context.
        pass_tokens: tokens of the prompt that go through the layers in one pass and share the
            reads of experts.
        prefill_slots: expert slots of each layer during the prefill.
    """

    plan: MemoryPlan
    slots: int
    context: int
    context_nbytes: int
    pass_tokens: int
    prefill_slots: int


@dataclass(frozen=True)
class SpeedEstimate:
    """How fast the model would be.

    Attributes:
        costs: speeds of the machine.
        routing: the routing that the hit rate is from.
        hit_rate: expected share of the experts needed by a step that are in slots.
        token: one decode step.
        single: the step of one request; the same as `token` without a batch.
        prompt: the time to the first token.
    """

    costs: Costs
    routing: Routing
    hit_rate: float
    token: Step
    single: Step
    prompt: PromptTime


@dataclass(frozen=True)
class PlanEstimate:
    """The whole estimate for one model and one machine.

    Attributes:
        name: the model as the user named it.
        machine: the known machine of a prediction; None: this machine was measured.
        why_not: why the model will not run; None if it will.
        memory: None if the model does not fit in memory.
        speed: None in the same case.
        disk: the measured drive; None in the same case, and for predictions.
    """

    name: str
    checkpoint: Checkpoint
    source: Source
    machine: Machine | None
    options: CheckedOptions
    why_not: str | None = None
    memory: MemorySplit | None = None
    speed: SpeedEstimate | None = None
    disk: speed_probe.DiskSpeed | None = None

    @property
    def runs(self) -> bool:
        """Whether the model will run."""
        return self.why_not is None


def estimate(
    name: str,
    checkpoint: Checkpoint,
    source: Source,
    options: PlanOptions,
    *,
    machine: Machine | None = None,
    activations: str = "float32",
) -> PlanEstimate:
    """Estimate how a model would run; without `machine`, this machine is measured for seconds.

    Args:
        name: the model as the user named it.
        source: where the headers of the checkpoint are from.
        machine: predict for this machine instead.
        activations: see `flashmoe.ops.activations`; for measurements.

    Raises:
        SettingError: an option is out of range, or this machine cannot be measured.
    """
    checked = with_defaults(checkpoint, options)
    result = PlanEstimate(name, checkpoint, source, machine, checked)
    try:
        split = split_memory(checkpoint, checked, machine)
    except (BudgetError, ContextError) as e:
        return replace(result, why_not=str(e))
    if machine is not None:
        speed = estimate_speed(checkpoint, checked, split, machine.costs)
        return replace(result, memory=split, speed=speed)
    with waiting_line("measuring (the very first time compiles kernels, some 30 s)"):
        costs = speed_probe.measure_compute(checkpoint, checked.experts, activations)
    scratch = None if source.here else source.directory
    disk: list[speed_probe.DiskSpeed] = []

    def measure_disk(misses: int, pause: float) -> float:
        disk.append(
            speed_probe.measure_disk(checkpoint, misses=misses, pause=pause, scratch=scratch)
        )
        return disk[-1].gb_per_s

    speed = estimate_speed(checkpoint, checked, split, costs, measure_disk)
    why_not = None
    if not source.fits:
        way_out = "download the model to another disk"
        why_not = disk_too_full(source.directory, source.to_fetch, source.free, way_out)
    return replace(result, why_not=why_not, memory=split, speed=speed, disk=disk[-1])


def with_defaults(checkpoint: Checkpoint, options: PlanOptions) -> CheckedOptions:
    """Return the options with defaults filled in.

    Raises:
        SettingError: an option is out of range for this checkpoint.
    """
    longest = checkpoint.max_context
    prompt = options.prompt
    checked = CheckedOptions(
        **vars(options)
        | {
            "experts": check_experts(options.experts, checkpoint),
            "prompt": min(PROMPT_TOKENS, longest) if prompt is None else prompt,
        }
    )
    for name, value in (("context", checked.context), ("prompt", checked.prompt)):
        if value is not None and not 1 <= value <= longest:
            raise SettingError(
                f"{name}={value} is out of range: it must be between 1 and {longest} tokens, the "
                "context of this model"
            )
    if not 1 <= options.batch <= 1024:
        raise SettingError(
            f"batch={options.batch} is out of range: it must be between 1 and 1024 requests"
        )
    if not 1 <= options.hosts <= 64:
        raise SettingError(
            f"hosts={options.hosts} is out of range: it must be between 1 and 64 machines"
        )
    if not 0 < options.network < inf:
        raise SettingError(
            f"network={format_number(options.network)} is out of range: it must be above 0, in GB/s"
        )
    return checked


def split_memory(
    checkpoint: Checkpoint, options: PlanOptions, machine: Machine | None = None
) -> MemorySplit:
    """Split the memory of a machine, with the arithmetic that a load uses.

    Raises:
        BudgetError, ContextError: the model does not fit; the text says what would.
    """
    checked = with_defaults(checkpoint, options)
    others = checked.batch - 1
    gpu = machine is not None or ops.on_gpu()
    usable = None
    if machine is not None:
        usable = machine.usable
        if checked.memory is not None:
            usable = min(usable, parse_size(checked.memory))
    plan = plan_memory(
        checkpoint,
        LoadOptions(
            memory=None if machine else checked.memory,
            experts=checked.experts,
            prompt_cache=None,
        ),
        context=None if checked.context is None else max(checked.context, PLANNED_CONTEXT),
        mac=usable,
    )
    context = checked.context or plan.context
    context_nbytes = cache_nbytes(checkpoint, context, on_gpu=gpu)
    # Each other request of a batch has a context too.
    slots = plan.slots_per_layer - -(-others * context_nbytes // plan.slot_nbytes)
    if plan.elastic:
        slots = plan.slots_beside((1 + others) * context_nbytes, plan.budget)
    # Each machine has this many slots for its share of the experts. Machines without the dense
    # weights have more in fact.
    slots = min(max(slots, checked.experts) * checked.hosts, checkpoint.num_experts)
    prefill_slots, pass_tokens, _ = split_for_prefill(
        checkpoint,
        plan,
        tokens=checked.prompt,
        contexts=[checked.prompt],
        experts=checked.experts,
        budget=lambda: plan.budget,
        on_gpu=gpu,
    )
    pass_tokens = min(pass_tokens, checked.prompt)
    return MemorySplit(plan, slots, context, context_nbytes, pass_tokens, prefill_slots)


class ExpectedHits(NamedTuple):
    """What a decode step is expected to find in slots.

    Attributes:
        routing: the routing that the expectation is from.
        hit_rate: share of the needed experts that are in slots.
        needed: experts of a layer that a step needs.
    """

    routing: Routing
    hit_rate: float
    needed: float


def expect_hits(checkpoint: Checkpoint, options: PlanOptions, slots: int) -> ExpectedHits:
    """Return what a decode step is expected to find in the given number of slots of a layer."""
    checked = with_defaults(checkpoint, options)
    k = checked.experts
    routing = find_routing(checked.routing, checkpoint.num_experts)
    hit_rate = routing.hit_rate(slots / checkpoint.num_experts, k)
    needed = routing.union(checked.batch, k, checkpoint.num_experts)
    if checked.batch > 1:
        # Experts that are needed often are in slots already, so sequences rarely share an expert
        # that has to be read.
        misses = min(checked.batch * k * (1 - hit_rate), needed)
        hit_rate = 1 - misses / needed
    return ExpectedHits(routing, hit_rate, needed)


def estimate_speed(
    checkpoint: Checkpoint,
    options: PlanOptions,
    split: MemorySplit,
    costs: Costs,
    measure_disk: Callable[[int, float], float] | None = None,
) -> SpeedEstimate:
    """Estimate the speed with a given memory split.

    Args:
        costs: speeds of the machine.
        measure_disk: (experts of a layer that miss, seconds between the reads of two layers) ->
            measured GB/s of the drive. None: `costs` has the speed of the drive.
    """
    checked = with_defaults(checkpoint, options)
    k = checked.experts
    model = Geometry.from_checkpoint(checkpoint)
    routing, hit_rate, needed = expect_hits(checkpoint, checked, split.slots)
    _, single_hit_rate, _ = expect_hits(checkpoint, replace(checked, batch=1), split.slots)
    if checked.hosts > 1:
        costs = replace(
            costs, hosts=checked.hosts, network_gb_s=checked.network, sum_seconds=SUM_SECONDS
        )
    if measure_disk is not None:
        misses = max(1, round(needed * (1 - hit_rate)))
        # Between the reads of one layer and those of the next one come the last expert, launches
        # and dense weights.
        between = (model.layer_nbytes + model.expert_nbytes) / costs.weights_gb_s / 1e9
        costs = replace(costs, disk_gb_s=measure_disk(misses, costs.layer_seconds + between))

    def step(hit_rate: float, needed: float, sequences: int) -> Step:
        return decode_step(
            model,
            costs,
            k,
            hit_rate,
            context=checked.prompt,
            needed=needed,
            sequences=sequences,
        )

    single = step(single_hit_rate, k, 1)
    token = step(hit_rate, needed, checked.batch) if checked.batch > 1 else single
    prompt = prompt_time(
        model,
        costs,
        k,
        routing,
        tokens=checked.prompt,
        pass_tokens=split.pass_tokens,
        slots=split.prefill_slots,
        first=single,
    )
    return SpeedEstimate(costs, routing, hit_rate, token, single, prompt)
