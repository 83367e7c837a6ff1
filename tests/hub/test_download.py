"""`flashmoe download` against a server that speaks the hub's protocol, and fails as it is told."""

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import COMMIT, TOKEN, Fault, Hub
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from toys import write_chat_toy

from flashmoe import catalog
from flashmoe.catalog import CATALOGUE
from flashmoe.cli import cli
from flashmoe.errors import CheckpointError
from flashmoe.hub import registry
from flashmoe.hub.known_models import parse_hub_name

BIN = Path(sys.executable).parent
NAME = "hub:owner/toy"
WEIGHTS = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = write_chat_toy(tmp_path_factory.mktemp("repo") / "toy", shards=2, top_k=6)
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "weights.safetensors"):
        (path / name).write_text("not for us")
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (path / name).write_text("{}")
    (path / "original").mkdir()
    (path / "original" / "model.safetensors").write_text("not for us")
    return path


@pytest.fixture
def hub(toy):
    with Hub(toy) as hub:
        yield hub


@pytest.fixture
def demo_hub():
    """The bundled model: 30 MB, of which http_get hands on 10 MiB at a time."""
    with Hub(catalog.find(catalog.DEMO)) as hub:
        yield hub


@pytest.fixture
def environ(tmp_path, monkeypatch):
    """Of commands, with directories of their own."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process(environ):
    """Run the real command in a process of its own; what it printed."""

    def run(hub, *args, code=0, program="flashmoe", **env) -> str:
        command = [str(BIN / program), *map(str, args)]
        env = os.environ | hub.environ | env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def flashmoe(environ, monkeypatch):
    """The same in this process, which is quicker. huggingface_hub has read the environment by now,
    so what it read is changed."""

    def run(hub, *args, code=0, **env) -> str:
        url = hub.environ["HF_ENDPOINT"]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        done = CliRunner(env=env).invoke(cli, [str(a) for a in args])
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.stdout if code == 0 else done.stderr

    return run


def registered() -> list[str]:
    return [m.name for m in catalog.models() if m.path and m.name != catalog.DEMO]


def refused(text: str, *words: str) -> None:
    """One line, with these words, and nothing is registered."""
    assert text.startswith("Error: ")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
    assert registered() == []


def fetched(hub) -> list[str]:
    return sorted(name for name, _ in hub.requests)


def cache(tmp_path) -> Path:
    return tmp_path / "hub" / "hub" / "models--owner--toy"


# The whole way.


def test_download_does_not_answer(process, hub, tmp_path):
    """Also: a token reaches the hub's storage, or code and pickles are fetched."""
    text = process(hub, "flashmoe", "download", NAME, program="llm", HF_TOKEN=TOKEN)
    assert re.search(r"toy at 0123456789ab: 1\.\d MB in 9 files; 1\.\d MB to download, ", text)
    assert " GB free in " in text
    snapshot = cache(tmp_path) / "snapshots" / COMMIT
    # Two of the same content are one in the cache.
    same = {"added_tokens.json", "special_tokens_map.json"}
    assert same | set(fetched(hub)) == {p.name for p in snapshot.iterdir()}
    assert len(same & set(fetched(hub))) == 1
    assert not {"modeling.py", "pytorch_model.bin", "README.md"} & set(fetched(hub))
    entry = json.loads((tmp_path / "config" / "models.json").read_text())["models"][NAME]
    assert entry["path"] == str(snapshot)
    assert (entry["repo"], entry["revision"]) == ("owner/toy", COMMIT)
    assert process(hub, "run", NAME, "Hello.", "--max-tokens", "2").strip()
    assert process(hub, "-m", NAME, "Hello.", "-o", "max_tokens", "2", program="llm").strip()
    # Nothing is fetched twice, and other programs find what is there.
    count = len(hub.requests)
    assert json.loads(process(hub, "download", NAME, "--json"))["fetched"] == 0
    assert len(hub.requests) == count
    found = scan_cache_dir(tmp_path / "hub" / "hub")
    assert not found.warnings
    (repo,) = found.repos
    assert (repo.repo_id, list(repo.refs)) == ("owner/toy", ["main"])
    path = hf_hub_download("owner/toy", WEIGHTS, cache_dir=tmp_path / "hub" / "hub")
    assert Path(path).read_bytes() == hub.content(WEIGHTS)


def test_name_of_the_catalogue_loses_its_k(flashmoe, hub):
    hub.repo = catalog.CATALOGUE["qwen3.5-397b-flash"].repo
    flashmoe(hub, "download", "qwen3.5-397b-flash")
    assert catalog.model("qwen3.5-397b-flash").experts == 4
    assert catalog.find("qwen3.5-397b") == catalog.find("qwen3.5-397b-flash")
    assert catalog.find(f"hub:{hub.repo}") == catalog.find(f"hub:{hub.repo}@{COMMIT[:12]}")
    assert catalog.model("qwen3.5-397b").experts is None


def test_directory_of_the_user_is_not_used(flashmoe, hub, tmp_path):
    to = tmp_path / "disk" / "toy"
    found = json.loads(flashmoe(hub, "download", NAME, "--to", to, "--json"))
    assert found["path"] == str(to)
    assert catalog.find(NAME) == to
    assert not cache(tmp_path).exists()
    assert sorted(p.name for p in to.iterdir()) == fetched(hub)
    count = len(hub.requests)
    # What is there by its name is verified too.
    (to / "config.json").write_bytes(b" " * (to / "config.json").stat().st_size)
    flashmoe(hub, "download", NAME, "--to", to)
    assert hub.requests[count:] == [("config.json", 0)]
    (to / "model-x.safetensors").write_text("of another")
    text = flashmoe(hub, "download", NAME, "--to", to, code=1)
    assert "model-x.safetensors does not belong to owner/toy" in text


def test_dry_run_fetches(flashmoe, hub):
    found = json.loads(flashmoe(hub, "download", NAME, "--dry-run", "--json"))
    assert found["fetched"] == found["bytes"] > 1_000_000
    assert found["free"] > 0
    assert hub.requests == []
    assert registered() == []


# Killed, cut, slow.


def test_kill_loses_what_was_there(process, demo_hub, tmp_path):
    weights = "model.safetensors"
    demo_hub.faults[weights] = Fault(hold=25_000_000, times=1)
    command = [str(BIN / "flashmoe"), "download", NAME]
    with subprocess.Popen(command, env=os.environ | demo_hub.environ) as killed:
        assert demo_hub.held.wait(30)
        part = None
        while part is None or part.stat().st_size < 20 << 20:
            time.sleep(0.02)
            part = next(cache(tmp_path).glob("blobs/*.flashmoe.incomplete"), None)
        # While it runs, a second one does not write to the same file.
        text = process(demo_hub, "download", NAME, code=1)
        assert "is being downloaded by another process" in text
        killed.send_signal(signal.SIGKILL)
    assert registered() == []
    assert not (cache(tmp_path) / "snapshots").exists()
    before = len(demo_hub.requests)
    found = json.loads(process(demo_hub, "download", NAME, "--json"))
    assert demo_hub.requests[before:] == [(weights, 20 << 20)]
    assert found["fetched"] == len(demo_hub.content(weights)) - (20 << 20)
    assert (catalog.find(NAME) / weights).read_bytes() == demo_hub.content(weights)


def test_interrupt_waits_for_the_server(demo_hub, environ):
    demo_hub.faults["model.safetensors"] = Fault(hold=25_000_000, times=1)
    command = [str(BIN / "flashmoe"), "download", NAME]
    env = os.environ | demo_hub.environ
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as killed:
        assert demo_hub.held.wait(30)
        killed.send_signal(signal.SIGINT)
        assert killed.wait(5) == 1  # the hub's own patience is 10 s
        assert killed.stderr.read().strip() == "Aborted!"


def test_cut_connection_is_the_end(flashmoe, demo_hub):
    weights = "model.safetensors"
    demo_hub.faults[weights] = Fault(stop=11_000_000, times=1)
    flashmoe(demo_hub, "download", NAME)
    assert [first for name, first in demo_hub.requests if name == weights] == [0, 10 << 20]


@pytest.fixture
def blob(hub, tmp_path) -> Path:
    """Where the cache has the weights."""
    blobs = cache(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    return blobs / hashlib.sha256(hub.content(WEIGHTS)).hexdigest()


def part_of(blob) -> Path:
    return blob.with_name(blob.name + ".flashmoe.incomplete")


def starts(hub) -> list[int]:
    return [first for name, first in hub.requests if name == WEIGHTS]


def test_server_without_ranges_spoils_the_file(flashmoe, hub, blob):
    part_of(blob).write_bytes(hub.content(WEIGHTS)[:1000])
    hub.faults[WEIGHTS] = Fault(no_ranges=True)
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [1000]
    assert blob.read_bytes() == hub.content(WEIGHTS)


@pytest.mark.parametrize(
    ("nbytes", "asked"), [(0, [0]), (1, [1]), (-1, [-1]), (None, []), (5, [5])]
)
def test_partial_file_is_fetched_again(flashmoe, hub, blob, nbytes, asked):
    content = hub.content(WEIGHTS)
    part_of(blob).write_bytes(content[:nbytes])
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [n % len(content) for n in asked]
    assert blob.read_bytes() == content
    assert not part_of(blob).exists()


def test_partial_file_that_is_too_long_is_kept(flashmoe, hub, blob):
    part_of(blob).write_bytes(hub.content(WEIGHTS) + b"more")
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_partial_file_of_other_bytes_is_kept(flashmoe, hub, blob):
    part_of(blob).write_bytes(b"x" * 1000)
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [1000, 0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_spoilt_file_of_the_cache_is_registered(flashmoe, hub, blob):
    blob.write_bytes(b"x" + hub.content(WEIGHTS)[1:])
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_slow_download_is_silent(hub, environ):
    hub.faults[WEIGHTS] = Fault(pause=0.12)
    ours, theirs = pty.openpty()
    command = [str(BIN / "flashmoe"), "download", NAME]
    env = os.environ | hub.environ | {"TERM": "xterm", "COLUMNS": "120"}
    shown = b""
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        try:
            while piece := os.read(ours, 10000):
                shown += piece
        except OSError:
            pass  # a terminal ends so
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\d\.\d/1\.\d MB", text)
    assert re.search(r"[kM]B/s", text)
    assert re.search(r"\d+:\d\d", text)
    assert "is verified and registered" in text


# Wrong, refused, missing.


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_hash_is_registered(flashmoe, hub, tmp_path, name):
    hub.faults[name] = Fault(corrupted=True)
    refused(flashmoe(hub, "download", NAME, code=1), name, "is not what the hub promises", ", not ")
    (entry,) = (s for s in hub.siblings() if s["rfilename"] == name)
    etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
    assert not list(cache(tmp_path).glob(f"blobs/{etag}*"))
    assert not (cache(tmp_path) / "snapshots").exists()
    if name == WEIGHTS:
        hub.faults.clear()
        hub.requests.clear()
        flashmoe(hub, "download", NAME)
        assert WEIGHTS in fetched(hub)


def test_file_that_is_too_short_is_registered(flashmoe, hub):
    hub.faults[WEIGHTS] = Fault(short=5)
    refused(flashmoe(hub, "download", NAME, code=1), WEIGHTS, "bytes", "run this again")


def test_file_that_is_too_long_is_registered(flashmoe, hub):
    hub.claimed[WEIGHTS] = 1000
    refused(flashmoe(hub, "download", NAME, code=1), WEIGHTS, "or more, not 1000")


def test_full_server_is_the_end(flashmoe, hub):
    wait = {"Retry-After": "0"}
    hub.faults["api"] = Fault(status=429, headers=wait, times=1)
    hub.faults[WEIGHTS] = Fault(status=429, headers=wait, times=1)
    hub.faults["config.json"] = Fault(status=503, headers=wait, times=1)
    flashmoe(hub, "download", NAME)
    assert registered() == [NAME]


def test_full_server_is_not_explained(flashmoe, hub):
    hub.faults["api"] = Fault(status=429, headers={"Retry-After": "3600"})
    refused(flashmoe(hub, "download", NAME, code=1), "(429)", "wait 3600 s")


def test_gated_repository_is_not_explained(flashmoe, hub):
    hub.needs_token = True
    text = flashmoe(hub, "download", NAME, code=1)
    refused(text, "owner/toy is gated", f"localhost:{hub.port}/owner/toy", "HF_TOKEN")
    flashmoe(hub, "download", NAME, HF_TOKEN=TOKEN)
    assert registered() == [NAME]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hub:owner/none"], ["no repository owner/none", "private", "HF_TOKEN"]),
        ([NAME, "--revision", "old"], ["owner/toy has no revision old"]),
    ],
)
def test_missing_repository_is_not_explained(flashmoe, hub, args, words):
    refused(flashmoe(hub, "download", *args, code=1), *words)


def test_offline_is_not_honoured(process, hub):
    refused(process(hub, "download", NAME, code=1, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


def test_server_that_is_away_is_not_explained(process, hub):
    text = process(hub, "download", NAME, code=1, HF_ENDPOINT="http://localhost:1")
    refused(text, "could not be fetched from http://localhost:1", "check the network")


def test_download_fills_the_disk(flashmoe, hub, tmp_path):
    hub.claimed[WEIGHTS] = 10**16
    text = flashmoe(hub, "download", NAME, code=1)
    refused(text, "does not fit", "10000.0 TB are missing", "must stay free", "--to DIR")
    assert hub.requests == []


def test_directory_that_cannot_be_is_a_traceback(flashmoe, hub, tmp_path):
    (tmp_path / "file").write_text("")
    text = flashmoe(hub, "download", NAME, "--to", tmp_path / "file" / "x", code=1)
    refused(text, str(tmp_path / "file"), "--to DIR")


def test_weights_of_an_unknown_family_are_fetched(flashmoe, hub, tmp_path):
    hub.directory = shutil.copytree(hub.directory, tmp_path / "other")
    (hub.directory / "config.json").write_text('{"model_type": "llama"}')
    refused(flashmoe(hub, "download", NAME, code=1), "owner/toy", "llama")
    assert WEIGHTS not in fetched(hub)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (catalog.DEMO, ["there is nothing to download", "hub:OWNER/NAME"]),
        ("owner/toy", ["is no model name", "hub:OWNER/NAME"]),
        ("hub:owner/../toy", ["is no model name"]),
        ("hub:owner/toy@../x", ["is no model name"]),
    ],
)
def test_name_that_cannot_be_reaches_the_hub(environ, name, words):
    done = CliRunner().invoke(cli, ["download", name])
    assert done.exit_code == 1
    refused(done.output, *words)


# The catalogue.


def test_catalogue_lacks_what_it_promises():
    for name, published in CATALOGUE.items():
        assert registry.is_valid_name(name)
        assert parse_hub_name(f"hub:{published.repo}") is not None
        assert published.nbytes > 10**9
        assert published.repo.endswith(f"-{published.bits}bit")
        assert published.licence == "apache-2.0"
        assert (published.experts is None) == (published.evidence is None)
        assert published.experts is None or published.experts < published.trained_k
        assert published.source
        assert published.verified is False  # nobody has compared them with the hub yet
    repos = [p.repo for p in CATALOGUE.values() if p.experts is None]
    assert len(set(repos)) == len(repos)


def test_model_of_the_hub_is_not_explained(environ):
    with pytest.raises(CheckpointError, match="To get it, run: flashmoe download hub:a/b@v1$"):
        catalog.find("hub:a/b@v1")
    done = CliRunner().invoke(cli, ["run", "hub:a/b", "hi"])
    refused(done.output, "hub:a/b is not on this disk", "flashmoe download hub:a/b")


def test_revision_is_taken_for_another(environ, toy):
    registry.add("x", toy, repo="a/b", revision=COMMIT)
    assert catalog.find("hub:a/b") == catalog.find(f"hub:a/b@{COMMIT[:8]}") == toy
    with pytest.raises(CheckpointError, match="is not on this disk"):
        catalog.find("hub:a/b@fedcba98")
