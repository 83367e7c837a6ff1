"""Code that another user of this machine has written, or that is old, is not loaded."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from other_user import BIN, UID, as_other_user

import flashmoe
from flashmoe.catalog import DEMO

ANSWER = (BIN / "flashmoe", "run", DEMO, "hello", "--max-tokens", "4", "--temperature", "0.7")

# What MLX compiles where nothing turns that off: the sampler of mlx-lm, as any script runs it.
STOCK = """
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
mx.eval(make_sampler(0.7, top_p=0.9, top_k=20)(mx.zeros((1, 64))))
"""

EVIL = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void planted() { fclose(fopen(getenv("MARK"), "w")); }
"""


def run(command, env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], env=env, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def shared(tmp_path_factory) -> Path:
    """A directory of temporary files for all users, like /tmp."""
    # Not `tmp_path`: the directories above it are private to this user.
    path = Path(os.path.realpath("/var/tmp")) / f"flashmoe-test-{os.getpid()}"
    path.mkdir()
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def env(shared) -> dict:
    home = shared / "home"
    home.mkdir()
    names = {"TMPDIR": shared, "MARK": shared / "mark", "HOME": home, "FLASHMOE_CACHE": home / "c"}
    left_out = ("MLX_DISABLE_COMPILE", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {name: str(value) for name, value in names.items()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with g++")
def test_planted_library_is_not_loaded(shared, env):
    assert run([sys.executable, "-c", STOCK], env).returncode == 0
    libraries = list((shared / "mlx").rglob("lib*.so"))
    assert libraries, "MLX compiles, so that this test shows something"
    (shared / "evil.cpp").write_text(EVIL)
    evil = shared / "evil.so"
    build = ["g++", "-shared", "-fPIC", shared / "evil.cpp", "-o", evil]
    assert run(build, env).returncode == 0
    for library in libraries:
        shutil.copy(evil, library)
        if os.geteuid() == 0:
            os.chown(library, UID, UID)
    mark = shared / "mark"
    run([sys.executable, "-c", STOCK], env)
    assert mark.exists(), "stock mlx-lm loads what was planted"
    mark.unlink()
    done = run(ANSWER, env)
    assert (done.returncode, mark.exists()) == (0, False), done.stderr
    load = "import mlx_lm, flashmoe; flashmoe.load(flashmoe.find('flashmoe-demo'))"
    done = run([sys.executable, "-c", load + STOCK], env)
    assert (done.returncode, mark.exists()) == (0, False), done.stderr


@pytest.mark.slow
def test_directory_of_the_first_user_does_not_block_the_second(shared, env):
    (shared / "mlx").mkdir(mode=0o755)
    os.chown(shared / "home", UID, UID)
    done = as_other_user(ANSWER, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


SHOW = "import flashmoe.ops.cpu; from numba.core import config; print(config.CACHE_DIR)"


def cache_directory(env: dict) -> tuple[str, str]:
    """Return where numba keeps kernels, and what was warned of."""
    done = run([sys.executable, "-c", SHOW], env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_kernels_are_kept_in_a_directory_of_the_users_choice(tmp_path, env):
    env["NUMBA_CACHE_DIR"] = str(tmp_path / "kernels")
    assert cache_directory(env) == (str(tmp_path / "kernels"), "")
    assert (tmp_path / "kernels").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("unsafe", ["writable", "above", "foreign", "foreign file", "file", "full"])
def test_kernels_are_not_kept_where_others_may_write(tmp_path, env, unsafe):
    asked = tmp_path / "above" / "kernels"
    asked.mkdir(parents=True)
    if unsafe == "writable":
        asked.chmod(0o777)
    elif unsafe == "above":
        asked.parent.chmod(0o777)
    elif unsafe == "file":
        asked.rmdir()
        asked.write_text("")
    elif unsafe == "full":
        asked = Path("/sys")
        if sys.platform != "linux":
            pytest.skip("/sys is a file system that cannot be written")
    elif os.geteuid() != 0:
        pytest.skip("only root can give files away")
    elif unsafe == "foreign":
        os.chown(asked, UID, UID)
    else:
        (asked / "x.nbi").write_text("")
        os.chown(asked / "x.nbi", UID, UID)
    env["NUMBA_CACHE_DIR"] = str(asked)
    used, warning = cache_directory(env)
    assert used == f"{env['HOME']}/.cache/flashmoe/kernels"
    assert f"compiled kernels are kept in {used} (NUMBA_CACHE_DIR={asked}: " in warning
    assert len(warning.splitlines()) == 1


class _Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


KERNEL = """
from numba import njit

@njit(cache=True)
def f(x):
    return x + 1
"""


def test_planted_kernel_is_not_loaded(shared, env, monkeypatch):
    """numba's index files are pickles, which run code when they are opened."""
    monkeypatch.setenv("MARK", env["MARK"])
    cache, mark = shared / "kernels", Path(env["MARK"])
    (shared / "kernel.py").write_text(KERNEL)
    env |= {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(shared)}
    alone = (sys.executable, "-c", "import kernel; kernel.f(1)")
    assert run(alone, env).returncode == 0
    for index in (indices := list(cache.rglob("*.nbi"))):
        index.write_bytes(pickle.dumps(_Evil()))
    assert indices
    run(alone, env)
    assert mark.exists(), "numba opens what was planted"
    mark.rmdir()
    cache.chmod(0o777)
    done = run((sys.executable, "-c", "import flashmoe.ops.cpu, kernel; kernel.f(1)"), env)
    assert (done.returncode, mark.exists()) == (0, False), done.stderr


def test_first_usable_directory_is_a_private_temporary_one(shared, env):
    """Neither the package nor the home directory can be written."""
    (shared / "home" / ".cache").write_text("")
    env["NUMBA_CACHE_DIR"] = "/dev/null"
    used, warning = cache_directory(env)
    assert used == str(shared / f"flashmoe-{os.geteuid()}")
    assert Path(used).stat().st_mode & 0o777 == 0o700
    assert len(warning.splitlines()) == 1
    assert cache_directory(env)[0] == used, "the next run finds the kernels there"


@pytest.mark.parametrize("taken", ["a file", "a directory of others", "a link"])
def test_temporary_directory_whose_name_is_taken_is_replaced(shared, env, taken):
    (shared / "home" / ".cache").write_text("")
    env["NUMBA_CACHE_DIR"] = "/dev/null"
    name = shared / f"flashmoe-{os.geteuid()}"
    if taken == "a file":
        name.write_text("")
    elif taken == "a link":
        name.symlink_to(shared / "home")
    else:
        name.mkdir()
        name.chmod(0o777)
    used, _ = cache_directory(env)
    assert used.startswith(f"{shared}/flashmoe-")
    assert used != str(name)
    assert not Path(used).exists(), "it is removed at the end"


def test_numba_that_may_not_compile_is_an_error_that_says_so(env):
    done = run(ANSWER, env | {"NUMBA_DISABLE_JIT": "1"})
    assert done.returncode == 1
    assert "NUMBA_DISABLE_JIT is set" in done.stderr
    assert len(done.stderr.splitlines()) == 1


HITS = """
from flashmoe.ops.cpu import gemm, int8, unpack
kernels = (
    unpack.block_kernel("dot", 4, 64, "float32"),
    int8.dot_kernel(4, 64, "float32", "plain"),
    gemm.product_kernel(16),
)
print(*(kernel.cache_hits for kernel in kernels))
"""


@pytest.mark.slow
def test_kernels_are_compiled_again_when_a_module_that_makes_their_code_changed(tmp_path, env):
    """llvm.py has no kernel of its own, and numba compares the modules of kernels alone."""
    copy, original = tmp_path / "flashmoe", Path(flashmoe.__file__).parent
    for directory, inner in ((copy, "ops"), (copy / "ops", "cpu")):
        directory.mkdir()
        for entry in (original / directory.relative_to(copy)).iterdir():
            if entry.name not in (inner, "__pycache__"):
                (directory / entry.name).symlink_to(entry)
    shutil.copytree(original / "ops/cpu", copy / "ops/cpu", ignore=lambda *_: ["__pycache__"])
    env |= {"PYTHONPATH": str(tmp_path)}

    def hits() -> str:
        done = run([sys.executable, "-c", HITS], env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [hits(), hits()] == ["0 0 0", "1 1 1"]
    with open(copy / "ops/cpu/llvm.py", "a") as file:
        file.write("# changed\n")
    assert hits() == "0 0 0"
    kernels = (copy / "ops/cpu/__pycache__").glob("*.nbc")
    assert len(list(kernels)) == 3, "new code takes the place of the old"
