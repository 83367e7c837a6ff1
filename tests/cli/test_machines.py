"""A machine as it is found: each command works, or says in one line what is wrong."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress

import pytest
from other_user import BIN, UID, as_other_user

from flashmoe.catalog import DEMO, find

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

ANSWER = f"{BIN}/flashmoe run {DEMO} hello --max-tokens 3"
LLM = f"{BIN}/llm -m {DEMO} hello -o max_tokens 3"
INFO = f"{BIN}/flashmoe info {DEMO}"
LIST = f"{BIN}/flashmoe list"
PLAN = f"{BIN}/flashmoe plan {DEMO}"
DOCTOR = f"{BIN}/flashmoe doctor"
MODELS = f"{BIN}/llm models"


@pytest.fixture
def env(tmp_path) -> dict:
    names = ("FLASHMOE_CONFIG", "FLASHMOE_CACHE", "LLM_USER_PATH", "HF_HOME")
    return os.environ | {name: str(tmp_path / name) for name in names}


def shell(command: str, env: dict, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, text=True, timeout=600, **kwargs
    )
    assert "Traceback" not in done.stderr
    return done


def assert_works(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", [ANSWER, LLM, PLAN])
def test_missing_temporary_directory_is_replaced(env, command):
    assert_works(shell(command, env | {"TMPDIR": "/nonexistent"}))


@pytest.fixture
def full(tmp_path):
    """A directory on a disk without space."""
    directory = tmp_path / "full"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("only root can mount a small file system")
    with suppress(OSError):
        (directory / "fill").write_bytes(bytes(10**6))
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("command", [ANSWER, LLM, PLAN])
def test_full_temporary_directory_is_replaced(env, full, command):
    assert_works(shell(command, env | {"TMPDIR": str(full)}))


def test_full_directory_of_kernels_is_replaced(env, full):
    done = shell(ANSWER, env | {"NUMBA_CACHE_DIR": str(full)})
    assert_works(done)
    assert "0 B free, and 33.6 MB are needed" in done.stderr


def test_full_caches_and_settings(env, full):
    env |= {"FLASHMOE_CACHE": f"{full}/cache", "FLASHMOE_CONFIG": f"{full}/config"}
    done = shell(ANSWER, env)
    assert_works(done)
    assert_one_line(shell(f"{BIN}/flashmoe register {find(DEMO)} --name x", env), "No space left")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_change_nothing(env, closed):
    assert_works(shell(f"{ANSWER} {closed}", env))


@pytest.mark.parametrize("command", [LLM, INFO, LIST, PLAN, DOCTOR, MODELS])
def test_all_streams_may_be_closed(env, command):
    assert_works(shell(f"{command} <&- >&- 2>&-", env))


@pytest.mark.parametrize("command", [ANSWER, INFO, LIST, PLAN, DOCTOR])
def test_output_that_cannot_be_written_is_said(env, command):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is a device of Linux")
    assert_one_line(shell(f"{command} >/dev/full", env), "the output or a temporary file cannot be")


@pytest.mark.parametrize("command", [ANSWER, LLM, PLAN])
def test_working_directory_that_is_gone_is_said(tmp_path, env, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f"cd {gone}; rmdir {gone}; {command}", env)
    assert_one_line(done, "the working directory is not there any more")


@pytest.mark.parametrize("command", [INFO, LIST, MODELS])
def test_working_directory_that_is_gone_is_not_needed(tmp_path, env, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    assert_works(shell(f"cd {gone}; rmdir {gone}; {command}", env))


@pytest.mark.parametrize("command", [ANSWER, LLM, MODELS, INFO])
def test_few_open_files_suffice(env, command):
    assert_works(shell(f"ulimit -n 64; {command}", env))


@pytest.mark.parametrize("command", [ANSWER, LLM, PLAN])
def test_numba_that_may_not_compile_is_said(env, command):
    done = shell(command, env | {"NUMBA_DISABLE_JIT": "1"})
    assert_one_line(done, "NUMBA_DISABLE_JIT is set")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such paths")
@pytest.mark.parametrize("command", ["run {} hello", "info {}", "plan {}", "doctor {}"])
def test_path_that_is_not_utf8_is_said(tmp_path, env, command):
    path = os.fsencode(tmp_path) + b"/\xff"
    shutil.copytree(os.fsencode(find(DEMO)), path)
    words = [os.fsencode(word.format("@")) for word in command.split()]
    words = [path if word == b"@" else word for word in words]
    done = subprocess.run([f"{BIN}/flashmoe", *words], env=env, capture_output=True, timeout=600)
    assert done.returncode == 1
    assert b"is not UTF-8" in done.stderr + done.stdout
    assert b"Traceback" not in done.stderr


@pytest.fixture
def elsewhere():
    """The environment of another user without a home directory, but with a place for llm's logs."""
    left_out = ("HOME", "FLASHMOE_CONFIG", "FLASHMOE_CACHE", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    directory = tempfile.mkdtemp(dir="/tmp")
    if os.geteuid() == 0:
        os.chown(directory, UID, UID)
    yield kept | {"LLM_USER_PATH": directory}
    shutil.rmtree(directory)
    shutil.rmtree(f"/tmp/flashmoe-{UID}", ignore_errors=True)


@pytest.mark.parametrize("command", [ANSWER, LLM, INFO, LIST, MODELS])
def test_user_without_a_name_and_a_home_directory(elsewhere, command):
    done = as_other_user(command.split(), elsewhere, cwd="/tmp")
    assert_works(done)
    answers = command in (ANSWER, LLM)
    assert len(done.stderr.splitlines()) == 2 * answers, "where kernels are, and conversations"


def test_commands_that_need_a_home_directory_say_so(elsewhere):
    register = [BIN / "flashmoe", "register", find(DEMO), "--name", "x"]
    assert_one_line(as_other_user(register, elsewhere, cwd="/tmp"), "set HOME, or FLASHMOE_CONFIG")
    show = [BIN / "flashmoe", "cache", "show"]
    assert_one_line(as_other_user(show, elsewhere, cwd="/tmp"), "set HOME, or FLASHMOE_CACHE")


def test_package_and_home_directory_that_cannot_be_written(tmp_path, elsewhere):
    """The containers of many clusters are like this; kernels go to the temporary files."""
    done = as_other_user(ANSWER.split(), elsewhere | {"HOME": "/usr"}, cwd="/tmp")
    assert_works(done)
    assert f"compiled kernels are kept in /tmp/flashmoe-{UID}" in done.stderr


@pytest.mark.parametrize("limit", [5, 14])
@pytest.mark.parametrize("command", [ANSWER, LLM])
def test_few_processes_are_said(elsewhere, command, limit):
    limited = ["bash", "-c", f"ulimit -u {limit}; exec {command}"]
    assert_one_line(as_other_user(limited, elsewhere, cwd="/tmp"), "raise the limit on processes")
