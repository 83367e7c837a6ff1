"""Test `flashmoe plan` of local checkpoints, and what it measures on this machine."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import command_line
import pytest
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import BudgetError
from flashmoe.memory import footprint
from flashmoe.memory import system as memory
from flashmoe.models.loading import load_streaming, plan_memory
from flashmoe.options import LoadOptions
from flashmoe.plan import speed_probe
from flashmoe.plan.estimate import PlanOptions, estimate_speed, split_memory
from flashmoe.plan.machines import find_machine
from flashmoe.plan.speed_model import Costs

MAC = ("--machine", "m3-max-48gb")
EXPERTS = 96


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("STEPS_SECONDS", "DISK_SECONDS"):
        monkeypatch.setattr(speed_probe, name, 0.1)
    monkeypatch.setattr(speed_probe, "SCRATCH_NBYTES", 1 << 25)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Write a toy that is so large that a single slot matters in a memory budget."""
    return write_toy(
        tmp_path_factory.mktemp("toy") / "toy",
        num_experts=EXPERTS,
        top_k=6,
        hidden_size=256,
        moe_intermediate_size=512,
        max_position_embeddings=32768,
    )


run = partial(command_line.run, "plan")


def run_json(*args, code=0) -> dict:
    return json.loads(run(*args, "--json", code=code))


def test_plan_prints_its_fields_as_a_table():
    text = run("flashmoe-demo", "--prompt", "50")
    header, *rows = text.splitlines()
    assert header == "field\tvalue"
    fields = [row.split("\t")[0] for row in rows]
    words = ["memory", "context", "slots", "hit rate", "measured", "speed", "bound", "formula"]
    assert [f for f in fields if f in words] == words
    assert rows[-1] == "runs\tyes"
    assert re.search(r"tokens/s; first token after [\d.]+ m?s \(50 prompt tokens\)", text)
    assert not re.search(r"\de[+-]", text)
    assert "PREDICTION" not in text


def test_prediction_for_a_known_machine_says_so(toy):
    text = run(toy, *MAC)
    assert "PREDICTION for m3-max-48gb: 48 GB at 400 GB/s" in text
    assert "\nmeasured\t" not in text
    plan = run_json(toy, *MAC)
    assert plan["prediction"]
    assert "layer_ms" in plan["assumed"]
    assert plan["machine"] == "m3-max-48gb"
    assert plan["disk_probe"] is None


def test_json_has_every_figure(toy):
    plan = run_json(toy, "--prompt", "30", "--routing", "uniform")
    assert plan["runs"]
    assert (plan["experts"], plan["k"], plan["trained_k"], plan["bits"]) == (EXPERTS, 6, 6, 4)
    assert plan["routing"]["name"] == "uniform"
    step, costs = plan["token"], plan["costs"]
    assert step["tokens_per_second"] == pytest.approx(1 / step["seconds"])
    assert plan["prompt"]["seconds"] > step["seconds"]
    assert all(costs[n] > 0 for n in ("weights_gb_s", "disk_gb_s", "prompt_gflops"))
    assert plan["disk_probe"]["what"] == "its own experts"
    assert plan["repo"] is None


def tight(checkpoint, slots: int) -> int:
    """Return a memory budget of this process that leaves about this many slots."""
    plan = plan_memory(checkpoint)
    return memory.resident() + plan.dense + plan.working + slots * plan.slot_nbytes


def test_planned_memory_equals_that_of_a_loaded_model(toy):
    """The plan and the loaded model use the same arithmetic, so they give the same numbers."""
    checkpoint = Checkpoint.open(toy)
    load_streaming(
        checkpoint, slots=8
    ).close()  # the memory that a first load keeps is counted from now on
    options = PlanOptions(memory=tight(checkpoint, 12), experts=4, context=4096)
    split = split_memory(checkpoint, options)
    model = load_streaming(checkpoint, memory=options.memory, experts=4, prompt_cache=None)
    try:
        assert split.plan.elastic
        assert split.plan.slots_per_layer == pytest.approx(model.plan.slots_per_layer, abs=3)
        assert (split.plan.dense, split.plan.working) == (model.plan.dense, model.plan.working)
        pass_tokens = model.elastic_slots.fit_prefill(1000, [1000], 4)
        assert split.pass_tokens == pytest.approx(pass_tokens, abs=200)
        model.elastic_slots.fit_decoding([4096])
        assert 6 < model.elastic_slots.per_layer < EXPERTS
        assert split.slots == pytest.approx(model.elastic_slots.per_layer, abs=3)
    finally:
        model.close()


def test_a_larger_process_has_the_plan_of_a_smaller_one(toy, monkeypatch):
    """What was planned before a tokenizer was loaded holds after that."""
    checkpoint = Checkpoint.open(toy)
    program = footprint.program_nbytes(checkpoint)
    plans = []
    for held in (50 * 10**6, program - 1):
        monkeypatch.setattr(memory, "resident", lambda held=held: held)
        plans.append(plan_memory(checkpoint, LoadOptions(memory="2GB", prompt_cache=None)))
    assert plans[0] == plans[1]
    assert plans[0].resident == program
    monkeypatch.setattr(memory, "resident", lambda: program + 10**8)
    assert plan_memory(checkpoint, LoadOptions(memory="2GB")).resident == program + 10**8


def test_shorter_context_is_planned_where_memory_is_short(toy, monkeypatch):
    checkpoint = Checkpoint.open(toy)
    monkeypatch.setattr(memory, "resident", lambda: 10**8)
    plan = plan_memory(checkpoint, LoadOptions(memory="4GB", prompt_cache=None), context=8192)
    long = plan.total - (plan.slots_per_layer - plan.least_slots) * plan.slot_nbytes
    options = LoadOptions(memory=long, prompt_cache=None)
    assert plan_memory(checkpoint, options).context == 8192
    options = replace(options, memory=long - 10**6)
    short = plan_memory(checkpoint, options)
    assert short.context == 4096
    assert short.total <= long - 10**6
    assert short.passing < plan_memory(checkpoint, replace(options, memory=2 * long)).passing
    with pytest.raises(BudgetError):
        plan_memory(checkpoint, options, context=8192)


def test_batch_leaves_fewer_slots_for_its_contexts(toy):
    """Each request needs keys and values of its own, and on a CPU slots give way to them."""
    checkpoint = Checkpoint.open(toy)
    one, two = (
        split_memory(checkpoint, PlanOptions(memory=tight(checkpoint, 40), batch=n)) for n in (1, 9)
    )
    expected = 8 * one.context_nbytes // one.plan.slot_nbytes
    assert expected > 4
    assert one.slots - two.slots == pytest.approx(expected, abs=3)


def budget(toy, more_slots=0.0) -> int:
    """Return a memory budget for the fewest slots and `more_slots` in addition."""
    checkpoint = Checkpoint.open(toy)
    text = run(toy, "--memory", "100MB", "--context", 8192, *MAC, code=1)
    least = re.search(r'pass\s+memory="([\d.]+)(MB|GB)"', " ".join(text.split()))
    slot = sum(x.expert_nbytes for x in checkpoint.expert_layers.values())
    return int(float(least[1]) * {"MB": 1e6, "GB": 1e9}[least[2]] + more_slots * slot)


def test_too_little_memory_is_reported(toy):
    text = run(toy, "--memory", "100MB", code=1)
    assert re.search(r"runs\tNO: .*too small", text)
    plan = run_json(toy, "--memory", "100MB", code=1)
    assert not plan["runs"]
    assert "needs at least" in plan["why_not"]
    assert "memory" not in plan


def test_more_memory_is_faster(toy):
    speeds = []
    for slots in (0, 4, 12, 40):
        plan = run_json(toy, "--memory", budget(toy, slots), *MAC)
        speeds.append(plan["token"]["tokens_per_second"])
    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1]


def test_pruned_router_is_faster(toy):
    limit = budget(toy, 2)
    full = run_json(toy, "--memory", limit, *MAC)
    pruned = run_json(toy, "--memory", limit, "--experts", 2, *MAC)
    assert (full["k"], pruned["k"]) == (6, 2)
    assert pruned["token"]["seconds"] < full["token"]["seconds"]
    assert "K=2 of 6, pruned: not exact" in run(toy, "--experts", 2, *MAC)


def test_longer_context_leaves_fewer_slots(toy):
    limit = budget(toy, 20)
    short, long = (
        run_json(toy, "--memory", limit, "--context", n, *MAC)["memory"] for n in (8192, 8448)
    )
    assert long["keys"] > short["keys"]
    assert long["slots"] < short["slots"]


def test_number_of_machines_and_network_enter_the_plan(toy):
    options = ("--routing", "uniform", "--machine", "m3-max-48gb", "--batch", 4)
    one, two = (run_json(toy, *options, "--hosts", n, "--network", 0.5) for n in (1, 2))
    assert two["asked"]["hosts"] == 2
    assert two["costs"]["network_gb_s"] == 0.5
    assert two["token"]["network"] > one["token"]["network"] == 0
    out = run(toy, *options, "--hosts", 2)
    assert "on 2 machines" in out
    assert "network" in out
    for wrong, text in (("--hosts", "hosts=0"), ("--network", "network=0")):
        assert f"{text} is out of range" in run(toy, wrong, 0, code=1)


def test_batch_takes_longer_for_each_step_and_shares_experts(toy):
    limit = budget(toy, 20)
    one, four = (run_json(toy, "--memory", limit, "--batch", n, *MAC) for n in (1, 4))
    assert four["token"]["rows"] == 4
    assert one["token"]["needed"] < four["token"]["needed"] <= 24
    assert four["memory"]["slots"] < one["memory"]["slots"]
    assert four["token"]["seconds"] > one["token"]["seconds"]
    assert "for 4 requests together" in run(toy, "--batch", 4, *MAC)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--machine", "pdp-11"], "machine pdp-11 is not known: use one of m1-16gb"),
        (["--experts", "7"], "experts must be between 1 and 6"),
        (["--experts", "0"], "experts=0 must be 1 or more"),
        (["--context", "40000"], "context=40000 is out of range"),
        (["--prompt", "0"], "prompt=0 is out of range"),
        (["--batch", "0"], "batch=0 is out of range"),
        (["--memory", "lots"], "is not a memory size"),
    ],
)
def test_invalid_option_is_explained(toy, args, says):
    text = " ".join(run(toy, *args, code=1).split())
    assert says.replace("pdp-11", "'pdp-11'") in text


def test_missing_name_is_an_error_and_machines_are_listed():
    assert "Missing argument" in run(code=2)
    assert "no model name" in run("nobody", code=1)
    assert "m3-max-48gb\t48 GB\t400\t5.5\t" in run("--machine", "list")
    machines = {m["name"]: m for m in json.loads(run("--machine", "list", "--json"))}
    assert machines["m3-max-48gb"]["memory"] == 48 << 30


def test_disk_is_measured_as_decoding_reads_from_it(toy):
    checkpoint = Checkpoint.open(toy)
    seen = []

    def disk(misses, pause):
        seen.append((misses, pause))
        return 0.5

    options = PlanOptions(routing="uniform", prompt=100)
    mac = find_machine("m3-max-48gb")
    split = replace(split_memory(checkpoint, options, mac), slots=EXPERTS // 2)
    costs = Costs(10.0, 0.001, math.inf, 100.0)
    estimate = estimate_speed(checkpoint, options, split, costs, disk)
    assert [m for m, _ in seen] == [3]  # half of six miss
    assert 0 < seen[0][1] < estimate.token.seconds
    assert estimate.costs.disk_gb_s == 0.5
