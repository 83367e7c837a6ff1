"""Test `flashmoe plan` of a model on the hub, of which it fetches the headers alone.

Each command is a process of its own, because huggingface_hub reads HF_ENDPOINT on import.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, TOKEN, Fault, Hub
from toys import write_toy

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint

NAME = "hub:owner/toy"
SHARD = "model-00002-of-00003.safetensors"
PLAN = [NAME, "--machine", "m3-max-48gb", "--json"]  # measures nothing


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_toy(
        tmp_path_factory.mktemp("repo") / "toy", shards=3, max_position_embeddings=8192
    )


@pytest.fixture
def hub(toy):
    with Hub(toy) as hub:
        yield hub


@pytest.fixture
def plan(tmp_path, monkeypatch):
    for name in ("FLASHMOE_CONFIG", "FLASHMOE_CACHE", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "TMPDIR").mkdir()
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def run(hub, *args, code=0, **env) -> str:
        command = [str(Path(sys.executable).parent / "flashmoe"), "plan", *map(str, args or PLAN)]
        env = os.environ | hub.environ | env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / "TMPDIR").iterdir())  # cleaned up
        return done.stdout if code == 0 else done.stderr

    return run


def copied(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "changed"))


def test_plan_from_headers_equals_that_of_the_files(plan, hub, toy):
    report = json.loads(plan(hub))
    local = Checkpoint.open(toy)
    assert report["bytes"] == sum(f.stat().st_size for f in toy.glob("*.safetensors"))
    assert report["to_fetch"] == sum(f.stat().st_size for f in toy.iterdir())
    assert report["free"] > 0
    assert (report["repo"], report["commit"]) == ("owner/toy", COMMIT)
    assert (report["experts"], report["trained_k"]) == (local.num_experts, local.top_k)
    assert report["memory"]["plan"]["dense"] == local.dense_nbytes
    slot = sum(x.expert_nbytes for x in local.expert_layers.values())
    assert report["memory"]["plan"]["slot_nbytes"] == slot


def test_weights_are_not_fetched(plan):
    with Hub(find(DEMO)) as hub:
        report = json.loads(plan(hub))
    assert report["bytes"] > 29e6
    assert hub.sent < 400_000
    assert {name for name, _ in hub.requests} == {
        "config.json",
        "model.safetensors.index.json",
        "model.safetensors",
    }


def test_long_header_is_fetched_in_two_ranges(plan, toy, tmp_path):
    long = copied(toy, tmp_path)
    content = (long / SHARD).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].ljust(100_000)
    (long / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    with Hub(long) as hub:
        assert json.loads(plan(hub))["runs"]
    assert [first for name, first in hub.requests if name == SHARD] == [0, 1 << 14]


def test_server_without_ranges_is_refused_at_once(plan):
    with Hub(find(DEMO)) as hub:
        hub.faults["model.safetensors"] = Fault(no_ranges=True, pause=0.02)
        text = plan(hub, code=1)
    assert "a plan needs a server with byte ranges" in text
    assert hub.sent < 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"config.json": Fault(corrupted=True)}, "differs from the hash"),
        ({SHARD: Fault(status=403)}, "refuses owner/toy (403)"),
        ({"api": Fault(status=429, headers={"Retry-After": "999"})}, "wait 999 s"),
    ],
)
def test_fault_is_explained(plan, hub, faults, says):
    hub.faults |= faults
    assert says in plan(hub, code=1)


def test_header_is_fetched_again_after_a_cut_connection(plan, hub):
    hub.faults[SHARD] = Fault(stop=500, times=1)
    assert json.loads(plan(hub))["runs"]


@pytest.mark.slow
def test_header_of_gigabytes_is_refused(plan, toy, tmp_path):
    bad = copied(toy, tmp_path)
    content = (bad / SHARD).read_bytes()
    (bad / SHARD).write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    with Hub(bad) as hub:
        assert "gives its header 1099511627776 bytes" in plan(hub, code=1)
        hub.claimed[SHARD] = 1 << 41  # the listing agrees with it
        assert "wants 1.1 TB of headers" in plan(hub, code=1)


def test_wrong_size_in_the_listing_is_refused(plan, hub):
    hub.claimed[SHARD] = 10**9
    assert "has 1000000000 bytes, but its last tensor ends at" in plan(hub, code=1)


def test_gated_repository_needs_a_token(plan, hub):
    hub.needs_token = True
    assert "is gated" in plan(hub, code=1)
    assert json.loads(plan(hub, HF_TOKEN=TOKEN))["runs"]


def test_offline_mode_is_respected(plan, hub):
    text = plan(hub, code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in text
    assert "not on this disk" in text
    assert hub.sent == 0
