"""Fixtures and settings of all tests, which use real files and processes but no network."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # With workers that each use all cores, which then wait for each other, a run takes three times
    # as long.
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
# A shell without job control starts background jobs with Ctrl-C ignored, and their children inherit
# that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# On an NVIDIA GPU MLX shortens the float32 factors of a product to TF32, unless this is set before
# mlx is imported.
os.environ["MLX_ENABLE_TF32"] = "0"
# transformers and huggingface_hub read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests and the processes that they start keep prompt caches and settings apart from the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="flashmoe-tests-")
os.environ["FLASHMOE_CACHE"] = _CACHE.name
os.environ["FLASHMOE_CONFIG"] = f"{_CACHE.name}/config"
os.environ["HF_HOME"] = f"{_CACHE.name}/hub"

# No test may fail because a machine is busy: examples have no deadline and may be slow to make.
hypothesis.settings.register_profile(
    "flashmoe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("flashmoe")


def pytest_report_header():
    names = ("mlx", "mlx-lm", "numba", "llm", "numpy", "transformers")
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)


def pytest_collection_modifyitems(items):
    """Mark the tests that use the fixture `on_device`, so that `-m on_device` selects them.

    They are the tests whose outcome depends on the machine's GPU.
    """
    for item in items:
        if "on_device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")


@pytest.fixture
def own_directories(tmp_path, monkeypatch):
    """Keep settings, prompt caches and the hub's cache of one test in its own directory."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def run_llm(tmp_path, monkeypatch):
    """A function that runs `llm` in its own directories and returns the finished process."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))

    def run(*args, **kwargs) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).parent / "llm"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)

    return run


@pytest.fixture(scope="module")
def engine():
    """An engine of the demo model with a slot for each of its 64 experts."""
    from flashmoe.catalog import DEMO, find
    from flashmoe.engine import Engine

    with Engine(find(DEMO), slots=64) as engine:
        yield engine


@pytest.fixture
def own_cgroup():
    """The directory of a new memory cgroup (version 1) inside the group of this process.

    It lies inside, so that the limits of the outer groups still hold.
    """
    text = Path("/proc/self/cgroup").read_text() if sys.platform == "linux" else ""
    paths = [line.split(":memory:")[1] for line in text.splitlines() if ":memory:" in line]
    path = paths[0] if paths else ""
    group = Path("/sys/fs/cgroup/memory" + path) / f"flashmoe-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as e:
        pytest.skip(f"no writable v1 memory cgroup here: {e}")
    yield group
    group.rmdir()


@pytest.fixture
def on_device():
    """How kernels are launched in this test: "metal", "cuda" or "stand-in".

    The stand-in runs them on the CPU, with the lanes in a shuffled order (see msl_cpu.py).
    """
    import mlx.core as mx
    import msl_build
    import msl_cpu

    from flashmoe_metal import kernel

    if kernel.available():
        yield "metal" if mx.metal.is_available() else "cuda"
    elif sys.platform != "linux" or msl_build.compiler() is None:
        pytest.skip("no GPU, and no C++ compiler for the stand-in")
    else:
        with kernel.launched_by(msl_cpu.launcher(seed=1)):
            yield "stand-in"


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The directory of four toy checkpoints that tests share and must not change."""
    from toys import write_toy

    root = tmp_path_factory.mktemp("toys")
    write_toy(root / "one", layers=4)
    write_toy(root / "three", layers=4, shards=3)
    write_toy(root / "plain", layers=4, bits=None)
    write_toy(root / "next", "qwen3_next", layers=4, dense_layer=True)
    return root


@pytest.fixture
def checkpoint_dir(originals, tmp_path):
    """A copy of a toy checkpoint in one safetensors file, which a test may damage."""
    return Path(shutil.copytree(originals / "one", tmp_path / "one"))


@pytest.fixture
def sharded_dir(originals, tmp_path):
    """A copy of the same checkpoint in three shards with an index, which a test may damage."""
    return Path(shutil.copytree(originals / "three", tmp_path / "three"))
