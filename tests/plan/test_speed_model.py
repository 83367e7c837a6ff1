"""Test the speed model, the routing that it expects, and the machines that are known by name."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashmoe
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.plan.machines import find_machine, known_machines
from flashmoe.plan.routing import REAL, UNIFORM, find_routing
from flashmoe.plan.speed_model import Costs, Geometry, decode_step, prompt_time

MODEL = Geometry(
    layers=60,
    expert_layers=60,
    experts=512,
    expert_nbytes=7_077_888,
    layer_nbytes=65e6,
    shared_nbytes=7e6,
    head_nbytes=572_000_000,
    weights_per_byte=16 / 9,
)
MAC = Costs(280.0, 1e-3, 5.5, 3000.0, as_they_land=False)

costs = st.builds(
    Costs,
    weights_gb_s=st.floats(1, 1000),
    layer_seconds=st.floats(0, 0.01),
    disk_gb_s=st.floats(0.1, 50),
    prompt_gflops=st.floats(10, 1e5),
    as_they_land=st.booleans(),
)
shares = st.floats(0, 1)


@given(costs, st.integers(1, 10), shares, st.floats(1, 10))
def test_faster_part_never_makes_a_step_slower(c, k, hits, factor):
    step = decode_step(MODEL, c, k, hits)
    for better in (
        replace(c, disk_gb_s=c.disk_gb_s * factor),
        replace(c, weights_gb_s=c.weights_gb_s * factor),
        replace(c, layer_seconds=c.layer_seconds / factor),
    ):
        assert decode_step(MODEL, better, k, hits).seconds <= step.seconds * (1 + 1e-9)


@given(costs, st.integers(1, 9), shares)
def test_fewer_experts_or_more_hits_never_make_a_step_slower(c, k, hits):
    step = decode_step(MODEL, c, k, hits)
    assert step.seconds <= decode_step(MODEL, c, k + 1, hits).seconds * (1 + 1e-9)
    assert decode_step(MODEL, c, k, (1 + hits) / 2).seconds <= step.seconds * (1 + 1e-9)


@given(costs, st.integers(1, 10), shares)
def test_parts_of_a_step_add_up(c, k, hits):
    step = decode_step(MODEL, c, k, hits)
    assert step.launches + step.compute + step.waiting == pytest.approx(step.seconds)
    # A step is never faster than its slowest part, nor slower than all parts one after another.
    assert step.seconds >= max(step.reading, step.compute, step.launches) * (1 - 1e-9)
    assert step.seconds <= (step.reading + step.compute + step.launches) * (1 + 1e-9)


def test_step_equals_the_formula_by_hand():
    """Compute steps without misses, and with misses only.

    Experts are read before they are computed on a GPU, and while they are computed on a CPU.
    """
    c = Costs(10.0, 0.001, 1.0, 1e9)
    one = 7_077_888 / 1e10
    dense = 60 * (0.001 + 65e6 / 1e10) + 572e6 / 1e10
    shared = 7e6 / 1e10
    assert decode_step(MODEL, c, 4, 1.0).seconds == pytest.approx(dense + 60 * (shared + 4 * one))
    reads = 4 * 7_077_888 / 1e9
    assert decode_step(MODEL, c, 4, 0.0).seconds == pytest.approx(dense + 60 * (reads + one))
    gpu = replace(c, as_they_land=False)
    assert decode_step(MODEL, gpu, 4, 0.0).seconds == pytest.approx(dense + 60 * (reads + 4 * one))


def test_mean_over_misses_exceeds_the_mean_number_of_misses():
    """A layer without misses does not wait, so the mean time exceeds that of the mean misses."""
    c = Costs(1.0, 0.0, 1.0, 1e9)
    mean = 60 * (65e6 + max(7e6 + 4 * 7_077_888, 3 * 7_077_888)) / 1e9 + 0.572
    assert decode_step(MODEL, c, 4, 0.5).seconds > mean


@pytest.mark.parametrize(
    ("bound", "c"),
    [
        ("disk", Costs(300, 1e-4, 1.0, 1e4)),
        ("compute", Costs(3, 1e-4, 20.0, 1e4)),
        ("launches", Costs(300, 1e-2, 20.0, 1e4)),
    ],
)
def test_bound_names_the_slowest_part(bound, c):
    assert decode_step(MODEL, c, 10, 0.6).bound == bound


def test_batch_shares_experts():
    needed = find_routing(REAL, 512).union(8, 10, 512)
    assert 10 < needed < 80
    one, many = (
        decode_step(MODEL, MAC, 10, 0.6),
        decode_step(MODEL, MAC, 10, 0.6, needed=needed, sequences=8),
    )
    assert one.tokens_per_second < many.tokens_per_second < 8 * one.tokens_per_second
    assert many.read_nbytes < 8 * one.read_nbytes


@pytest.mark.parametrize(
    ("stacks", "rows", "layer", "dense"), [(False, 4, 4, 4), (True, 4, 1.6, 4), (True, 8, 2.4, 5.2)]
)
def test_batch_step_equals_the_formula_by_hand(stacks, rows, layer, dense):
    """Sequences are computed one by one beside the reads of all.

    Stacked as one array they share most of a layer, and from eight sequences on dense weights too.
    """
    c = Costs(10.0, 1e-3, 2.0, 1000.0, stacks=stacks)
    layers, e = MODEL.layers, MODEL.expert_nbytes
    own = layer * 1e-3 + dense * (MODEL.layer_nbytes + MODEL.shared_nbytes) / 10e9
    own += rows * 10 * e / 10e9
    for hits in (0.0, 1.0):
        reads = 38 * (1 - hits) * e / 2e9
        step = decode_step(MODEL, c, 10, hits, needed=38, sequences=rows)
        head = dense * MODEL.head_nbytes / 10e9
        assert step.seconds == pytest.approx(layers * max(own, reads) + head)
        assert step.compute + step.launches == pytest.approx(layers * own + head)


def test_machines_share_the_reads_and_the_network_costs_time():
    one = decode_step(MODEL, MAC, 10, 0.3)
    two = decode_step(MODEL, replace(MAC, hosts=2), 10, 0.3)
    assert one.bound == "disk"
    assert two.reading == pytest.approx(one.reading / 2)
    assert 0.5 * one.seconds < two.seconds < one.seconds
    slow = replace(MAC, hosts=2, network_gb_s=0.001, sum_seconds=1e-4)
    step = decode_step(replace(MODEL, row_nbytes=4 * 4096), slow, 10, 0.3)
    assert step.bound == "network"
    assert step.network == pytest.approx(MODEL.layers * (2e-4 + 11 * 16384 / 1e6))
    assert step.seconds == pytest.approx(two.seconds + step.network)


def test_longer_prompt_takes_longer():
    routing, first = find_routing(REAL, 512), decode_step(MODEL, MAC, 10, 0.6)
    settings = {"pass_tokens": 2048, "slots": 66, "first": first}
    times = [
        prompt_time(MODEL, MAC, 10, routing, tokens=n, **settings).seconds
        for n in (1, 100, 2048, 9000)
    ]
    assert times == sorted(times)
    # The first reads wait for the memory of the slots where its allocation is slow.
    slow = prompt_time(MODEL, replace(MAC, fresh_gb_s=0.5), 10, routing, tokens=2048, **settings)
    fresh = 60 * 66 * MODEL.expert_nbytes / 0.5e9
    assert slow.reading - prompt_time(
        MODEL, MAC, 10, routing, tokens=2048, **settings
    ).reading == pytest.approx(fresh)
    # A pass reads each expert at most once.
    passed = prompt_time(MODEL, MAC, 10, routing, tokens=9000, **settings)
    assert passed.passes == 5
    assert passed.read_nbytes < 5 * 60 * 512 * MODEL.expert_nbytes
    assert passed.seconds > passed.reading


@pytest.mark.parametrize("experts", [60, 128, 256, 512])
@given(a=shares, b=shares, k=st.integers(1, 12))
def test_more_slots_never_lower_the_hit_rate(experts, a, b, k):
    routing = find_routing(REAL, experts)
    low, high = (routing.hit_rate(share, k) for share in sorted((a, b)))
    assert 0 <= low <= high <= 1


@given(st.integers(1, 5000), st.integers(1, 10), st.sampled_from([REAL, UNIFORM]))
def test_more_tokens_never_need_fewer_experts(tokens, k, name):
    routing = find_routing(name, 512)
    assert k <= routing.union(tokens, k, 512) <= routing.union(tokens + 1, k, 512) <= 512


def test_routing_meets_the_points_of_its_data():
    data = json.loads((Path(flashmoe.__file__).parent / "plan/routing.json").read_text())
    for name, source in data["sources"].items():
        routing = find_routing(name, source["experts"])
        for k, rates in source["hit_rate"].items():
            for share, rate in zip(source["shares"], rates, strict=True):
                assert routing.hit_rate(share, int(k)) == pytest.approx(rate)
        for k, shares in source["union"].items():
            for tokens, share in list(zip(data["tokens"], shares, strict=True))[1:]:
                union = routing.union(tokens, int(k), source["experts"])
                assert union / source["experts"] == pytest.approx(share, abs=1e-3)
    # K=9 lies halfway between two K of the data.
    rates = [find_routing("Qwen3.5-397B-A17B", 512).hit_rate(0.125, k) for k in (8, 9, 10)]
    assert rates[1] == pytest.approx((rates[0] + rates[2]) / 2)
    assert find_routing(UNIFORM, 512).hit_rate(0.3, 10) == 0.3
    assert find_routing(REAL, 128).name == "Qwen3-30B-A3B"


def test_known_machines_have_plausible_figures():
    assert {"m1-max-64gb", "m3-max-48gb", "m4-max-64gb", "m4-max-128gb", "m4-pro-48gb"} < set(
        known_machines()
    )
    assert {"m3-ultra-256gb", "m3-ultra-512gb", "m5-max-128gb", "m4-16gb", "m4-24gb"} < set(
        known_machines()
    )
    for name, machine in known_machines().items():
        assert name == name.lower() == machine.name
        assert 16 << 30 <= machine.memory <= 512 << 30
        assert 0.6 < machine.usable / machine.memory < 0.8
        assert 60 <= machine.memory_gb_s <= 1000
        assert 1 <= machine.costs.disk_gb_s <= 20
        assert 20 < machine.costs.weights_gb_s < machine.memory_gb_s
        assert 500 < machine.costs.prompt_gflops < 20_000
        assert machine.source
        assert machine.assumed
        assert name in machine.describe()


def test_unknown_machine_is_refused():
    with pytest.raises(SettingError, match="m3-max-48gb, m3-max-64gb"):
        find_machine("cray-1")
    assert find_machine(" M3-Max-48GB ").name == "m3-max-48gb"


def test_geometry_counts_every_byte(originals):
    """Each token uses every dense byte once, except those of the embedding and the last norm."""
    for name in ("one", "three", "plain", "next"):
        checkpoint = Checkpoint.open(originals / name)
        geometry = Geometry.from_checkpoint(checkpoint)
        counted = geometry.layers * (geometry.layer_nbytes + geometry.shared_nbytes)
        counted += geometry.head_nbytes
        rest = checkpoint.dense_nbytes - counted
        other = [
            t for t in checkpoint.dense if ".layers." not in t.name and "lm_head" not in t.name
        ]
        assert rest == pytest.approx(sum(t.nbytes for t in other))
        layer = next(iter(checkpoint.expert_layers.values()))
        assert geometry.expert_nbytes == layer.expert_nbytes
        assert geometry.expert_layers == (3 if name == "next" else 4)
        assert geometry.context_nbytes > 0


def test_reads_through_the_page_cache_are_not_overlapped():
    """Without slots, hits in the page cache cost time too, and reads overlap with nothing."""
    c = replace(MAC, cached_gb_s=32.0, overlap=False, weights_gb_s=inf)
    step = decode_step(MODEL, c, 4, 0.5)
    reads = 60 * 4 * 0.5 * 7_077_888 * (1 / 5.5e9 + 1 / 32e9)
    assert step.reading == pytest.approx(reads)
    assert step.seconds == pytest.approx(0.06 + reads)
