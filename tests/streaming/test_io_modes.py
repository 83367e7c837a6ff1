"""Tests that each I/O mode reads the right bytes, and what it leaves in the page cache."""

import ctypes
import os
import sys

import numpy as np
import pytest

from flashmoe.streaming.io_modes import BLOCK, IO_MODES
from flashmoe.streaming.reader import Reader, ReadRequest

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def pages_in_cache(path) -> int:
    """Return how many pages of a file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = path.stat().st_size
    pages = -(-size // 4096)
    with open(path, "rb") as f:
        address = libc.mmap(None, size, 1, 1, f.fileno(), 0)  # PROT_READ, MAP_SHARED
    resident = ctypes.create_string_buffer(pages)
    assert libc.mincore(address, size, resident) == 0
    libc.munmap(address, size)
    return sum(b & 1 for b in resident.raw)


@pytest.fixture
def cold_file(tmp_path):
    """A file of random bytes that is not in the page cache."""
    path = tmp_path / "experts"
    path.write_bytes(os.urandom((8 << 20) + 77))
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_cache(path):
        pytest.skip("this file system keeps all files in memory")
    return path


@linux
@pytest.mark.parametrize("io", ["buffered", "uncached", "uncached without the flag", "direct"])
def test_io_mode_decides_what_stays_in_the_page_cache(cold_file, io):
    """The flag is RWF_DONTCACHE, which old kernels do not support."""
    buffers = [bytearray(1 << 20) for _ in range(8)]
    requests = [ReadRequest(cold_file, i << 20, b, 0, i) for i, b in enumerate(buffers)]
    with Reader(4, io=io.split()[0]) as reader:
        if "without" in io:
            reader._pool.io.flags = 0
        reader.submit(requests).wait()
        assert len(getattr(reader._pool.io, "direct", ())) == (io == "direct")
        held = pages_in_cache(cold_file)
    assert b"".join(buffers) == cold_file.read_bytes()[: 8 << 20]
    # Ranges are dropped in full blocks: a folio in which a range ends may stay in the cache.
    least, most = {"buffered": (2048, 2049), "direct": (0, 0)}.get(io, (0, 100))
    assert least <= held <= most


def aligned_like(start: int, size: int) -> np.ndarray:
    """Return a buffer of `size` bytes that is aligned like byte `start` of a file."""
    raw = np.zeros(size + BLOCK, np.uint8)
    skip = (start - raw.ctypes.data) % BLOCK
    return raw[skip : skip + size]


@linux
@pytest.mark.parametrize("in_place", [True, False])
def test_direct_read_returns_the_requested_range(cold_file, in_place):
    """Ranges end at both sides of blocks and of the bounce buffer, and at the end of the file."""
    content = cold_file.read_bytes()
    starts = [0, 1, 4095, 4096, 4097, (1 << 20) - 1, (1 << 20) + 5, len(content) - 4100]
    sizes = [0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 9]
    direct = IO_MODES["direct"]()
    fd = direct.open(cold_file)
    try:
        for start in starts:
            for size in sizes:
                buffer = aligned_like(start + (not in_place) * 64, size)
                done = direct.read(fd, buffer, start)
                assert done == len(content[start : start + size])
                assert buffer[:done].tobytes() == content[start : start + size]
        assert direct.read(fd, bytearray(9), len(content)) == 0
        assert direct.direct == {fd}
    finally:
        os.close(fd)


@linux
def test_direct_read_does_not_write_beside_its_buffer(cold_file):
    """A drive writes full blocks, but slots are adjacent in memory."""
    content = cold_file.read_bytes()
    direct = IO_MODES["direct"]()
    fd = direct.open(cold_file)
    try:
        for start, size in [
            (72, 3 * BLOCK),
            (72, BLOCK - 72),
            (4000, 200),
            (0, 5),
            (90, 2 * BLOCK),
        ]:
            buffer = aligned_like(start, size + BLOCK)
            buffer[size:] = 7
            assert direct.read(fd, buffer[:size], start) == size
            assert buffer[:size].tobytes() == content[start : start + size]
            assert (buffer[size:] == 7).all()
            assert (buffer.base[: (start - buffer.base.ctypes.data) % BLOCK] == 0).all()
    finally:
        os.close(fd)


@linux
def test_file_that_refuses_direct_reads_is_read_buffered(cold_file):
    """Some file systems open a file for direct reads and then refuse to read it."""
    direct = IO_MODES["direct"]()
    buffer = bytearray(9)
    fd = os.open(cold_file, os.O_RDONLY | os.O_DIRECT)
    try:
        direct.direct.add(fd)
        direct._read_aligned = lambda *args: os.preadv(fd, [bytearray(9)], 1)  # not aligned
        assert direct.read(fd, buffer, 0) == 9
        assert buffer == cold_file.read_bytes()[:9]
        assert direct.direct == set()
    finally:
        os.close(fd)
