"""Ask macOS for what only it can tell or do: memory of a process, memory pressure, volumes, sleep.

Nothing here imports anything of macOS before it is called. Nobody has run it on a Mac yet: the
layouts are those of Apple's headers, and the tests call it with a stand-in of the library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import plistlib
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

#: `struct rusage_info_v4` of <sys/resource.h> is a UUID and 35 numbers of 64 bits. The kernel of a
#: later system writes no more than the version that was asked for has.
_RUSAGE_INFO_V4 = 4
_FOOTPRINT, _LARGEST_FOOTPRINT = 7, 28
_MS_INVALIDATE = 0x2
CAFFEINATE = "/usr/bin/caffeinate"
#: `kern.memorystatus_vm_pressure_level`: the system is short of memory from here on.
PRESSURE_WARNING = 2


class _ProcessUsage(ctypes.Structure):
    _fields_ = (("uuid", ctypes.c_ubyte * 16), ("numbers", ctypes.c_uint64 * 35))


@cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def footprint() -> tuple[int, int]:
    """Return the bytes of this process's memory, now and at most so far.

    They are what Activity Monitor shows: also what the GPU uses, and what was compressed; not the
    pages of files.

    Raises:
        OSError: the system does not say.
    """
    usage = _ProcessUsage()
    if _library().proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(usage)) != 0:
        raise OSError(ctypes.get_errno(), "macOS does not tell the memory of this process")
    return usage.numbers[_FOOTPRINT], usage.numbers[_LARGEST_FOOTPRINT]


def pressure() -> int:
    """Return the system's memory pressure: 1 is normal, 2 a warning, 4 critical."""
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    arguments = name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0)
    return level.value if _library().sysctlbyname(*arguments) == 0 else 1


def drop_cached_pages(path: Path) -> None:
    """Drop what the page cache holds of a file, so that reads reach the drive.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = np.frombuffer(mapped, np.uint8)
            start = ctypes.c_void_p(pages.ctypes.data)
            _library().msync(start, ctypes.c_size_t(size), ctypes.c_int(_MS_INVALIDATE))
            del pages  # the mapping cannot be closed before


def volume_id(path: Path) -> str | None:
    """Return the UUID of the volume that holds a path, or None where it has none.

    Device numbers depend on the order in which drives were connected.
    """
    mount = path.resolve()
    while not mount.is_mount():
        mount = mount.parent
    try:
        command = ["/usr/sbin/diskutil", "info", "-plist", str(mount)]
        found = plistlib.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        uuid = found.get("VolumeUUID")
    except (OSError, subprocess.SubprocessError, ValueError, plistlib.InvalidFileException):
        return None
    return uuid if isinstance(uuid, str) else None


def keep_awake() -> None:
    """Keep a Mac from idle sleep until this process ends; elsewhere do nothing.

    A busy process alone does not: hours of work would stand still.
    """
    if sys.platform == "darwin":
        with suppress(OSError):
            subprocess.Popen(
                [CAFFEINATE, "-i", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
