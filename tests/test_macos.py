"""Tests what macOS is asked, with a stand-in of its library: no test runs on a Mac."""

import ctypes
import fcntl
import os
import plistlib
import subprocess
import sys
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import pytest
from toys import write_toy

from flashmoe import macos
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.memory import system
from flashmoe.models.loading import plan_memory
from flashmoe.ops import backend as backends
from flashmoe.options import LoadOptions
from flashmoe.streaming import drives, io_modes
from flashmoe.streaming.disk_bench import forget
from flashmoe.streaming.io_modes import BLOCK, Direct

#: `rusage_info_v4` of <sys/resource.h>: a UUID, then 64-bit numbers in this order.
FIELDS = """
    user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size
    phys_footprint proc_start_abstime proc_exit_abstime child_user_time child_system_time
    child_pkg_idle_wkups child_interrupt_wkups child_pageins child_elapsed_abstime
    diskio_bytesread diskio_byteswritten cpu_time_qos_default cpu_time_qos_maintenance
    cpu_time_qos_background cpu_time_qos_utility cpu_time_qos_legacy
    cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time
    serviced_system_time logical_writes lifetime_max_phys_footprint instructions cycles
    billed_energy serviced_energy interval_max_phys_footprint runnable_time
""".split()  # noqa: SIM905


@pytest.fixture
def library(monkeypatch):
    """A stand-in of libSystem, which says what is put into it."""
    told = SimpleNamespace(usage={}, status=0, pressure=1, dropped=[])

    def proc_pid_rusage(pid, flavor, buffer):
        assert (pid, flavor) == (os.getpid(), 4)
        numbers = (ctypes.c_uint64 * len(FIELDS)).from_address(ctypes.addressof(buffer._obj) + 16)
        for i, name in enumerate(FIELDS):
            numbers[i] = told.usage.get(name, i)
        return told.status

    def sysctlbyname(name, old, size, new, new_size):
        assert name == b"kern.memorystatus_vm_pressure_level"
        assert (size._obj.value, new, new_size.value) == (4, None, 0)
        old._obj.value = told.pressure
        return told.status

    def msync(start, size, flags):
        told.dropped.append((start.value % BLOCK, size.value, flags.value))
        return 0

    calls = proc_pid_rusage, sysctlbyname, msync
    stand_in = SimpleNamespace(**{call.__name__: call for call in calls})
    monkeypatch.setattr(macos, "_library", lambda: stand_in)
    monkeypatch.setattr(sys, "platform", "darwin")
    return told


def test_footprint_has_the_size_of_apples_struct():
    assert ctypes.sizeof(macos._ProcessUsage) == 16 + 8 * len(FIELDS)


def test_memory_of_the_process_falls_when_it_is_freed(library):
    library.usage = {"phys_footprint": 500, "lifetime_max_phys_footprint": 900}
    assert (system.resident(), system.peak()) == (500, 900)
    library.usage["phys_footprint"] = 200
    assert (system.resident(), system.peak()) == (200, 900)


def test_memory_that_is_not_told_is_an_error(library):
    library.status = -1
    with pytest.raises(OSError, match="does not tell the memory"):
        system.resident()


GB = 10**9
#: Memory of a Mac, what Metal recommends, what is free, pressure, and the most that a load takes.
MACS = {
    "16 GB, macOS 27, idle": (17.2, 12.7, 11.8, 1, 10.8),
    "16 GB, macOS 14, idle": (17.2, 11.5, 12.5, 1, 10.35),
    "16 GB, busy": (17.2, 12.7, 8.0, 2, 3.2),
    "64 GB, idle": (68.7, 55.7, 60.0, 1, 45.8),
    "128 GB, macOS 14, idle": (137.4, 103.1, 128.0, 1, 91.6),
    "128 GB, no GPU": (137.4, None, 60.0, 1, 54.2),
}


@pytest.mark.parametrize("mac", MACS.values(), ids=MACS)
def test_default_memory_leaves_a_mac_enough(library, monkeypatch, mac):
    memory, working_set, free, library.pressure, expected = mac
    sizes = {"SC_PHYS_PAGES": int(memory * GB) // 16384, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    monkeypatch.setattr(system, "available", lambda: int(free * GB))
    total = system.default_total(GB // 5, working_set and int(working_set * GB))
    assert total == pytest.approx(expected * GB, rel=0.02)


def test_default_memory_is_no_less_than_what_is_held(library, monkeypatch):
    monkeypatch.setattr(system, "available", lambda: 0)
    assert system.default_total(5 * GB, 2 * GB) == 5 * GB


@pytest.mark.parametrize("warned", [False, True])
def test_memory_beyond_the_working_set_is_warned_of(tmp_path, monkeypatch, caplog, warned):
    monkeypatch.setattr(backends, "working_set", lambda: 3 * GB)
    with caplog.at_level("WARNING", "flashmoe"):
        plan_memory(
            Checkpoint.open(write_toy(tmp_path)), LoadOptions(memory="2.8GB" if warned else "2.6GB")
        )
    assert ("iogpu.wired_limit_mb=2966" in caplog.text) == warned


def test_pressure_is_normal_where_it_is_not_told(library):
    library.pressure = 4
    assert macos.pressure() == 4
    library.status = -1
    assert macos.pressure() == 1


def test_cached_pages_of_a_file_are_dropped_once(library, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * BLOCK + 5))
    forget(file)
    assert library.dropped == [(0, 3 * BLOCK + 5, 2)]
    file.write_bytes(b"")
    forget(file)
    assert len(library.dropped) == 1


def test_drive_is_known_by_the_uuid_of_its_volume(library, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    volumes = {"VolumeUUID": "A-1"}

    def run(command, **kwargs):
        assert command[:3] == ["/usr/sbin/diskutil", "info", "-plist"]
        assert os.path.ismount(command[3])
        return SimpleNamespace(stdout=plistlib.dumps(volumes))

    monkeypatch.setattr(subprocess, "run", run)
    model = tmp_path / "model"
    model.mkdir()
    drives.remember(model, drives.Drive("uncached", 3))
    assert drives.measured(model) == drives.Drive("uncached", 3)
    volumes["VolumeUUID"] = "B-2"
    assert drives.measured(model) is None
    assert drives.drive_of(model).io == "direct"
    del volumes["VolumeUUID"]  # network drives have none: by number, as elsewhere
    assert drives.measured(model) is None


@pytest.mark.parametrize("phase", [0, 8, 59])
def test_direct_reads_are_of_whole_blocks_past_the_page_cache(
    library, tmp_path, monkeypatch, phase
):
    """Only such reads go by DMA on macOS."""
    file = tmp_path / "file"
    content = np.random.default_rng(0).integers(0, 256, 5 * BLOCK, np.uint8)
    file.write_bytes(content.tobytes())
    flags, reads = [], []

    def preadv(fd, buffers, start):
        for buffer in buffers:
            view = np.frombuffer(buffer, np.uint8)
            reads.append((start % BLOCK, view.size % BLOCK, view.ctypes.data % BLOCK))
        return real_preadv(fd, buffers, start)

    def fcntl_(fd, command, argument=0):
        if command == io_modes.F_NOCACHE:
            flags.append(argument)
            return 0
        return real_fcntl(fd, command, argument)

    real_preadv, real_fcntl = os.preadv, fcntl.fcntl
    monkeypatch.setattr(io_modes, "_O_DIRECT", 0)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    memory = np.zeros(6 * BLOCK, np.uint8)
    start = -memory.ctypes.data % BLOCK
    reader = Direct()
    fd = reader.open(file)
    try:
        for offset in (0, phase):  # lies as the file does, and otherwise
            buffer = memory[start + offset :][: 3 * BLOCK + 7]
            assert reader.read(fd, buffer, BLOCK + phase) == buffer.size
            assert np.array_equal(buffer, content[BLOCK + phase :][: buffer.size])
    finally:
        os.close(fd)
    assert flags == [1]
    assert reads
    assert set(reads) == {(0, 0, 0)}


def test_mac_is_kept_awake_until_the_process_ends(library, tmp_path, monkeypatch):
    program = tmp_path / "caffeinate"
    program.write_text(f'#!/bin/sh\ncd {tmp_path}; echo "$@" > part; mv part said\n')
    program.chmod(0o755)
    monkeypatch.setattr(macos, "CAFFEINATE", str(program))
    macos.keep_awake()
    end = monotonic() + 30
    while not (tmp_path / "said").exists():
        assert monotonic() < end
        sleep(0.01)
    assert (tmp_path / "said").read_text().split() == ["-i", "-w", str(os.getpid())]
    monkeypatch.setattr(macos, "CAFFEINATE", str(tmp_path / "missing"))
    macos.keep_awake()
