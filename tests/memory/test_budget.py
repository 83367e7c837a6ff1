"""Sizes, what the machine has, and the split of a budget; limits come from real cgroups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import BudgetError, SettingError
from flashmoe.memory import system as memory
from flashmoe.memory.system import available
from flashmoe.sizes import format_size, parse_size
from flashmoe.memory.budget import split_budget as plan

ENV = os.environ | {"PYTHONPATH": str(Path(memory.__file__).parents[2])}
GB = 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * GB),
        ("8 gb", 8 * GB),
        ("8G", 8 * GB),
        ("7.5GiB", 15 << 29),
        ("7.5gi", 15 << 29),
        ("800MB", 800_000_000),
        ("0.5TB", 500 * GB),
        (".5 TiB", 1 << 39),
        ("12kB", 12_000),
        ("123456789", 123_456_789),
        ("64B", 64),
        (" 2.01GB ", 2_010_000_000),  # 1 byte less in floating point
        (17, 17),
    ],
)
def test_size_is_misread(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "-3GB", "nan", "inf", "1e9", "8 GBs", "8,5GB", "1.2.3GB", "8i", "٨GB", "0"]
    + ["0.0GB", 0, -5, True, 2.5, None],
)
def test_a_bad_size_passes(text):
    with pytest.raises(SettingError, match=r'is not a memory size: write it as "8GB"') as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (7_077_888, "7.1 MB"),
        (999_960_000, "1.0 GB"),
        (999_940_000, "999.9 MB"),
        (208_999_999_999, "209.0 GB"),
        (1_500 * GB, "1.5 TB"),
    ],
)
def test_size_is_miswritten(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(1000, 10**15))
def test_written_size_reads_back_as_another(nbytes):
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.051)


@linux
def test_available_is_not_what_the_kernel_says():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available() <= total
    # Free memory is a part of the available memory, unless a cgroup allows less.
    rooms = memory._left_in_cgroups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    assert available() == pytest.approx(min([available(), *rooms]), rel=0.05)
    assert available() >= min([0.8 * free, *(0.8 * room for room in rooms)])


@linux
def test_resident_or_peak_misses_what_the_process_holds():
    code = """
from flashmoe.memory.system import peak, resident
before = resident()
held = b"x" * (100 << 20)
during = resident()
del held
print(before, during, resident(), peak())
"""
    ballast = bytearray(b"x") * (200 << 20)  # a child must not report its parent's memory
    out = subprocess.run(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    del ballast
    before, during, after, most = map(int, out.split())
    assert during - before == pytest.approx(100 << 20, rel=0.1)
    assert after - before == pytest.approx(0, abs=10 << 20)
    assert during - (1 << 20) <= most <= during + (10 << 20)


def test_a_real_cgroup_limit_is_overlooked(own_cgroup):
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
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"memory.{name}").write_text(f"{text}\n")


def _stat(**fields):
    return "\n".join(f"{name} {value}" for name, value in fields.items())


def test_a_v2_limit_of_an_outer_group_is_overlooked(tmp_path):
    stat = _stat(anon=1, inactive_file=300, active_file=50)
    _group(tmp_path / "a/b", max="max", high="max", current=10, stat=stat)
    _group(tmp_path / "a", max=9000, high="5000", current=1000, stat=stat)
    assert list(memory._left_in_cgroups("0::/a/b\n", tmp_path)) == [5000 - 1000 + 300]
    assert list(memory._left_in_cgroups("0::/a\n", tmp_path)) == [5000 - 1000 + 300]
    assert list(memory._left_in_cgroups("0::/\n", tmp_path)) == []


def test_a_v1_limit_of_a_container_is_overlooked(tmp_path):
    # The path is the host's; inside, the container's own group is the mount itself.
    stat = _stat(inactive_file=1, total_inactive_file=40)
    _group(tmp_path / "memory", limit_in_bytes=700, usage_in_bytes=100, stat=stat)
    text = "5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/0a:1b\n0::/\n"
    assert list(memory._left_in_cgroups(text, tmp_path)) == [700 - 100 + 40]


def test_vm_stat_is_misread():
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


MODEL = {
    "base": 200_000_000,
    "dense": 1_200_000_000,
    "working": 800_000_000,
    "layer_slot_nbytes": [7_077_888] * 60,
    "num_experts": 512,
    "minimum": 12,
}


def test_plan_overspends_or_leaves_a_slot_unused():
    got = plan(budget=20 * GB, slots=None, **MODEL)
    one = 60 * 7_077_888
    assert got.slots_per_layer == (20 * GB - 2_200_000_000) // one == 41
    assert got.slots_nbytes == 41 * one
    assert got.total == 2_200_000_000 + 41 * one <= 20 * GB
    assert got.describe() == (
        "memory 19.6 GB of 20.0 GB: program 200.0 MB + dense weights 1.2 GB + working memory "
        "800.0 MB + 41 slots x 60 layers x 7.1 MB"
    )


def test_plan_gives_more_slots_than_experts():
    assert plan(budget=1000 * GB, slots=None, **MODEL).slots_per_layer == 512
    assert plan(budget=None, slots=1000, **MODEL).slots_per_layer == 512


def test_layers_of_several_sizes_are_counted_as_one():
    got = plan(budget=None, slots=20, **MODEL | {"layer_slot_nbytes": [10, 3, 5]})
    assert got.slots_nbytes == 20 * 18
    assert got.total == got.budget == 2_200_000_000 + 360


def test_slots_given_are_not_exact():
    assert plan(budget=None, slots=13, **MODEL).slots_per_layer == 13
    assert plan(budget=900 * GB, slots=13, **MODEL).slots_per_layer == 13


def test_a_small_budget_passes():
    with pytest.raises(BudgetError) as caught:
        plan(budget=2 * GB, slots=None, **MODEL)
    assert str(caught.value) == (
        "memory 2.0 GB is too small: this model needs at least 7.3 GB (program 200.0 MB + dense "
        "weights 1.2 GB + working memory 800.0 MB + 12 slots x 60 layers x 7.1 MB); pass "
        'memory="7.3GB" or more, or fewer experts with experts=K'
    )


@given(
    dense=st.integers(0, 10**11),
    layers=st.lists(st.integers(1, 10**8), min_size=1, max_size=5),
    minimum=st.integers(1, 40),
)
def test_the_advised_budget_is_too_small_itself(dense, layers, minimum):
    model = MODEL | {"dense": dense, "layer_slot_nbytes": layers, "minimum": minimum}
    with pytest.raises(BudgetError) as caught:
        plan(budget=1, slots=None, **model)
    advice = str(caught.value).split('memory="')[1].split('"')[0]
    assert plan(budget=parse_size(advice), slots=None, **model).slots_per_layer >= minimum


def test_too_few_slots_pass():
    with pytest.raises(BudgetError, match="11 slots per layer are too few.* at least 12; pass "):
        plan(budget=None, slots=11, **MODEL)


def test_slots_beyond_the_budget_pass():
    with pytest.raises(BudgetError, match=r'too small for 100 slots .*pass memory="44.7GB"'):
        plan(budget=20 * GB, slots=100, **MODEL)


def test_a_minimum_above_the_number_of_experts_refuses_all():
    small = MODEL | {"num_experts": 8}
    budget = 2_200_000_000 + 8 * 60 * 7_077_888
    assert plan(budget=budget, slots=None, **small).slots_per_layer == 8
    assert plan(budget=None, slots=8, **small).slots_per_layer == 8


def test_the_machine_is_given_no_reserve():
    held = 10**13  # far more than `available` can vary
    fits = MODEL | {"base": held, "dense": 0, "working": 0, "minimum": 0}
    free = available()
    budget = plan(budget=None, slots=None, **fits).budget
    assert budget - held == pytest.approx(max(0, free - max(GB, free // 10)), rel=0.05)


def test_a_model_beyond_the_machine_passes():
    with pytest.raises(BudgetError, match="the memory this machine can spare, .* is too small"):
        plan(budget=None, slots=None, **MODEL | {"dense": 10**15})
