"""Test the computed layouts of published checkpoints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe.catalog import CATALOGUE
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.safetensors_writer import SHARD_NBYTES
from flashmoe.hub.known_models import Published
from flashmoe.hub.layouts import (
    compare,
    compute_layout,
    open_computed_checkpoint,
    write_hollow,
)
from flashmoe.sizes import format_size

#: The bytes that others published: those of the model cards, and the rounded ones of tables.
PUBLISHED = {
    "qwen3.5-397b": 223860768352,
    "qwen3.5-397b-6bit": 322946674272,
    "qwen3.5-397b-8bit": 422032580192,
    "qwen3.5-122b": 69593314272,
    "qwen3.5-122b-8bit": 130648036320,
    "qwen3.5-35b": 20391405152,
    "qwen3.5-35b-8bit": 37721130592,
    "qwen3.6-35b": 20401929952,
    "qwen3.6-35b-8bit": 37721128672,
}
ROUNDED = {
    "qwen3-next-80b": "44.8 GB",
    "qwen3-coder-next-5bit": "54.8 GB",
    "qwen3-30b": "17.2 GB",
    "qwen3-30b-8bit": "32.4 GB",
    "qwen3-coder-480b": "270.1 GB",
}


def test_computed_bytes_equal_the_published_ones():
    for name, nbytes in PUBLISHED.items():
        assert compute_layout(CATALOGUE[name]).nbytes == nbytes, name
    for name, size in ROUNDED.items():
        assert format_size(compute_layout(CATALOGUE[name]).nbytes) == size, name


def test_catalogue_has_the_bytes_of_its_layouts():
    for name, published in CATALOGUE.items():
        assert compute_layout(published).nbytes == published.nbytes, name
        model = name.removesuffix("-flash")
        assert published.verified == ("layout" if model in PUBLISHED else "no"), name


def test_other_repositories_and_revisions_have_no_computed_layout():
    assert compute_layout(Published("owner/model", bits=4)) is None
    assert compute_layout(replace(CATALOGUE["qwen3-30b"], revision="v2")) is None


@pytest.mark.parametrize("name", ["qwen3.5-35b", "qwen3.6-35b", "qwen3-next-80b", "qwen3-30b"])
def test_computed_checkpoints_open(name):
    layout = compute_layout(CATALOGUE[name], layers=4)
    with open_computed_checkpoint(layout) as checkpoint:
        assert checkpoint.num_layers == len(checkpoint.expert_layers) == 4
        assert checkpoint.top_k == CATALOGUE[name].trained_k
        assert checkpoint.expert_bits == CATALOGUE[name].bits
        assert sum(t.nbytes for t in checkpoint.tensors.values()) == layout.nbytes
        assert compare(layout, checkpoint).startswith("the hub's headers are as computed: ")


def test_shards_are_split_as_mlx_lm_splits_them():
    layout = compute_layout(CATALOGUE["qwen3.5-397b"])
    # The published index of this checkpoint has as many.
    assert len(layout.shards) == 46
    assert all(sum(t.nbytes for t in shard) <= SHARD_NBYTES for shard in layout.shards.values())


def test_a_checkpoint_that_differs_from_its_layout_is_described(tmp_path):
    layout = compute_layout(CATALOGUE["qwen3.6-35b"], layers=4)
    write_hollow(layout, tmp_path)
    older = compute_layout(CATALOGUE["qwen3.5-35b"], layers=4)
    text = compare(older, Checkpoint.open(tmp_path))
    # Routers of 8 bits instead of 4, and another dtype of A_log in three of four layers.
    assert text.startswith("11 of ")
    assert "linear_attn.A_log: BF16 (32,), computed F32 (32,)" in text
    deeper = compute_layout(CATALOGUE["qwen3.6-35b"], layers=5)
    assert ": missing, computed BF16" in compare(deeper, Checkpoint.open(tmp_path))


def test_plan_computes_what_it_cannot_fetch(tmp_path):
    """Without a network, names of the catalogue are planned, and the plan says how."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "FLASHMOE_CONFIG": str(tmp_path)}
    flashmoe = str(Path(sys.executable).parent / "flashmoe")

    def plan(*args: str) -> subprocess.CompletedProcess:
        command = [flashmoe, "plan", *args, "--machine", "m3-max-48gb"]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    done = plan("qwen3.5-397b-flash", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["computed"] is True
    assert (report["k"], report["layers"], report["commit"]) == (4, 60, None)
    assert report["to_fetch"] == report["bytes"] > PUBLISHED["qwen3.5-397b"]
    assert "\nheaders\tCOMPUTED from the known layout" in plan("qwen3-30b").stdout
    refused = plan("hub:owner/model")
    assert refused.returncode == 1
    assert "HF_HUB_OFFLINE is set" in refused.stderr
