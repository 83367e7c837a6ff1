"""What all tests share. Files and processes here are real; nothing reaches a network."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use all cores wait for each other: three times the time.
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
# Background jobs of a shell without job control ignore Ctrl-C, and hand that on to what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports mlx: on an NVIDIA GPU it shortens the float32 factors of a product.
os.environ["MLX_ENABLE_TF32"] = "0"
# Before anything imports transformers or huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Prompt states of tests, and of the processes they start, stay out of the user's own.
_CACHE = tempfile.TemporaryDirectory(prefix="flashmoe-tests-")
os.environ["FLASHMOE_CACHE"] = _CACHE.name
os.environ["FLASHMOE_CONFIG"] = f"{_CACHE.name}/config"
os.environ["HF_HOME"] = f"{_CACHE.name}/hub"


def pytest_report_header():
    names = ("mlx", "mlx-lm", "numba", "llm", "numpy", "transformers")
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)


def pytest_collection_modifyitems(items):
    """`-m on_device`: the tests that say something on another machine."""
    for item in items:
        if "on_device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")


@pytest.fixture
def run_llm(tmp_path, monkeypatch):
    """Run the real `llm` with directories of its own; the finished process."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))

    def run(*args, **kwargs) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).parent / "llm"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)

    return run


@pytest.fixture(scope="module")
def engine():
    """The demo model, with all of its experts in slots."""
    from flashmoe.catalog import DEMO, find
    from flashmoe.engine import Engine

    with Engine(find(DEMO), slots=64) as engine:
        yield engine


@pytest.fixture
def own_cgroup():
    """A new v1 memory group below that of this process, so that outer limits go on to hold."""
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
    """How the package's kernels are launched in this test: "metal", "cuda", or "stand-in", which
    runs them on the CPU with lanes in a shuffled order (see msl_cpu.py)."""
    import mlx.core as mx
    import msl_build
    import msl_cpu

    from flashmoe_metal import kernel

    if kernel.available():
        yield "metal" if mx.metal.is_available() else "cuda"
    elif sys.platform != "linux" or msl_build.compiler() is None:
        pytest.skip("no GPU, and no C++ compiler to do without")
    else:
        with kernel.launched_by(msl_cpu.launcher(seed=1)):
            yield "stand-in"


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Toy checkpoints, not to be changed."""
    from toys import write_toy

    root = tmp_path_factory.mktemp("toys")
    write_toy(root / "one", layers=4)
    write_toy(root / "three", layers=4, shards=3)
    write_toy(root / "plain", layers=4, bits=None)
    write_toy(root / "next", "qwen3_next", layers=4, dense_layer=True)
    return root


@pytest.fixture
def one(originals, tmp_path):
    """A whole checkpoint in one file, to damage."""
    return Path(shutil.copytree(originals / "one", tmp_path / "one"))


@pytest.fixture
def three(originals, tmp_path):
    """The same in three shards with an index."""
    return Path(shutil.copytree(originals / "three", tmp_path / "three"))
