"""Will a model run on a machine, and how fast: `flashmoe plan`, before anything is downloaded.

It puts together what others know: headers of the checkpoint (`checkpoint`, `hub_headers`), the
split of the memory that a load would make (`loading`, `room`), how real routing hits slots
(`expected_routing`), the speeds of the machine (`speed_probe` measures, `machines` knows), and the
formula (`speed`). Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import SettingError
from ..memory.budget import MemoryPlan
from ..memory.footprint import PLANNED_CONTEXT, cache_nbytes
from ..memory.prefill import split_for_prefill
from ..models.loading import plan_memory
from ..ops import backend as ops
from ..options import LoadOptions
from ..sizes import parse_size
from .machines import Machine
from .routing import REAL, Routing, routing
from .speed_model import Costs, Geometry, Prompt, Step, decode, prompt

#: Until a sum of a few bytes is made by all hosts: assumed, for a wired network.
SUM_SECONDS = 2e-4

#: Tokens of a prompt, where nothing else is said.
PROMPT_TOKENS = 1000


@dataclass(frozen=True)
class Asked:
    """What is asked. experts: K, None for the trained one. memory: a budget such as "8GB", None
    for what the machine can spare. context: tokens that memory is kept for. prompt: tokens to read
    before the first answer; None: the planned length, or what the model has. batch: requests that
    are decoded together. hosts: machines like this one that share the experts; network: GB/s
    between them. routing: see `expected_routing.routing`."""

    experts: int | None = None
    memory: str | int | None = None
    context: int | None = None
    prompt: int | None = None
    batch: int = 1
    hosts: int = 1
    network: float = 1.0
    routing: str = REAL


@dataclass(frozen=True)
class Memory:
    """Bytes. plan: the split when the model is loaded. slots: of a layer while an answer is
    generated after the prompt. keys: keys, values and recurrent states of the context. sweep:
    tokens of the prompt that share the reads of experts; prompt_slots: of a layer meanwhile."""

    plan: MemoryPlan
    slots: int
    keys: int
    sweep: int
    prompt_slots: int


@dataclass(frozen=True)
class Speed:
    """costs: of the machine. hit_rate: expected, of what a step needs. token: one step; one_row:
    that of a single request, the same where there is no batch. prompt: until the first token."""

    costs: Costs
    hit_rate: float
    token: Step
    one_row: Step
    prompt: Prompt


def check(checkpoint: Checkpoint, asked: Asked) -> Asked:
    """The same with everything settled.

    Raises:
        SettingError: something is out of range.
    """
    most = checkpoint.max_context
    asked = replace(
        asked,
        experts=check_experts(asked.experts, checkpoint),
        context=min(PLANNED_CONTEXT, most) if asked.context is None else asked.context,
        prompt=min(PROMPT_TOKENS, most) if asked.prompt is None else asked.prompt,
    )
    for name, value in (("context", asked.context), ("prompt", asked.prompt)):
        if not 1 <= value <= most:
            raise SettingError(
                f"{name}={value} is out of range: this model has a context of 1 to {most} tokens"
            )
    if not 1 <= asked.batch <= 1024:
        raise SettingError(f"batch={asked.batch} is out of range: it must be 1 to 1024 requests")
    if not 1 <= asked.hosts <= 64:
        raise SettingError(f"hosts={asked.hosts} is out of range: it must be 1 to 64")
    if not 0 < asked.network < inf:
        raise SettingError(f"network={asked.network:g} is out of range: it is in GB/s, above 0")
    return asked


def plan_of_memory(checkpoint: Checkpoint, asked: Asked, machine: Machine | None = None) -> Memory:
    """How the memory would be split, by the same arithmetic as a load.

    Raises:
        BudgetError, ContextError: it does not fit; the text says what would.
    """
    asked = check(checkpoint, asked)
    k, rows = asked.experts, asked.batch - 1
    gpu = machine is not None or ops.on_gpu()
    usable = machine and machine.usable
    if machine and asked.memory is not None:
        usable = min(usable, parse_size(asked.memory))
    plan = plan_memory(
        checkpoint,
        LoadOptions(memory=None if machine else asked.memory, experts=k, prompt_cache=None),
        context=max(asked.context, min(PLANNED_CONTEXT, checkpoint.max_context)),
        mac=usable,
    )
    keys = cache_nbytes(checkpoint, asked.context)
    # The other requests of a batch have a context each.
    slots = plan.slots_per_layer - -(-rows * keys // plan.slot_nbytes)
    if plan.elastic:
        slots = plan.slots_beside((1 + rows) * keys, plan.budget)
    # Each host has as many for its share; those without dense weights have more in truth.
    slots = min(max(slots, k) * asked.hosts, checkpoint.num_experts)
    prompt_slots, sweep, _ = split_for_prefill(
        checkpoint,
        plan,
        tokens=asked.prompt,
        contexts=[asked.prompt],
        experts=k,
        budget=lambda: plan.budget,
        on_gpu=gpu,
    )
    return Memory(plan, slots, keys, min(sweep, asked.prompt), prompt_slots)


def expected(checkpoint: Checkpoint, asked: Asked, slots: int) -> tuple[Routing, float, float]:
    """(routing, hit rate, experts of a layer that a step needs)."""
    asked = check(checkpoint, asked)
    k = asked.experts
    found = routing(asked.routing, checkpoint.num_experts)
    hits = found.hit_rate(slots / checkpoint.num_experts, k)
    needed = found.union(asked.batch, k, checkpoint.num_experts)
    if asked.batch > 1:
        # What is used much is in slots already, so rows rarely share what has to be read.
        misses = min(asked.batch * k * (1 - hits), needed)
        hits = 1 - misses / needed
    return found, hits, needed


def speed(
    checkpoint: Checkpoint,
    asked: Asked,
    split: Memory,
    costs: Costs,
    disk: Callable[[int, float], float] | None = None,
) -> Speed:
    """How fast it would be.

    Args:
        costs: speeds of the machine.
        disk: measures the drive: (experts of a layer that miss, seconds between two layers' reads)
            -> GB/s. None: the costs have it.
    """
    asked = check(checkpoint, asked)
    k = asked.experts
    model = Geometry.of(checkpoint)
    found, hits, needed = expected(checkpoint, asked, split.slots)
    _, hits_alone, _ = expected(checkpoint, replace(asked, batch=1), split.slots)
    if asked.hosts > 1:
        network = {"network_gb_s": asked.network, "sum_seconds": SUM_SECONDS}
        costs = replace(costs, hosts=asked.hosts, **network)
    if disk is not None:
        misses = max(1, round(needed * (1 - hits)))
        # What comes between a layer's reads and the next one's: the last expert, launches, dense.
        between = (model.layer_nbytes + model.expert_nbytes) / costs.weights_gb_s / 1e9
        costs = replace(costs, disk_gb_s=disk(misses, costs.layer_seconds + between))

    def step(hits: float, needed: float, rows: int) -> Step:
        return decode(model, costs, k, hits, context=asked.prompt, needed=needed, rows=rows)

    one = step(hits_alone, k, 1)
    token = step(hits, needed, asked.batch) if asked.batch > 1 else one
    until = prompt(
        model,
        costs,
        k,
        found,
        tokens=asked.prompt,
        sweep=split.sweep,
        slots=split.prompt_slots,
        first=one,
    )
    return Speed(costs, hits, token, one, until)
