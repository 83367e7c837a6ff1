"""Tests what is measured of the memory of the machine and the process, with real cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe.memory import system as memory
from flashmoe.memory.system import available

ENV = os.environ | {"PYTHONPATH": str(Path(memory.__file__).parents[2])}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_available_agrees_with_the_kernel():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available() <= total
    # The available memory contains the free memory, unless a cgroup allows less.
    limits = memory._left_in_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    assert available() == pytest.approx(min([available(), *limits]), rel=0.05)
    assert available() >= min([0.8 * free, *(0.8 * limit for limit in limits)])


@linux
def test_resident_and_peak_follow_what_the_process_holds():
    code = """
from flashmoe.memory.system import peak, resident
before = resident()
held = b"x" * (100 << 20)
during = resident()
del held
print(before, during, resident(), peak())
"""
    ballast = bytearray(b"x") * (200 << 20)  # a child must not report the memory of its parent
    out = subprocess.run(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    del ballast
    before, during, after, most = map(int, out.split())
    assert during - before == pytest.approx(100 << 20, rel=0.1)
    assert after - before == pytest.approx(0, abs=10 << 20)
    assert during - (1 << 20) <= most <= during + (10 << 20)


def test_cgroup_limit_of_the_process_bounds_available(own_cgroup):
    limit = 300 << 20
    (own_cgroup / "memory.limit_in_bytes").write_text(str(limit))
    code = "import sys; sys.stdin.readline(); from flashmoe.memory.system import available as a\n"
    code += "print(a()); held = b'x' * (100 << 20); print(a())"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    (own_cgroup / "cgroup.procs").write_text(str(child.pid))
    out, _ = child.communicate("go\n", timeout=60)
    first, second = map(int, out.split())
    assert limit - (60 << 20) < first <= limit
    assert first - second == pytest.approx(100 << 20, rel=0.1)


def _group(directory, **files):
    """Make the directory of a cgroup with files memory.NAME."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"memory.{name}").write_text(f"{text}\n")


def _stat(**fields):
    """Return the text of memory.stat."""
    return "\n".join(f"{name} {value}" for name, value in fields.items())


def test_v2_limit_of_an_outer_group_counts(tmp_path):
    stat = _stat(anon=1, inactive_file=300, active_file=50)
    _group(tmp_path / "a/b", max="max", high="max", current=10, stat=stat)
    _group(tmp_path / "a", max=9000, high="5000", current=1000, stat=stat)
    assert list(memory._left_in_cgroups("0::/a/b\n", tmp_path)) == [5000 - 1000 + 300]
    assert list(memory._left_in_cgroups("0::/a\n", tmp_path)) == [5000 - 1000 + 300]
    assert list(memory._left_in_cgroups("0::/\n", tmp_path)) == []


def test_v1_limit_of_a_container_counts(tmp_path):
    # The path in the text is the host's. Inside the container, the mount is its own group.
    stat = _stat(inactive_file=1, total_inactive_file=40)
    _group(tmp_path / "memory", limit_in_bytes=700, usage_in_bytes=100, stat=stat)
    text = "5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/0a:1b\n0::/\n"
    assert list(memory._left_in_cgroups(text, tmp_path)) == [700 - 100 + 40]


def test_vm_stat_counts_free_purgeable_and_file_backed_pages():
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              123456.
Pages active:                            789012.
Pages inactive:                          345678.
Pages speculative:                        12345.
Pages throttled:                              0.
Pages wired down:                        234567.
Pages purgeable:                          56789.
"Translation faults":                  98765432.
Pages copy-on-write:                     345678.
File-backed pages:                       456789.
Anonymous pages:                         678901.
Swapouts:                                    45.
"""
    assert memory._left_by_vm_stat(text) == 16384 * (123456 + 56789 + 456789)
