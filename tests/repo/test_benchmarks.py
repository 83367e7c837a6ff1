"""Tests that the benchmarks run and that their results add up. No speed is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import disk
import growth
import numpy as np
import pytest
import routing_data
import runs
import synth
import synth_gguf
import timeline
from gpu import prompts
from gpu import run as gpu_run
from gpu.clock import union
from gpu.sides import SIDES, Sides
from launching import launched
from timeline import Span

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.ops.gpu.fused import SETTINGS
from flashmoe_metal.kernel import available

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# matplotlib is in the dependency group of the benchmarks, not in the group of the tests.
PLOTS = importlib.util.find_spec("matplotlib") is not None
SMALL = {
    "HIDDEN": 128,
    "EXPERT": 64,
    "HEADS": 2,
    "KV_HEADS": 1,
    "HEAD_DIM": 64,
    "KEY_HEADS": 2,
    "VALUE_HEADS": 4,
    "LINEAR_DIM": 32,
}
LAYERS, EXPERTS, K, SLOTS = 4, 24, 4, 8


def shrink(module, patch) -> None:
    """Give a benchmark's module the sizes of the small model."""
    for name, value in SMALL.items():
        if hasattr(module, name):
            patch.setattr(module, name, value)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The model of synth.py with small matrices."""
    path = tmp_path_factory.mktemp("synth") / "small"
    with pytest.MonkeyPatch.context() as patch:
        shrink(synth, patch)
        synth.write(path, layers=LAYERS, experts=EXPERTS, vocab=64, top_k=K)
    return path


def run(script: str, *arguments) -> dict:
    """Run a benchmark and return the JSON that it prints last."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--keep-cache"]
    command += ["--raw-seconds", "0.05", "--steps", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core")}
    environment |= {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def plotting(picture: Path) -> list:
    return ["--plot", picture] if PLOTS else []


def test_streaming_results_add_up(small, tmp_path):
    ids = tmp_path / "ids"
    ids.write_text("\n".join(map(str, np.random.default_rng(0).integers(0, 64, 30))))
    picture = tmp_path / "plots" / "streaming.svg"
    result = run(
        "streaming.py", small, "--tokens", ids, "--prompt", 20, "--warm",
        "--setting", f"slots={SLOTS}", "--case", "io=direct depth=3", "--case", "k=2",
        *plotting(picture),
    )  # fmt: skip
    assert not PLOTS or picture.read_text().count("waiting for the disk") > 0
    expert = next(iter(Checkpoint.open(small).expert_layers.values())).expert_nbytes
    for name, k in (("io=direct depth=3", K), ("k=2", 2)):
        case = result["cases"][name]
        assert (case["experts"], case["slots"]) == (k, SLOTS)
        for which in ("cold", "warm"):
            row = case[which]
            assert row["tokens_per_second"] > 0
            assert row["union_bytes"] % expert == 0
            # The first pass reads every expert of the prompt once.
            assert which == "warm" or row["prefill_bytes"] == row["union_bytes"]
            missed = LAYERS * k * expert * (1 - row["hit_rate"])
            assert row["bytes_per_token"] == pytest.approx(missed, rel=0.02)
            assert abs(row["hit_rate"] - row["expected_hit_rate"]) < 0.2
        assert case["cold"]["time_to_first_token"] > 0


def test_streaming_stays_under_a_memory_limit(small):
    if not (runs.can_limit() and runs.can_drop()):
        pytest.skip("cannot make memory cgroups")
    result = run("streaming.py", small, "--limit", "900MB", "--memory", "600MB", "--prompt", 4)
    case = result["cases"]["io=buffered"]
    assert case["cgroup_limit"] == 900_000_000
    assert 0 < case["cgroup_peak"] <= case["cgroup_limit"]
    assert case["peak_rss"] < 600_000_000


def test_growth_runs_each_budget(small, tmp_path):
    picture = tmp_path / "growth.svg"
    result = run(
        "growth.py", small, "--budgets", "700MB", "900MB", "--room", "none", "--prompt", 4,
        *plotting(picture),
    )  # fmt: skip
    assert set(result["budgets"]) == {"700MB", "900MB"}
    assert not PLOTS or picture.stat().st_size > 1000


def budget(slots: int, seconds: float, hits: float) -> dict:
    """Return the result of a budget, as growth.py has it."""
    cold = {
        "tokens_per_second": 1 / seconds,
        "compute_ms": 100.0,
        "hit_rate": hits,
        "expected_hit_rate": hits,
    }
    return {"cold": cold, "raw_gb_s": 1.0, "needed_bytes": 200_000_000, "slots": slots}


def test_growth_expects_speeds_from_compute_and_reads():
    """A token takes 0.1 s of computing and needs 0.2 GB of experts, which are read at 1 GB/s."""
    rows = growth.expect(
        {"1GB": budget(0, 0.3, 0.0), "2GB": budget(5, 0.2, 0.5), "3GB": budget(10, 0.1, 1.0)}
    )
    assert [row["serial"] for row in rows.values()] == pytest.approx([1 / 0.3, 5, 10], abs=1e-3)
    assert [row["overlap"] for row in rows.values()] == [5, 10, 10]
    assert all(row["serial_deviation"] == row["line_deviation"] == 0 for row in rows.values())
    assert rows["2GB"]["overlap_deviation"] == -0.5


def test_timeline_splits_a_token_into_its_parts(small, tmp_path):
    picture = tmp_path / "timeline.svg"
    result = run(
        "timeline.py", small, "--setting", f"slots={SLOTS}", "--prompt", 4, *plotting(picture)
    )
    token = result["token_ms"]
    assert sum(token[kind] for kind in timeline.KINDS) == pytest.approx(token["step"], abs=0.1)
    assert 0 < token["disk"] <= token["step"]
    assert token["experts"] > 0
    assert not PLOTS or "reader 1" in picture.read_text()


def test_timeline_counts_each_moment_once():
    spans = [
        Span("start", 0, 1.0, 4.0),
        Span("slots", 0, 3.0, 3.5),
        Span("slots", 0, 5.0, 9.0),
        Span("waiting", 0, 6.0, 7.0),
        Span("experts", 0, 7.0, 8.0),
        Span("read", 1, 2.0, 5.0),
        Span("read", 2, 4.0, 7.0),
        Span("read", 1, 9.5, 12.0),
    ]
    milliseconds = timeline.by_kind(spans, 0.0, 10.0)
    assert milliseconds == {
        "step": 10_000.0,
        "dense": 5500.0,
        "experts": 1000.0,
        "waiting": 1000.0,
        "slots": 2500.0,
        "disk": 5500.0,
    }


def test_raw_bandwidth_reads_ranges_of_experts(small):
    ranges = list(zip(range(9), disk.experts(small), strict=False))
    parts = {(file, nbytes) for _, (file, _, nbytes) in ranges}
    layer = next(iter(Checkpoint.open(small).expert_layers.values()))
    assert {nbytes for _, nbytes in parts} == {p.nbytes for p in layer.parts}
    for speed in (
        disk.bandwidth(disk.experts(small), 3, 0.05),
        disk.bandwidth(disk.pieces(next(small.glob("*.safetensors")), 5000), 2, 0.05),
    ):
        assert speed is None or speed > 0


def test_tokens_are_read_from_a_file_or_drawn(tmp_path):
    file = tmp_path / "ids"
    file.write_text("3 1\n2")
    assert runs.tokens(file, 2, 4, seed=0) == [3, 1]
    with pytest.raises(SystemExit, match="has 3 tokens, 4 are needed"):
        runs.tokens(file, 4, 4, seed=0)
    with pytest.raises(SystemExit, match="beyond the vocabulary of 3"):
        runs.tokens(file, 3, 3, seed=0)
    drawn = runs.tokens(None, 50, 7, seed=1)
    assert drawn == runs.tokens(None, 50, 7, seed=1)
    assert set(drawn) == set(range(7))


def test_medians_are_taken_over_rounds():
    rounds = [{"a": {"b": x, "name": "n"}, "flag": True} for x in (5, 1, 9)]
    assert runs.medians(rounds) == {"a": {"b": 5, "name": "n"}, "flag": True}
    assert runs.nbytes("3.2GB") == 3_200_000_000
    assert runs.nbytes("none") is None


def test_gguf_experts_have_the_bytes_of_the_mlx_ones():
    """Each expert of the GGUF file has as many bytes as in the MLX one."""
    experts = [t for t in synth.plan(4, 6, 32, 4, 64) if "switch_mlp" in t.name]
    gguf_experts = [t for t in synth_gguf.plan(4, 6, 32) if "_exps" in t.name]
    assert (
        sum(t.nbytes for t in experts) == sum(t.nbytes for t in gguf_experts) == 4 * 6 * 7_077_888
    )


def test_gguf_file_can_be_read(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    shrink(synth_gguf, monkeypatch)
    out = tmp_path / "small.gguf"
    written = synth_gguf.write(out, layers=4, experts=6, vocab=32, top_k=3)
    assert written["bytes"] == out.stat().st_size
    reader = gguf.GGUFReader(out)
    tensors = {t.name: t for t in reader.tensors}
    planned = {t.name: t for t in synth_gguf.plan(4, 6, 32)}
    assert tensors.keys() == planned.keys()
    for name, tensor in tensors.items():
        assert tuple(reversed(tensor.shape.tolist())) == planned[name].shape
        assert tensor.n_bytes == planned[name].nbytes
    weights = gguf.quants.dequantize(
        tensors["blk.3.ffn_down_exps.weight"].data, gguf.GGMLQuantizationType.Q4_0
    )
    assert weights.shape == (6, SMALL["HIDDEN"], SMALL["EXPERT"])
    np.testing.assert_allclose(weights.std(axis=-1), SMALL["EXPERT"] ** -0.5, rtol=0.5)
    assert abs(weights.mean()) < 0.02 * weights.std()
    assert not np.array_equal(weights[0], weights[1])
    with pytest.raises(ValueError, match="give a new file"):
        synth_gguf.write(out, layers=4, experts=6, top_k=3)


def test_gpu_benchmark_computes_right_results():
    with launched():
        shares = gpu_run.check(small=True)
    shares.pop("router rows like mlx-lm's")  # on a CPU, MLX orders the chosen experts differently
    assert all(share <= 1 for share in shares.values()), shares


def test_gpu_benchmark_streams_the_bits_of_the_resident_model(tmp_path, monkeypatch):
    shrink(synth, monkeypatch)
    with launched():
        results = gpu_run.streaming(tmp_path, layers=4, experts=12, slots=6, steps=3)
    for io in ("buffered", "direct"):
        assert results[io]["same bits as resident"]
        assert 0 < results[io]["hit rate"] < 1
        assert results[io]["ms of a token"]["step"] > 0


def test_gpu_benchmark_streams_prompts_with_the_bits_of_the_resident_model(tmp_path, monkeypatch):
    shrink(synth, monkeypatch)
    monkeypatch.setattr(prompts, "VOCAB", 1024)
    with launched():
        resident = prompts.prompts(tmp_path, layers=4, experts=14, lengths=[40])
        streamed = prompts.streamed_prompts(tmp_path, layers=4, experts=14, slots=12, lengths=[40])
    assert resident["backend"] == "fused"
    assert resident["prompt of 40"]["tokens/s"] > 0
    assert streamed["experts read"] > 0
    assert streamed["same bits as resident"] == {40: True}


def test_gpu_benchmark_says_that_it_needs_a_gpu():
    with gpu_run.main.make_context("gpu", []) as context:
        assert "prompts" in gpu_run.main.get_help(context)
    if not available():
        with pytest.raises(SystemExit, match="no GPU"):
            gpu_run.main(["--only", "prompts"])


def test_plan_is_within_25_percent_of_published_speeds(small):
    """Published figures are predicted within 25 %; a run here is planned with its own slots."""
    arguments = [small, "--case", "memory=700MB", "--room", "none", "--prompt", "8"]
    report = run("plan.py", *arguments, "--probe-seconds", "0.1")
    assert {row["k"] for row in report["published"]} == {4, 10}
    assert all(abs(row["off"]) < 0.25 for row in report["published"])
    by_name = {row["machine"]: row for row in report["macs"]}
    assert by_name["m3-max-48gb"]["k4"]["tokens_per_second"] > 1
    case = report["here"]["memory=700MB"]
    assert case["slots"] == case["slots_planned"]
    assert case["off"] == pytest.approx(case["predicted"] / case["measured"] - 1, abs=2e-3)
    assert case["first_token_predicted"] > 0


def test_routing_of_plans_is_current():
    """Make one of the two sources of core/flashmoe/plan/routing.json again; both take too long."""
    shipped = json.loads((ROOT / "core/flashmoe/plan/routing.json").read_text())
    current = json.loads(json.dumps(routing_data.of_trace()))
    assert current == shipped["sources"]["Qwen3-30B-A3B"]


def test_batch_benchmark_counts_shared_experts(small):
    common = ("batch.py", small, "--setting", f"slots={SLOTS}", "--rows", "1", "3", "--prompt", 4)
    report = run(*common, "--fill", 2)
    one, three = report["1 rows"], report["3 rows"]
    assert one["needed_per_token"] == LAYERS * K
    assert LAYERS * K / 3 <= three["needed_per_token"] < LAYERS * K
    assert three["speedup"] == round(three["tokens_per_second"] / one["tokens_per_second"], 3)
    whole = run(*common, "--requests", 6)
    assert whole["3 rows"]["request_bytes"] < whole["1 rows"]["request_bytes"]


def test_hostile_clients_leave_other_answers_right():
    command = [sys.executable, ROOT / "benchmarks/hostile_clients.py"]
    command += ["--clients", "2", "--samples", "5", "--limit", "20"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["attacked"]["wrong"] == report["afterwards"]["wrong"] == 0
    for phase in ("shared", "attacked"):
        answered = report[phase]["answered"]
        assert sum(answered.values()) > 0
        assert not any(name.endswith("none") for name in answered), answered


def test_killed_writers_leave_nothing():
    """`sweep` is left out, since a whole one takes a minute."""
    command = [sys.executable, ROOT / "benchmarks/kill_writers.py", "--kills", "3"]
    command += ["--only", "prompts", "register", "quantize", "download"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for writer in command[5:]:
        result = json.loads(done.stdout.splitlines()[-1])[writer]
        assert (result["wrong"], result["stayed"]) == (0, 0)
        assert result["killed"] + result["ended"] == 3
        assert result["whole"] > 0


def test_concurrent_kernels_count_once():
    assert union([(5, 6), (0, 2), (1, 3), (5.5, 5.7), (6, 7)]) == 5
    assert union([]) == 0


def test_large_matrix_has_scales_in_their_range():
    """The matrix is larger than the tile of random bytes that it repeats."""
    scales = synth.Tensor("scales", "BF16", (5 << 20, 1), (0.75, 1.25, -7.5), 3)
    raw = np.concatenate([np.frombuffer(p, np.uint16) for p in synth.Source(0).pieces(scales)])
    values = (raw.astype(np.uint32) << 16).view(np.float32)
    assert values.size == 5 << 20
    assert -9.5 < values.min() < -9 < -6 < values.max() < -5.5


def settings(side: str, shift: int) -> dict:
    """Return the calls that one side of a comparison runs (see benchmarks/gpu/sides.py)."""
    return {
        "whose": lambda: (side, shift),
        "settings": lambda: {n: os.environ.get(n) for n in SETTINGS},
    }


def test_each_side_has_its_own_settings():
    with Sides(settings, shift=3) as sides:
        assert [sides.run(n, "whose")[1] for n in SIDES] == [
            (side, 3) for side, _ in SIDES.values()
        ]
        seen = {n: sides.run(n, "settings")[1] for n in SIDES}
        assert set(sides.alternated("whose", rounds=2)) == set(SIDES)
    assert seen["ours"] == seen["stock, our settings"] == SETTINGS
    assert set(seen["stock"].values()) == {None}
