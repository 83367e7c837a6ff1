"""How long a decoded token and a prompt take, from a model's bytes and a machine's speeds.

One layer of one token:

    launches + dense + max(shared + experts, reads + one expert)      experts computed as they land
    launches + dense + max(shared + hits, reads) + misses             (GPU) once all have landed

The reads of missing experts start when the router has chosen, so attention and router (`dense`)
come before them, and the shared expert and the experts in slots are computed meanwhile. How many of
a layer's experts miss is drawn: the mean is taken over the binomial distribution of the hit rate,
because a layer that misses none waits for nothing. A token is all layers and the head.

Rows of a batch share their reads alone: each goes over the weights by itself, while the experts of
others are read. Hosts of a cluster share reads and experts, and wait for the network twice a layer.

One layer of a prompt: dense, then max(experts, reads), where each expert of the union is read once
for all tokens of a sweep. Knows no machine and no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, comb, inf

from ..checkpoint.checkpoint import Checkpoint
from ..memory.footprint import cache_nbytes
from .routing import Routing

_HEADS = ("lm_head.", "language_model.lm_head.", "model.lm_head.")


@dataclass(frozen=True)
class Geometry:
    """A model, as far as speed goes. Bytes are those of the file.

    layers: all of them; expert_layers: those with experts. layer_nbytes: dense bytes of a layer,
    shared_nbytes of its shared expert, which layer_nbytes does not hold. weights_per_byte: of an
    expert. context_nbytes: keys and values that a token reads of each token before it.
    row_nbytes: of a hidden state between hosts.
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
    def of(cls, checkpoint: Checkpoint) -> Geometry:
        inside = [t for t in checkpoint.dense if ".layers." in t.name]
        shared = sum(t.nbytes for t in inside if ".shared_expert." in t.name)
        head = sum(t.nbytes for t in checkpoint.dense if t.name.startswith(_HEADS))
        # Tied: the embedding is the head.
        head = head or sum(t.nbytes for t in checkpoint.dense if ".embed_tokens." in f".{t.name}")
        config, moe = checkpoint.text_config, len(checkpoint.expert_layers)
        expert = checkpoint.expert_nbytes / checkpoint.num_experts / moe
        return cls(
            layers=checkpoint.num_layers,
            expert_layers=moe,
            experts=checkpoint.num_experts,
            expert_nbytes=expert,
            layer_nbytes=(sum(t.nbytes for t in inside) - shared) / checkpoint.num_layers,
            shared_nbytes=shared / checkpoint.num_layers,
            head_nbytes=head,
            weights_per_byte=3 * config["hidden_size"] * config["moe_intermediate_size"] / expert,
            context_nbytes=(cache_nbytes(checkpoint, 512) - cache_nbytes(checkpoint, 256)) / 256,
            row_nbytes=4 * config["hidden_size"],
        )


# What a further row adds to a layer beside arithmetic, as a share of what one row takes; and the
# time of a product for each of four rows, as a share of that of one alone. Both measured on two
# cores of AMD EPYC (AVX2): see docs/experiments.md.
_ROW_OF_LAYER, _ROW_OF_FOUR = 0.2, 0.65


@dataclass(frozen=True)
class Costs:
    """The speeds of a machine, or of an engine on it.

    weights_gb_s: weights through the cores, one token. layer_seconds: what a layer takes where
    there is nothing to compute: launches, and the host's part. disk_gb_s: experts from the drive,
    read as decoding reads them. prompt_gflops: arithmetic of many tokens. as_they_land: see above.
    stacks: whether the rows of a batch are one array, see `flashmoe.ops`.
    cached_gb_s: experts that the page cache holds, where an engine has no slots of its own.
    overlap: whether anything is computed while reads are in flight. fresh_gb_s: memory that the
    system gives, which the first reads into slots wait for. hosts: like this one, which share the
    experts; network_gb_s and sum_seconds: of the network between them, and until a sum of a few
    bytes is made.
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
    """One step of decoding. seconds: all of it, which is the sum of launches, compute, network and
    waiting, unless rows overlap.

    rows: tokens that it decodes, one of each request. needed: experts of a layer. reading: seconds
    that the drive works. read_nbytes: from the drive. bound: what it would gain most from if that
    took no time: "disk", "compute", "launches" or "network".
    """

    rows: int
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
        """Of all rows together."""
        return self.rows / self.seconds


@dataclass(frozen=True)
class Prompt:
    """Reading a prompt, and the first token after it. seconds: all; compute and reading overlap."""

    tokens: int
    sweeps: int
    seconds: float
    compute: float
    reading: float
    read_nbytes: float


def decode(
    model: Geometry,
    costs: Costs,
    k: int,
    hit_rate: float,
    *,
    context: int = 0,
    needed: float | None = None,
    rows: int = 1,
) -> Step:
    """A step of decoding.

    Args:
        k: experts of a token.
        hit_rate: of the experts that a step needs in a layer, the share in slots.
        context: tokens before this one.
        needed: how many those are; None: K, as of one row.
        rows: tokens that go through together.
    """
    needed = k if needed is None else max(k, round(needed))
    keys = context * rows * model.context_nbytes

    def seconds(costs: Costs) -> float:
        attention = keys / costs.weights_gb_s / 1e9
        return attention + _seconds(model, costs, k, hit_rate, needed, rows)

    total = seconds(costs)
    free = {
        "disk": replace(costs, disk_gb_s=inf, cached_gb_s=inf),
        "compute": replace(costs, weights_gb_s=inf, prompt_gflops=inf),
        "launches": replace(costs, layer_seconds=0.0),
        "network": replace(costs, sum_seconds=0.0, network_gb_s=inf),
    }
    launches = model.layers * _launches(costs, rows)
    compute = _compute(model, costs, k, rows) + keys / costs.weights_gb_s / 1e9
    network = model.expert_layers * _network(model, costs, k, rows)
    read = model.expert_layers * needed * (1 - hit_rate) * model.expert_nbytes
    cached = model.expert_layers * needed * hit_rate * model.expert_nbytes
    return Step(
        rows=rows,
        needed=needed,
        seconds=total,
        launches=launches,
        compute=compute,
        network=network,
        waiting=max(0.0, total - launches - compute - network),
        reading=read / costs.disk_gb_s / 1e9 / costs.hosts + cached / costs.cached_gb_s / 1e9,
        read_nbytes=read,
        bound=min(free, key=lambda name: seconds(free[name])),
    )


def _seconds(model, costs: Costs, k: int, hit_rate: float, needed: int, rows: int) -> float:
    one = model.expert_nbytes / costs.weights_gb_s / 1e9
    shared = _dense(costs, model.shared_nbytes, rows)
    before = _launches(costs, rows) + _dense(costs, model.layer_nbytes, rows)
    from_disk = model.expert_nbytes / costs.disk_gb_s / 1e9 / costs.hosts
    from_cache = model.expert_nbytes / costs.cached_gb_s / 1e9
    experts = shared + rows * k * one / costs.hosts
    layer = 0.0
    for misses in range(needed + 1):
        hits = needed - misses
        chance = comb(needed, misses) * (1 - hit_rate) ** misses * hit_rate**hits
        reads = misses * from_disk + hits * from_cache
        if not costs.overlap:
            step = before + experts + reads
        elif rows > 1:
            # Two halves: one computes while the other's experts are read.
            step = max(before + experts, reads)
        elif costs.as_they_land:
            step = before + max(experts, reads + (one if misses else 0.0))
        else:
            rest = misses * one / costs.hosts
            step = before + max(experts - rest, reads) + rest
        layer += chance * step
    rest = model.layers - model.expert_layers
    return (
        model.expert_layers * (layer + _network(model, costs, k, rows))
        + rest * (before + shared)
        + _dense(costs, model.head_nbytes, rows)
    )


def _network(model: Geometry, costs: Costs, k: int, rows: int) -> float:
    """Of a layer: rows to the other hosts, and K results of each back, in two sums."""
    if costs.hosts == 1:
        return 0.0
    nbytes = rows * (1 + k) * model.row_nbytes
    return 2 * costs.sum_seconds + nbytes / costs.network_gb_s / 1e9


def _compute(model: Geometry, costs: Costs, k: int, rows: int) -> float:
    dense = model.layers * (model.layer_nbytes + model.shared_nbytes) + model.head_nbytes
    experts = model.expert_layers * k * model.expert_nbytes / costs.hosts
    return _dense(costs, dense, rows) + rows * experts / costs.weights_gb_s / 1e9


def _launches(costs: Costs, rows: int) -> float:
    """Of a layer."""
    shared = _ROW_OF_LAYER if costs.stacks else 1.0
    return costs.layer_seconds * (1 + shared * (rows - 1))


def _dense(costs: Costs, nbytes: float, rows: int) -> float:
    """Of dense weights: where rows are one array, those of each half are unpacked once for four."""
    share = _ROW_OF_FOUR if costs.stacks and rows >= 8 else 1.0
    return share * rows * nbytes / costs.weights_gb_s / 1e9


def _weights(model: Geometry, costs: Costs, nbytes: float, rows: float) -> float:
    """Seconds for some rows times weights of so many bytes: whichever takes longer, the bytes or
    the arithmetic."""
    arithmetic = 2 * rows * nbytes * model.weights_per_byte / costs.prompt_gflops / 1e9
    through = nbytes / costs.weights_gb_s / 1e9
    return through if rows <= 1 else max(through, arithmetic)


def prompt(
    model: Geometry,
    costs: Costs,
    k: int,
    routing: Routing,
    *,
    tokens: int,
    sweep: int,
    slots: int,
    first: Step,
) -> Prompt:
    """The time to the first token, with empty slots and without what attention takes of a long
    context.

    Args:
        tokens: of the prompt, one or more. sweep: how many of them share the reads of experts.
        slots: of a layer while it is read.
        first: the step that gives the first token.
    """
    compute = reading = read = seconds = 0.0
    sweeps = ceil(tokens / sweep)
    for number in range(sweeps):
        rows = min(sweep, tokens - number * sweep)
        union = routing.union(rows, k, model.experts)
        # What an earlier sweep left in the slots.
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
    return Prompt(tokens, sweeps, seconds + first.seconds, compute, reading, read)
