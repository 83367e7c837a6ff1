"""Test `flashmoe quantize` through the command, with its rounding and calibration."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import command_line
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import synth
from checkpoint_edits import edit_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_types import write_moe
from toys import FAMILIES, copy_tokenizer, write_chat_toy, write_toy

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.quantization import FLOAT_MODES
from flashmoe.checkpoint.safetensors_writer import encode_header
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.engine import Engine
from flashmoe.events import Text
from flashmoe.models.loading import load_streaming
from flashmoe.quantize import rounding
from flashmoe.quantize import writer as quantize
from flashmoe.quantize.calibration import calibrate
from flashmoe.requests import Request

TEXT = "The cat sat by the sea. It asked a friend what bread is made of, and why leaves fall. "


run = partial(command_line.run, "quantize")


def run_json(*args) -> dict:
    return json.loads(run(*args, "--json"))


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def tensors(directory: Path) -> dict[str, mx.array]:
    loaded = {}
    for file in directory.glob("model*.safetensors"):
        loaded |= mx.load(str(file))
    return loaded


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_result_gives_the_same_logits_in_stock_mlx_lm(tmp_path, family, bits):
    """Compare flashmoe with stock mlx-lm in float32."""
    path = write_toy(tmp_path / "toy", family, bits=bits, shards=2)
    out = tmp_path / "out"
    run(path, out, "--gate-up", 3, "--down", 4, "--dense", 6, "--group-size", 32)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.expert_bits == pytest.approx(10 / 3)
    stock, config = mlx_lm.utils.load_model(out)
    assert config["quantization"] == checkpoint.config["quantization_config"]
    stock.set_dtype(mx.float32)
    ids = mx.array([[5, 17, 3, 90, 41, 8]])
    ours = load_streaming(checkpoint, slots=5)
    try:
        np.testing.assert_allclose(np.array(ours(ids)), np.array(stock(ids)), atol=2e-4)
    finally:
        ours.close()
    before, after = tensors(path), tensors(out)
    for name, tensor in before.items():
        if "norm" in name or ".mlp.gate." in name or "shared_expert_gate" in name:
            assert same(tensor, after[name]), name


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantizing_to_the_same_bits_changes_no_tensor(tmp_path, bits, group_size):
    sizes = {"moe_intermediate_size": 128, "layers": 4}
    path = write_toy(tmp_path / "toy", bits=bits, group_size=group_size, num_experts=3, **sizes)
    run(path, tmp_path / "out", "--bits", bits, "--group-size", group_size)
    before, after = tensors(path), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    kind=st.sampled_from(["normal", "outliers", "constant", "zero", "positive", "one column"]),
)
def test_search_is_never_worse_than_plain_rounding(seed, bits, group_size, dtype, kind):
    random = np.random.default_rng(seed)
    w = random.standard_normal((3, 256)).astype(np.float32) * np.float32(0.02)
    h = np.square(random.standard_normal(256)).astype(np.float32)
    if kind == "outliers":
        w[:, ::50] *= 30
    elif kind == "constant":
        w[:] = w[0, 0]
    elif kind == "zero":
        w[:] = 0
    elif kind == "positive":
        w = abs(w) + np.float32(0.1)
    elif kind == "one column":
        h[:] = 0
        h[7] = 1
    rounded = rounding.round_weights(w, h, bits, group_size, dtype)
    stored = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    for values in (rounded.scales, rounded.biases):
        assert same(mx.array(values), mx.array(values).astype(stored).astype(mx.float32))
    packed = (mx.array(a) for a in (rounded.weight, rounded.scales, rounded.biases))
    back = np.array(mx.dequantize(*packed, group_size, bits))
    slack = 1e-12 * float((np.square(w) @ h).sum())
    assert float((np.square(back - w) @ h).sum()) <= rounded.error * 1.001 + slack
    assert rounded.error <= rounded.plain
    weight, *both = mx.quantize(mx.array(w), group_size, bits)
    both = (a.astype(stored).astype(mx.float32) for a in both)
    mlx = np.array(mx.dequantize(weight, *both, group_size, bits))
    # MLX chooses codes before it rounds the scale; the search uses the scale that is stored.
    assert rounded.error <= float((np.square(mlx - w) @ h).sum()) * 1.001 + slack


def test_search_weighs_the_error_of_each_column():
    random = np.random.default_rng(0)
    w = random.standard_normal((64, 256)).astype(np.float32)
    h = np.exp(2 * random.standard_normal(256)).astype(np.float32)
    h /= h.mean()
    weighed = rounding.round_weights(w, h, 2, 64, "BF16")
    flat = rounding.round_weights(w, np.ones_like(h), 2, 64, "BF16")
    packed = (mx.array(a) for a in (flat.weight, flat.scales, flat.biases))
    error = float((np.square(np.array(mx.dequantize(*packed, 64, 2)) - w) @ h).sum())
    assert weighed.error < 0.8 * error
    assert weighed.error < 0.5 * weighed.plain


class InputSums:
    """Replaces the experts of a layer of a stock model, and sums the squares of their inputs."""

    def __init__(self, switch):
        self.switch = switch
        self.hidden, self.down = 0, {}

    def __call__(self, x, indices):
        flat, chosen = np.array(x).reshape(-1, x.shape[-1]), np.array(indices)
        chosen = chosen.reshape(len(flat), -1)
        self.hidden = self.hidden + np.square(flat).sum(axis=0)
        gate, up = (self._weights(name) for name in ("gate_proj", "up_proj"))
        for e in np.unique(chosen):
            rows = flat[(chosen == e).any(axis=1)]
            g = rows @ gate[e].T
            h = g / (1 + np.exp(-g)) * (rows @ up[e].T)
            self.down[int(e)] = (np.square(h).sum(axis=0), len(h))
        return self.switch(x, indices)

    def _weights(self, name):
        m = self.switch[name]
        return np.array(mx.dequantize(m.weight, m.scales, m.biases, m.group_size, m.bits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ops", ["cpu", "reference"])
def test_calibration_sums_equal_those_of_the_stock_model(tmp_path, monkeypatch, family, ops):
    """Compare with the stock model, whose expert inputs are computed with numpy."""
    monkeypatch.setenv("FLASHMOE_OPS", ops)
    path = write_chat_toy(tmp_path / "toy", family=family)
    text = tmp_path / "text"
    text.write_text(TEXT * 3)
    checkpoint = Checkpoint.open(path)
    calibration = calibrate(checkpoint, text, tokens=40)
    stock, _ = mlx_lm.utils.load_model(path)
    stock.set_dtype(mx.float32)
    seen = {}
    for i in checkpoint.expert_layers:
        seen[i] = stock.layers[i].mlp.switch_mlp = InputSums(stock.layers[i].mlp.switch_mlp)
    mx.eval(stock(mx.array([read_tokenizer(checkpoint).encode(TEXT * 3)[:40]])))
    for i, sums in calibration.layers.items():
        assert sums.tokens == 40
        np.testing.assert_allclose(sums.hidden, seen[i].hidden, rtol=1e-3, atol=1e-4)
        assert set(np.flatnonzero(sums.counts)) == set(seen[i].down)
        for e, (total, count) in seen[i].down.items():
            assert sums.counts[e] == count
            np.testing.assert_allclose(sums.down[e], total, rtol=1e-3, atol=1e-4)
            assert calibration(i, "down", e).mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_calibration_counts_the_tokens_of_experts_of_other_model_types(tmp_path, name):
    """The experts of nemotron_h have two matrices, and inputs smaller than the hidden size."""
    path = write_moe(tmp_path / "toy", name, vocab_size=8192)
    copy_tokenizer(path)
    text = tmp_path / "text"
    text.write_text(TEXT * 3)
    checkpoint = Checkpoint.open(path)
    for sums in calibrate(checkpoint, text, tokens=40).layers.values():
        assert (sums.tokens, sums.counts.sum()) == (40, 40 * checkpoint.top_k)
        assert (sums.hidden > 0).all()


def answer(path: Path) -> str:
    with Engine(path, slots=64) as engine:
        messages = [{"role": "user", "content": "What is a good breakfast?"}]
        events = engine.stream(Request(messages, temperature=0.0, max_tokens=12))
        return "".join(e.text for e in events if isinstance(e, Text))


def test_demo_answers_at_two_bits(tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT * 8)
    demo = Checkpoint.open(find(DEMO))
    report = run_json(DEMO, out, "--gate-up", 2, "--down", 4, "--calibrate", text)
    errors = report["errors"]["gate_up"]
    assert errors["error"] < 0.8 * errors["plain"]
    assert report["calibration"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert report["sizes"]["all"]["after"] < 0.8 * report["sizes"]["all"]["before"]
    note = json.loads((out / quantize.NOTE).read_text())
    assert note == {k: v for k, v in report.items() if k not in ("path", "sizes")}
    after = Checkpoint.open(out)
    assert after.expert_bits == pytest.approx(8 / 3)
    assert after.expert_nbytes == sum(report["sizes"][p]["after"] for p in ("gate and up", "down"))
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) > after.expert_nbytes
    assert not (out / quantize.WORK).exists()
    before = {f.name for f in demo.path.iterdir()}
    assert {f.name for f in out.iterdir()} == before | {quantize.NOTE}
    assert len(answer(out).split()) > 5


def test_dry_run_gives_the_sizes_of_the_files(tmp_path):
    path = write_toy(tmp_path / "toy", bits=None)
    foreseen = run_json(path, tmp_path / "out", "--bits", 2, "--dry-run")
    assert not (tmp_path / "out").exists()
    run(path, tmp_path / "out", "--bits", 2)
    written = sum(t.nbytes for t in Checkpoint.open(tmp_path / "out").tensors.values())
    assert foreseen["all"]["after"] == written
    assert foreseen["gate and up"]["after"] < 0.2 * foreseen["gate and up"]["before"]


KILLED = """
import os, signal, sys
from flashmoe import cli
from flashmoe.checkpoint.safetensors_writer import ShardWriter
from flashmoe.quantize import writer as quantize
owner = {"write": ShardWriter, "publish": ShardWriter, "_finish": quantize.Quantizer}[sys.argv[1]]
method, left = getattr(owner, sys.argv[1]), int(sys.argv[2])
def killed(*args):
    global left
    left -= 1
    result = method(*args) if left or sys.argv[1] != "_finish" else None
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, sys.argv[1], killed)
cli.cli(["quantize", *sys.argv[3:]])
"""


@pytest.mark.parametrize(
    "where", [("write", 100), ("publish", 2), ("_finish", 1)], ids=["shard", "note", "config"]
)
def test_killed_run_resumes_and_writes_the_same_files(tmp_path, where):
    path = write_toy(tmp_path / "toy", bits=None)
    options = ("--gate-up", "2", "--down", "3", "--shard-size", "100kB")
    run(path, tmp_path / "whole", *options)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *map(str, where), str(path), str(out), *options]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert not (out / "config.json").exists()
    run(out, tmp_path / "other", code=1)
    kept = {f: f.stat().st_mtime_ns for f in out.glob("model*.safetensors")}
    noted = {f.name.removesuffix(".json") for f in (out / quantize.WORK).glob("model*")}
    assert kept
    assert noted
    if where[0] == "_finish":  # a finished shard that does not hold what was written
        first, *_ = kept
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
        kept.pop(first)
    assert "other options" in run(path, out, "--bits", 2, code=1)
    run(path, out, *options)
    assert digests(out) == digests(tmp_path / "whole")
    for file, when in kept.items():
        assert (file.stat().st_mtime_ns == when) == (file.name in noted)


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_toy(tmp_path / "toy", bits=None)


def test_source_is_not_overwritten(toy):
    assert "the source itself" in run(toy, toy, code=1)


def test_directory_with_files_is_refused(toy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in run(toy, tmp_path / "out", code=1)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]
    assert "not a directory" in run(toy, tmp_path / "out" / "mine", code=1)


def test_disk_without_enough_space_is_refused(toy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1.0 MB free" in run(toy, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_run_can_be_repeated_after_the_disk_was_full(toy, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        said = run(toy, tmp_path / "out", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in said
    assert "run the same command again" in said
    run(toy, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("fault", ["scales", "cut"])
def test_corrupt_source_is_refused(tmp_path, fault):
    path = write_toy(tmp_path / "toy", bits=8, dtype="float32")
    layer = Checkpoint.open(path).expert_layers[2]
    part = next(p for p in layer.parts if (p.projection, p.part) == ("up_proj", "scales"))
    with open(part.file, "r+b") as f:
        if fault == "cut":
            f.truncate(part.start)
        else:
            f.seek(part.range(3)[0])
            f.write(np.float32(np.nan).tobytes())
    said = run(path, tmp_path / "out", code=1)
    if fault == "scales":
        assert f"{layer.prefix}.up_proj" in said
        assert "expert 3 has weights that are not finite" in said
    assert not list(tmp_path.glob("out/model*.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bits", 7), "2, 3, 4, 5, 6, 8"),
        (("--bits", 4, "--down", 4), "not both"),
        (("--group-size", 16), "32, 64, 128"),
        (("--group-size", 64), "divides 96"),
        (("--calibrate", "/nowhere"), "cannot read /nowhere"),
    ],
)
def test_invalid_option_is_refused(toy, tmp_path, options, said):
    assert said in run(toy, tmp_path / "out", *options, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "scaled"), [(m, False) for m in FLOAT_MODES] + [("nvfp4", True)])
def test_source_of_small_floats_is_rounded_to_affine_weights(tmp_path, mode, scaled):
    form = FLOAT_MODES[mode]
    path = write_toy(tmp_path / "toy", bits=form.bits, group_size=form.group_size, mode=mode)
    name = "language_model.model.layers.0.mlp.switch_mlp.up_proj"
    scale = mx.linspace(1000, 3000, 7) if scaled else None
    if scale is not None:
        edit_weights(path, lambda w: w.update({f"{name}.global_scale": scale}))
    run(path, tmp_path / "out", "--bits", 3)
    old, new = (mx.load(str(p / "model.safetensors")) for p in (path, tmp_path / "out"))
    how = {"group_size": form.group_size, "bits": form.bits, "mode": mode, "dtype": mx.float32}
    values = mx.dequantize(old[f"{name}.weight"], old[f"{name}.scales"], **how)
    if scale is not None:
        values = values * (scale / 2688)[:, None, None]
    parts = [new[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    rounded = mx.dequantize(*parts, group_size=64, bits=3)
    assert parts[1].dtype == mx.bfloat16
    error = mx.abs(rounded.astype(mx.float32) - values).mean(axis=(1, 2))
    assert (error < 0.25 * mx.abs(values).mean(axis=(1, 2))).all()  # of each expert
    layer = Checkpoint.open(tmp_path / "out").expert_layers[0]
    assert {q.mode for q in layer.quantization.values()} == {"affine"}


PEAK = """
import resource, sys
from flashmoe.cli import cli
cli(["quantize", *sys.argv[1:]], standalone_mode=False)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def peak(*args) -> int:
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_checkpoint(toy, tmp_path):
    """Layers of the shapes of a 397B model are 0.4 GB of zeros, which need memory like others."""
    large = tmp_path / "large"
    large.mkdir()
    tensors = list(synth.plan(4, 3, 1024, 4, 64))
    with open(large / "model.safetensors", "wb") as f:
        f.write(encode_header(tensors))
        size = f.tell() + sum(t.nbytes for t in tensors)
        f.truncate(size)
    (large / "config.json").write_text(json.dumps(synth.config(4, 3, 1024, 4, 64, 2)))
    base = peak(toy, tmp_path / "small")
    more = peak(large, tmp_path / "out") - base
    assert more < 120e6 < size / 3, (base, more, size)
