"""Computes how long decode and prefill take from the bytes of a model and the speeds of a machine.

One layer of one decoded token takes:

    launches + dense + max(shared + experts, reads + one expert)    experts are computed on arrival
    launches + dense + max(shared + hits, reads) + misses           (GPU) after all have arrived

The reads of missing experts start when the router has chosen, so attention and router (`dense`)
come before them, while the shared expert and the experts in slots are computed during the reads.
How many of a layer's experts miss is random: the result is the mean over the binomial distribution
given by the hit rate, not the time at the mean number of misses, because a layer without misses
waits for nothing. A token takes the time of all layers and of the head.

The sequences of a batch share only their reads: each goes over the weights by itself, while experts
of others are being read. The machines of a cluster share reads and experts, and wait for the
network twice per layer.

One layer of a prefill takes: dense, then max(experts, reads). Each expert that any token of the
pass needs is read once for the whole pass.

Nothing here accesses a machine or a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, comb, inf

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.stacked_experts import layer_of
from ..memory.dry_run import SHARED_NAMES
from ..memory.footprint import cache_nbytes
from .routing import Routing


@dataclass(frozen=True)
class Geometry:
    """The properties of a model that its speed depends on. Bytes are bytes in the checkpoint.

    Attributes:
        layers: number of all layers.
        expert_layers: number of layers that have experts.
        experts: experts of each of these.
        expert_nbytes: bytes of one expert.
        layer_nbytes: dense bytes of a layer, without its shared expert.
        shared_nbytes: bytes of the shared expert of a layer.
        head_nbytes: bytes of the output head.
        weights_per_byte: weights that a byte of an expert holds.
        context_nbytes: bytes of keys and values that a token reads for each token before it.
        row_nbytes: bytes of a hidden state, as sent between machines.
    """

    layers: int
    expert_layers: int
    experts: int
    expert_nbytes: float
    layer_nbytes: float
    shared_nbytes: float
    head_nbytes: int
    weights_per_byte: float
    context_nbytes: float = 0.0
    row_nbytes: int = 0

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Geometry:
        """Return the geometry of a checkpoint; only its headers are needed."""
        config, moe_layers = checkpoint.text_config, len(checkpoint.expert_layers)
        inside = [t for t in checkpoint.dense if layer_of(t.name) is not None]
        shared = sum(t.nbytes for t in inside if set(SHARED_NAMES) & set(t.name.split(".")))
        outside = [t for t in checkpoint.dense if layer_of(t.name) is None]
        head = sum(t.nbytes for t in outside if "lm_head" in t.name)
        # With tied weights, the embedding is the head.
        head = head or sum(t.nbytes for t in outside if t.shape[:1] == (config["vocab_size"],))
        first = next(iter(checkpoint.expert_layers.values()))
        inner, outer = (
            next(p.shape[0] for p in first.parts if p.projection == name)
            for name in (first.projections[0], first.projections[-1])
        )
        expert = checkpoint.expert_nbytes / checkpoint.num_experts / moe_layers
        return cls(
            layers=checkpoint.num_layers,
            expert_layers=moe_layers,
            experts=checkpoint.num_experts,
            expert_nbytes=expert,
            layer_nbytes=(sum(t.nbytes for t in inside) - shared) / checkpoint.num_layers,
            shared_nbytes=shared / checkpoint.num_layers,
            head_nbytes=head,
            weights_per_byte=len(first.projections) * inner * outer / expert,
            context_nbytes=(cache_nbytes(checkpoint, 512) - cache_nbytes(checkpoint, 256)) / 256,
            row_nbytes=4 * config["hidden_size"],
        )


# What one more sequence of a batch adds to a layer besides arithmetic, as a share of what the first
# one takes; and the time of a matrix product for each of four sequences, as a share of the time for
# one alone. Both were measured on two cores of an AMD EPYC (AVX2), see docs/experiments.md.
_SEQUENCE_OF_LAYER, _SEQUENCE_OF_FOUR = 0.2, 0.65


@dataclass(frozen=True)
class Costs:
    """The speeds of a machine, or of an engine on it. GB/s are 1e9 bytes per second.

    Attributes:
        weights_gb_s: weights that go through the processor, for one token.
        layer_seconds: time of a layer that has nothing to compute: launches, and the host's part.
        disk_gb_s: experts read from the drive, in the way decode reads them.
        prompt_gflops: arithmetic of a prefill, in 1e9 operations per second.
        as_they_land: whether experts are computed as they arrive, see the module.
        stacks: whether the sequences of a batch are one array, see `flashmoe.streaming.compute`.
        cached_gb_s: experts from the page cache, for engines that have no slots of their own.
        overlap: whether anything is computed while reads are in flight.
        fresh_gb_s: memory that the system provides, which the first reads into slots wait for.
        hosts: number of equal machines that share the experts.
        network_gb_s: the network between them.
        sum_seconds: time until all of them have the sum of a few bytes.
    """

    weights_gb_s: float
    layer_seconds: float
    disk_gb_s: float
    prompt_gflops: float
    as_they_land: bool = True
    stacks: bool = True
    cached_gb_s: float = inf
    overlap: bool = True
    fresh_gb_s: float = inf
    hosts: int = 1
    network_gb_s: float = inf
    sum_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """The time of one decode step, which gives one token to each sequence of a batch.

    Attributes:
        sequences: sequences in the batch.
        needed: experts of a layer that the step needs.
        seconds: the whole step: the sum of launches, compute, network and waiting, except that
            the parts of different sequences overlap.
        launches, compute, network: seconds of these parts.
        waiting: seconds in which computing waits for the drive.
        reading: seconds in which the drive works.
        read_nbytes: bytes read from the drive.
        bound: the part without which the step would be fastest: "disk", "compute", "launches" or
            "network".
    """

    sequences: int
    needed: int
    seconds: float
    launches: float
    compute: float
    network: float
    waiting: float
    reading: float
    read_nbytes: float
    bound: str

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of all sequences together."""
        return self.sequences / self.seconds


@dataclass(frozen=True)
class PromptTime:
    """The time of a prefill and of the first token after it.

    Attributes:
        tokens: tokens of the prompt.
        passes: passes through the layers.
        seconds: time until the first token.
        compute, reading: seconds of computing and of reading, which overlap.
        read_nbytes: bytes read from the drive.
    """

    tokens: int
    passes: int
    seconds: float
    compute: float
    reading: float
    read_nbytes: float


def decode_step(
    model: Geometry,
    costs: Costs,
    k: int,
    hit_rate: float,
    *,
    context: int = 0,
    needed: float | None = None,
    sequences: int = 1,
) -> Step:
    """Compute the time of a decode step.

    Args:
        k: experts per token.
        hit_rate: share of the experts needed by a step in a layer that are in slots.
        context: tokens before this one.
        needed: experts that a step needs in a layer; None: K, as for one sequence.
        sequences: sequences that are decoded together.
    """
    needed = k if needed is None else max(k, round(needed))
    keys = context * sequences * model.context_nbytes

    def seconds(costs: Costs) -> float:
        attention = keys / costs.weights_gb_s / 1e9
        return attention + _step_seconds(model, costs, k, hit_rate, needed, sequences)

    total = seconds(costs)
    without = {
        "disk": replace(costs, disk_gb_s=inf, cached_gb_s=inf),
        "compute": replace(costs, weights_gb_s=inf, prompt_gflops=inf),
        "launches": replace(costs, layer_seconds=0.0),
        "network": replace(costs, sum_seconds=0.0, network_gb_s=inf),
    }
    launches = model.layers * _launches(costs, sequences)
    compute = _compute(model, costs, k, sequences) + keys / costs.weights_gb_s / 1e9
    network = model.expert_layers * _network(model, costs, k, sequences)
    read = model.expert_layers * needed * (1 - hit_rate) * model.expert_nbytes
    cached = model.expert_layers * needed * hit_rate * model.expert_nbytes
    return Step(
        sequences=sequences,
        needed=needed,
        seconds=total,
        launches=launches,
        compute=compute,
        network=network,
        waiting=max(0.0, total - launches - compute - network),
        reading=read / costs.disk_gb_s / 1e9 / costs.hosts + cached / costs.cached_gb_s / 1e9,
        read_nbytes=read,
        bound=min(without, key=lambda name: seconds(without[name])),
    )


def _step_seconds(
    model: Geometry, costs: Costs, k: int, hit_rate: float, needed: int, sequences: int
) -> float:
    one = model.expert_nbytes / costs.weights_gb_s / 1e9
    shared = _dense(costs, model.shared_nbytes, sequences)
    before = _launches(costs, sequences) + _dense(costs, model.layer_nbytes, sequences)
    from_disk = model.expert_nbytes / costs.disk_gb_s / 1e9 / costs.hosts
    from_cache = model.expert_nbytes / costs.cached_gb_s / 1e9
    experts = shared + sequences * k * one / costs.hosts
    layer = 0.0
    for misses in range(needed + 1):
        hits = needed - misses
        chance = comb(needed, misses) * (1 - hit_rate) ** misses * hit_rate**hits
        reads = misses * from_disk + hits * from_cache
        if not costs.overlap:
            step = before + experts + reads
        elif sequences > 1:
            # Two halves of the batch: one computes while the experts of the other are read.
            step = max(before + experts, reads)
        elif costs.as_they_land:
            step = before + max(experts, reads + (one if misses else 0.0))
        else:
            rest = misses * one / costs.hosts
            step = before + max(experts - rest, reads) + rest
        layer += chance * step
    dense_layers = model.layers - model.expert_layers
    return (
        model.expert_layers * (layer + _network(model, costs, k, sequences))
        + dense_layers * (before + shared)
        + _dense(costs, model.head_nbytes, sequences)
    )


def _network(model: Geometry, costs: Costs, k: int, rows: int) -> float:
    """Return the network time of a layer.

    Rows go to the other machines, and K results of each row come back, in two sums.
    """
    if costs.hosts == 1:
        return 0.0
    nbytes = rows * (1 + k) * model.row_nbytes
    return 2 * costs.sum_seconds + nbytes / costs.network_gb_s / 1e9


def _compute(model: Geometry, costs: Costs, k: int, sequences: int) -> float:
    dense = model.layers * (model.layer_nbytes + model.shared_nbytes) + model.head_nbytes
    experts = model.expert_layers * k * model.expert_nbytes / costs.hosts
    return _dense(costs, dense, sequences) + sequences * experts / costs.weights_gb_s / 1e9


def _launches(costs: Costs, sequences: int) -> float:
    """Return the time of one layer that has nothing to compute."""
    each = _SEQUENCE_OF_LAYER if costs.stacks else 1.0
    return costs.layer_seconds * (1 + each * (sequences - 1))


def _dense(costs: Costs, nbytes: float, sequences: int) -> float:
    """Return the time of dense weights.

    Where sequences are one array, each half of the batch unpacks the weights once for four
    sequences: so from eight sequences on, each takes less time than one alone.
    """
    share = _SEQUENCE_OF_FOUR if costs.stacks and sequences >= 8 else 1.0
    return share * sequences * nbytes / costs.weights_gb_s / 1e9


def _weights(model: Geometry, costs: Costs, nbytes: float, rows: float) -> float:
    """Return the seconds of `rows` rows times weights of `nbytes` bytes.

    It is the time of the bytes or of the arithmetic, whichever is longer.
    """
    arithmetic = 2 * rows * nbytes * model.weights_per_byte / costs.prompt_gflops / 1e9
    through = nbytes / costs.weights_gb_s / 1e9
    return through if rows <= 1 else max(through, arithmetic)


def prompt_time(
    model: Geometry,
    costs: Costs,
    k: int,
    routing: Routing,
    *,
    tokens: int,
    pass_tokens: int,
    slots: int,
    first: Step,
) -> PromptTime:
    """Compute the time to the first token, starting with empty slots.

    What attention takes in a long context is left out.

    Args:
        k: experts per token.
        routing: expected routing, which tells how many experts the tokens of a pass need.
        tokens: tokens of the prompt, 1 or more.
        pass_tokens: tokens that go through the layers in one pass and share the reads of experts.
        slots: slots of each layer during the prefill.
        first: the decode step that gives the first token.
    """
    compute = reading = read = seconds = 0.0
    passes = ceil(tokens / pass_tokens)
    for number in range(passes):
        rows = min(pass_tokens, tokens - number * pass_tokens)
        union = routing.union(rows, k, model.experts)
        # Experts that an earlier pass left in the slots are not read again.
        missing = union * (1 - (slots / model.experts if number else 0))
        reads = missing * model.expert_nbytes / costs.disk_gb_s / 1e9 / costs.hosts
        if not number:
            reads += min(missing, slots) * model.expert_nbytes / costs.fresh_gb_s / 1e9
        dense = costs.layer_seconds + _weights(model, costs, model.layer_nbytes, rows)
        dense += _weights(model, costs, model.shared_nbytes, rows)
        experts = union * _weights(model, costs, model.expert_nbytes, rows * k / union)
        experts /= costs.hosts
        dense += _network(model, costs, k, rows)
        seconds += model.layers * dense
        seconds += model.expert_layers * (max(experts, reads) if costs.overlap else experts + reads)
        compute += model.layers * dense + model.expert_layers * experts
        reading += model.expert_layers * reads
        read += model.expert_layers * missing * model.expert_nbytes
    return PromptTime(tokens, passes, seconds + first.seconds, compute, reading, read)
