"""Test `flashmoe download` against a local server of the hub's protocol with planned faults."""

import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import COMMIT, TOKEN, Fault, Hub
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from toys import write_chat_toy

from flashmoe import catalog
from flashmoe.cli import cli
from flashmoe.errors import DownloadError
from flashmoe.hub import api as hub_api

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
    """Serve the bundled model of 30 MB, of which http_get hands on 10 MiB at a time."""
    with Hub(catalog.find(catalog.DEMO)) as hub:
        yield hub


@pytest.fixture
def environ(tmp_path, monkeypatch):
    """Give commands directories of their own."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process(environ):
    """Run the real command in a process of its own, and return what it printed."""

    def run(hub, *args, code=0, program="flashmoe", **env) -> str:
        command = [str(BIN / program), *map(str, args)]
        env = os.environ | hub.environ | env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def flashmoe(environ, monkeypatch):
    """Run the command in this process, which is faster, and return what it printed.

    huggingface_hub has read the environment by now, so its constants are changed.
    """

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


def assert_refused(text: str, *words: str) -> None:
    """Assert that the text is a one-line error with these words, and that nothing is registered."""
    assert text.startswith("Error: ")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
    assert registered() == []


def fetched_files(hub) -> list[str]:
    return sorted(name for name, _ in hub.requests)


def cache(tmp_path) -> Path:
    return tmp_path / "hub" / "hub" / "models--owner--toy"


# Whole downloads.


@pytest.mark.slow
def test_downloaded_model_answers(process, hub, tmp_path):
    """The hub's storage gets no token, and code and pickles are not fetched."""
    text = process(hub, "flashmoe", "download", NAME, program="llm", HF_TOKEN=TOKEN)
    assert re.search(r"toy at 0123456789ab: 1\.\d MB in 9 files; 1\.\d MB to download, ", text)
    assert " GB free in " in text
    snapshot = cache(tmp_path) / "snapshots" / COMMIT
    # Two files with the same content are one file in the cache.
    same = {"added_tokens.json", "special_tokens_map.json"}
    assert same | set(fetched_files(hub)) == {p.name for p in snapshot.iterdir()}
    assert len(same & set(fetched_files(hub))) == 1
    assert not {"modeling.py", "pytorch_model.bin", "README.md"} & set(fetched_files(hub))
    entry = json.loads((tmp_path / "config" / "models.json").read_text())["models"][NAME]
    assert entry["path"] == str(snapshot)
    assert (entry["repo"], entry["revision"]) == ("owner/toy", COMMIT)
    assert process(hub, "run", NAME, "Hello.", "--max-tokens", "2").strip()
    assert process(hub, "-m", NAME, "Hello.", "-o", "max_tokens", "2", program="llm").strip()
    # Nothing is fetched twice, and other programs find the files in the cache.
    count = len(hub.requests)
    assert json.loads(process(hub, "download", NAME, "--json"))["fetched"] == 0
    assert len(hub.requests) == count
    scan = scan_cache_dir(tmp_path / "hub" / "hub")
    assert not scan.warnings
    (repo,) = scan.repos
    assert (repo.repo_id, list(repo.refs)) == ("owner/toy", ["main"])
    path = hf_hub_download("owner/toy", WEIGHTS, cache_dir=tmp_path / "hub" / "hub")
    assert Path(path).read_bytes() == hub.content(WEIGHTS)


def test_known_model_keeps_its_number_of_experts(flashmoe, hub):
    hub.repo = catalog.CATALOGUE["qwen3.5-397b-flash"].repo
    flashmoe(hub, "download", "qwen3.5-397b-flash")
    assert catalog.model("qwen3.5-397b-flash").experts == 4
    assert catalog.find("qwen3.5-397b") == catalog.find("qwen3.5-397b-flash")
    assert catalog.find(f"hub:{hub.repo}") == catalog.find(f"hub:{hub.repo}@{COMMIT[:12]}")
    assert catalog.model("qwen3.5-397b").experts is None


def test_download_to_a_directory_of_the_user(flashmoe, hub, tmp_path):
    to = tmp_path / "disk" / "toy"
    report = json.loads(flashmoe(hub, "download", NAME, "--to", to, "--json"))
    assert report["path"] == str(to)
    assert catalog.find(NAME) == to
    assert not cache(tmp_path).exists()
    assert sorted(p.name for p in to.iterdir()) == fetched_files(hub)
    count = len(hub.requests)
    # A file that is there already is verified too.
    (to / "config.json").write_bytes(b" " * (to / "config.json").stat().st_size)
    flashmoe(hub, "download", NAME, "--to", to)
    assert hub.requests[count:] == [("config.json", 0)]
    (to / "model-x.safetensors").write_text("of another")
    text = flashmoe(hub, "download", NAME, "--to", to, code=1)
    assert "model-x.safetensors does not belong to owner/toy" in text


def test_dry_run_fetches_nothing(flashmoe, hub):
    report = json.loads(flashmoe(hub, "download", NAME, "--dry-run", "--json"))
    assert report["fetched"] == report["bytes"] > 1_000_000
    assert report["free"] > 0
    assert hub.requests == []
    assert registered() == []


# Downloads that are interrupted.


def test_killed_download_is_resumed(process, demo_hub, tmp_path):
    weights = "model.safetensors"
    demo_hub.faults[weights] = Fault(hold=25_000_000, times=1)
    command = [str(BIN / "flashmoe"), "download", NAME]
    with subprocess.Popen(command, env=os.environ | demo_hub.environ) as killed:
        assert demo_hub.held.wait(120)
        end = time.monotonic() + 120
        part = None
        while part is None or part.stat().st_size < 20 << 20:
            assert time.monotonic() < end
            time.sleep(0.02)
            part = next(cache(tmp_path).glob("blobs/*.flashmoe.incomplete"), None)
        # While it runs, a second one does not write to the same file.
        text = process(demo_hub, "download", NAME, code=1)
        assert "is being downloaded by another process" in text
        killed.send_signal(signal.SIGKILL)
    assert registered() == []
    assert not (cache(tmp_path) / "snapshots").exists()
    before = len(demo_hub.requests)
    report = json.loads(process(demo_hub, "download", NAME, "--json"))
    assert demo_hub.requests[before:] == [(weights, 20 << 20)]
    assert report["fetched"] == len(demo_hub.content(weights)) - (20 << 20)
    assert (catalog.find(NAME) / weights).read_bytes() == demo_hub.content(weights)


def test_interrupt_does_not_wait_for_the_server(demo_hub, environ):
    demo_hub.faults["model.safetensors"] = Fault(hold=25_000_000, times=1)
    command = [str(BIN / "flashmoe"), "download", NAME]
    # huggingface_hub would wait for the server for much longer than the test waits for the end.
    env = os.environ | demo_hub.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as killed:
        assert demo_hub.held.wait(120)
        killed.send_signal(signal.SIGINT)
        assert killed.wait(120) == 1
        assert killed.stderr.read().strip() == "Aborted!"


def test_download_goes_on_after_a_cut_connection(flashmoe, demo_hub):
    weights = "model.safetensors"
    demo_hub.faults[weights] = Fault(stop=11_000_000, times=1)
    flashmoe(demo_hub, "download", NAME)
    assert [first for name, first in demo_hub.requests if name == weights] == [0, 10 << 20]


@pytest.fixture
def blob(hub, tmp_path) -> Path:
    """Return the path of the weights in the cache."""
    blobs = cache(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    return blobs / hashlib.sha256(hub.content(WEIGHTS)).hexdigest()


def part_of(blob) -> Path:
    return blob.with_name(blob.name + ".flashmoe.incomplete")


def starts(hub) -> list[int]:
    return [first for name, first in hub.requests if name == WEIGHTS]


def test_server_without_ranges_sends_the_whole_file(flashmoe, hub, blob):
    part_of(blob).write_bytes(hub.content(WEIGHTS)[:1000])
    hub.faults[WEIGHTS] = Fault(no_ranges=True)
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [1000]
    assert blob.read_bytes() == hub.content(WEIGHTS)


@pytest.mark.parametrize(
    ("nbytes", "asked"), [(0, [0]), (1, [1]), (-1, [-1]), (None, []), (5, [5])]
)
def test_partial_file_is_completed(flashmoe, hub, blob, nbytes, asked):
    content = hub.content(WEIGHTS)
    part_of(blob).write_bytes(content[:nbytes])
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [n % len(content) for n in asked]
    assert blob.read_bytes() == content
    assert not part_of(blob).exists()


def test_partial_file_that_is_too_long_is_fetched_anew(flashmoe, hub, blob):
    part_of(blob).write_bytes(hub.content(WEIGHTS) + b"more")
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_partial_file_of_other_bytes_is_fetched_anew(flashmoe, hub, blob):
    part_of(blob).write_bytes(b"x" * 1000)
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [1000, 0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_corrupted_file_of_the_cache_is_fetched_anew(flashmoe, hub, blob):
    blob.write_bytes(b"x" + hub.content(WEIGHTS)[1:])
    flashmoe(hub, "download", NAME)
    assert starts(hub) == [0]
    assert blob.read_bytes() == hub.content(WEIGHTS)


def test_progress_of_a_download_is_shown(hub, environ):
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
            pass  # this is how a terminal ends
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\d\.\d/1\.\d MB", text)
    assert re.search(r"[kM]B/s", text)
    assert re.search(r"\d+:\d\d", text)
    assert "is verified and registered" in text


# Downloads that fail.


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_hash_is_refused(flashmoe, hub, tmp_path, name):
    hub.faults[name] = Fault(corrupted=True)
    assert_refused(
        flashmoe(hub, "download", NAME, code=1), name, "is not what the hub promises", ", not "
    )
    (entry,) = (s for s in hub.siblings() if s["rfilename"] == name)
    etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
    assert not list(cache(tmp_path).glob(f"blobs/{etag}*"))
    assert not (cache(tmp_path) / "snapshots").exists()
    if name == WEIGHTS:
        hub.faults.clear()
        hub.requests.clear()
        flashmoe(hub, "download", NAME)
        assert WEIGHTS in fetched_files(hub)


def test_file_that_is_too_short_is_refused(flashmoe, hub):
    hub.faults[WEIGHTS] = Fault(short=5)
    assert_refused(flashmoe(hub, "download", NAME, code=1), WEIGHTS, "bytes", "run this again")


def test_file_that_is_too_long_is_refused(flashmoe, hub):
    hub.claimed[WEIGHTS] = 1000
    assert_refused(flashmoe(hub, "download", NAME, code=1), WEIGHTS, "or more, not 1000")


def test_busy_server_is_asked_again(flashmoe, hub):
    wait = {"Retry-After": "0"}
    hub.faults["api"] = Fault(status=429, headers=wait, times=1)
    hub.faults[WEIGHTS] = Fault(status=429, headers=wait, times=1)
    hub.faults["config.json"] = Fault(status=503, headers=wait, times=1)
    flashmoe(hub, "download", NAME)
    assert registered() == [NAME]


def test_server_that_stays_busy_is_an_error(flashmoe, hub):
    hub.faults["api"] = Fault(status=429, headers={"Retry-After": "3600"})
    assert_refused(flashmoe(hub, "download", NAME, code=1), "(429)", "wait 3600 s")


def test_gated_repository_needs_a_token(flashmoe, hub):
    hub.needs_token = True
    text = flashmoe(hub, "download", NAME, code=1)
    assert_refused(text, "owner/toy is gated", f"localhost:{hub.port}/owner/toy", "HF_TOKEN")
    flashmoe(hub, "download", NAME, HF_TOKEN=TOKEN)
    assert registered() == [NAME]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hub:owner/none"], ["no repository owner/none", "private", "HF_TOKEN"]),
        ([NAME, "--revision", "old"], ["owner/toy has no revision old"]),
    ],
)
def test_missing_repository_or_revision_is_explained(flashmoe, hub, args, words):
    assert_refused(flashmoe(hub, "download", *args, code=1), *words)


def test_offline_mode_is_respected(process, hub):
    assert_refused(
        process(hub, "download", NAME, code=1, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"
    )


def test_unreachable_server_is_explained(process, hub):
    text = process(hub, "download", NAME, code=1, HF_ENDPOINT="http://localhost:1")
    assert_refused(text, "could not be fetched from http://localhost:1", "check the network")


def test_download_that_does_not_fit_is_refused(flashmoe, hub, tmp_path):
    hub.claimed[WEIGHTS] = 10**16
    text = flashmoe(hub, "download", NAME, code=1)
    assert_refused(text, "does not fit", "10000.0 TB are missing", "must stay free", "--to DIR")
    assert hub.requests == []


def test_directory_that_cannot_be_created_is_refused(flashmoe, hub, tmp_path):
    (tmp_path / "file").write_text("")
    text = flashmoe(hub, "download", NAME, "--to", tmp_path / "file" / "x", code=1)
    assert_refused(text, str(tmp_path / "file"), "--to DIR")


def test_unknown_family_is_refused_before_its_weights(flashmoe, hub, tmp_path):
    hub.directory = shutil.copytree(hub.directory, tmp_path / "other")
    (hub.directory / "config.json").write_text('{"model_type": "llama"}')
    assert_refused(flashmoe(hub, "download", NAME, code=1), "owner/toy", "llama")
    assert WEIGHTS not in fetched_files(hub)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (catalog.DEMO, ["there is nothing to download", "hub:OWNER/NAME"]),
        ("owner/toy", ["is no model name", "hub:OWNER/NAME"]),
        ("hub:owner/../toy", ["is no model name"]),
        ("hub:owner/toy@../x", ["is no model name"]),
    ],
)
def test_invalid_name_is_refused_without_the_hub(environ, name, words):
    done = CliRunner().invoke(cli, ["download", name])
    assert done.exit_code == 1
    assert_refused(done.output, *words)


# Answers of the hub that are not what they should be.


def _set(path: str, value: object):
    """Return a function that sets a field of a listing; `path` is like "siblings.0.size"."""

    def change(listing: dict) -> dict:
        *parents, last = path.split(".")
        node = listing
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(last) if isinstance(node, list) else last] = value
        return listing

    return change


def _again(name: str):
    def change(listing: dict) -> dict:
        listing["siblings"] += [s for s in listing["siblings"] if s["rfilename"] == name]
        return listing

    return change


WRONG = {
    "size as text": _set("siblings.1.size", "1000"),
    "negative size": _set("siblings.1.size", -1),
    "size as a fraction": _set("siblings.1.size", 1.5),
    "size as a bool": _set("siblings.1.size", True),
    "huge size": _set("siblings.1.size", 10**30),
    "null size": _set("siblings.1.size", None),
    "hash as a number": _set("siblings.1.blobId", 12),
    "hash in capitals": _set("siblings.1.blobId", "A" * 40),
    "null siblings": _set("siblings", None),
    "siblings as text": _set("siblings", "abc"),
    "sibling as a number": _set("siblings.1", 3),
    "sibling without a name": _set("siblings.1", {"size": 3}),
    "name as a number": _set("siblings.1.rfilename", 3),
    "lfs as text": _set("siblings.1.lfs", "yes"),
    "lfs without a hash": _set("siblings.1.lfs", {"size": 1}),
    "lfs with a negative size": _set(
        "siblings.1.lfs", {"sha256": "a" * 64, "size": -1, "pointerSize": 1}
    ),
    "config.json twice": _again("config.json"),
    "commit as a number": _set("sha", 12),
    "commit as a path": _set("sha", "../../x"),
    "date as a number": _set("lastModified", 12),
    "a list": lambda listing: [listing],
    "null": lambda listing: None,
    "text": lambda listing: "x",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_listing_of_wrong_kinds_is_refused(flashmoe, hub, change):
    hub.listings = [json.dumps(change(hub.listing())).encode()]
    assert_refused(flashmoe(hub, "download", NAME, code=1))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff" * 99, b"[" * 10**6, b'{"sha": 1e999}'])
def test_listing_that_is_no_json_is_refused(flashmoe, hub, body):
    hub.listings = [body]
    assert_refused(flashmoe(hub, "download", NAME, code=1))


@pytest.mark.parametrize("wait", ["soon", "-1", "²", "9" * 10000])
def test_time_to_wait_may_be_anything(flashmoe, hub, wait):
    hub.faults["api"] = Fault(status=429, headers={"Retry-After": wait.encode().decode("latin1")})
    text = flashmoe(hub, "download", NAME, code=1)
    assert_refused(text, "refuses more requests for now")
    assert len(text) < 300


def test_random_listings_are_read_or_refused(flashmoe, hub):
    flashmoe(hub, "list")  # leads huggingface_hub to the server
    rng, outcomes = random.Random(7), Counter()
    values = [None, True, -1, 0, 2**70, 1.5, "", "x", "../x", [], [[]], {}, {"size": {}}]
    for _ in range(300):
        listing = hub.listing()
        for _ in range(rng.randint(1, 3)):
            node = listing
            while True:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(node[key], dict | list) and rng.random() < 0.8:
                    node = node[key]
                    continue
                if rng.random() < 0.2:
                    del node[key]
                else:
                    node[key] = rng.choice(values)
                break
        hub.listings = [json.dumps(listing).encode()]
        try:
            found = hub_api.fetch_listing(hub.repo)
        except DownloadError:
            outcomes["refused"] += 1
        else:
            assert all(re.fullmatch(r"[\w.+-]+", f.name) and f.nbytes >= 0 for f in found.files)
            outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 10


# What killed downloads left.


def test_partial_file_of_an_older_commit_is_removed(flashmoe, hub, tmp_path):
    blobs = cache(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    left = blobs / f"{'e' * 64}.flashmoe.incomplete"
    left.write_text("left by a killed download")
    flashmoe(hub, "download", NAME)
    assert not list(blobs.glob("*.incomplete"))
