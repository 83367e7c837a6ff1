"""Tests the Reader on real files and with real failures: short reads, EOF, EIO, missing files."""

import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.checkpoint.file_identity import FileIdentity
from flashmoe.errors import ReadError
from flashmoe.streaming import reader as reader_module
from flashmoe.streaming.io_modes import IO_MODES
from flashmoe.streaming.reader import Reader, ReadRequest, ReadStats

SIZE = 3_000_017
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture(scope="module")
def data():
    return random.Random(7).randbytes(SIZE)


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "model-00002.safetensors"
    path.write_bytes(data)
    return path


@pytest.fixture
def shard(tmp_path):
    """A file of twelve bytes that a test may change."""
    path = tmp_path / "model-00002.safetensors"
    path.write_bytes(b"0123456789ab")
    return path


@pytest.fixture(params=list(IO_MODES))
def io(request):
    return request.param


@pytest.fixture
def reader(io):
    with Reader(depth=3, io=io) as reader:
        yield reader


def request(path, start, buffer, layer=3, expert=517):
    return ReadRequest(path, start, buffer, layer, expert)


def error_of(reader, *requests):
    """Return the text of the ReadError that the requests raise."""
    with pytest.raises(ReadError) as caught:
        reader.submit(requests).wait()
    return str(caught.value)


@pytest.mark.parametrize("depth", [1, 16])
@given(data_=st.data())
@settings(max_examples=40)
def test_buffers_hold_the_bytes_of_the_file(depth, data_, file, data):
    starts = data_.draw(st.lists(st.integers(0, SIZE), max_size=9))
    sizes = [data_.draw(st.integers(0, min(2_000_000, SIZE - start))) for start in starts]
    buffers = [bytearray(size) for size in sizes]
    with Reader(depth) as reader:
        reader.submit([request(file, s, b) for s, b in zip(starts, buffers, strict=True)]).wait()
        assert reader.stats.bytes == sum(sizes)
    for start, buffer in zip(starts, buffers, strict=True):
        assert buffer == data[start : start + len(buffer)]


def test_one_entry_of_a_stacked_array_is_filled(reader, file, data):
    stack = np.zeros((3, 5, 7), np.uint32)
    reader.submit([request(file, 11, stack[1])]).wait()
    assert stack[1].tobytes() == data[11 : 11 + 140]
    assert not stack[0].any()
    assert not stack[2].any()


@linux
def test_short_read_is_continued(reader):
    # The kernel returns this file a page at a time, no matter how many bytes are requested.
    symbols = Path("/proc/kallsyms")
    if not symbols.exists():
        pytest.skip("this kernel shows no symbols")
    expected = symbols.read_bytes()[: 40 * 4096 + 5]
    buffer = bytearray(len(expected))
    fd = os.open(symbols, os.O_RDONLY)
    assert 0 < os.preadv(fd, [buffer], 0) < len(expected)
    os.close(fd)
    reader.submit([request(symbols, 0, buffer)]).wait()
    assert buffer == expected


def test_range_past_the_end_raises_read_error(reader, shard):
    assert error_of(reader, request(shard, 9, bytearray(8))) == (
        "expert 517 of layer 3 needs bytes 9..17 of model-00002.safetensors, which has 12: the "
        "download is incomplete; download it again"
    )
    assert "bytes 99..100" in error_of(reader, request(shard, 99, bytearray(1)))


@linux
def test_error_of_the_drive_raises_read_error(reader):
    # Nothing is mapped at address 4096, so the kernel returns a real EIO.
    text = error_of(reader, request(Path("/proc/self/mem"), 4096, bytearray(8), 2, 9))
    assert text == (
        "expert 9 of layer 2 needs bytes 4096..4104 of mem, which cannot be read: Input/output "
        "error (EIO); check the drive that holds /proc/self/mem, then load the model again"
    )


def test_directory_raises_read_error(reader, tmp_path):
    assert "cannot be read: Is a directory (EISDIR)" in error_of(
        reader, request(tmp_path, 0, bytearray(8))
    )


def test_missing_file_raises_read_error_until_it_is_back(reader, tmp_path):
    missing = tmp_path / "model-00009.safetensors"
    text = error_of(reader, request(missing, 0, bytearray(4)))
    assert text == (
        f"expert 517 of layer 3 needs bytes 0..4 of model-00009.safetensors, but {missing} is "
        "missing: put the file back, or download the model again"
    )
    missing.write_bytes(b"back")
    buffer = bytearray(4)
    reader.submit([request(missing, 0, buffer)]).wait()
    assert buffer == b"back"


def _grow(shard):
    with shard.open("ab") as f:
        f.write(b"more")


def _rewrite(shard):
    shard.write_bytes(b"ABCDEFGHIJKL")
    os.utime(shard, ns=(1, 1))  # so that the time differs, no matter how coarse the clock is


def _replace(shard):
    other = shard.with_name("new")
    other.write_bytes(shard.read_bytes())
    other.rename(shard)


CHANGES = pytest.mark.parametrize(
    ("change", "words"),
    [
        (Path.unlink, "was deleted or replaced"),
        (_replace, "was deleted or replaced"),
        (_grow, "changed its size from 12 to 16 bytes"),
        (lambda shard: os.truncate(shard, 3), "changed its size from 12 to 3 bytes"),
        (_rewrite, "was written to"),
    ],
    ids=["deleted", "replaced", "grown", "truncated", "rewritten"],
)


@CHANGES
def test_file_changed_after_its_first_read_raises_read_error(reader, shard, change, words):
    reader.submit([request(shard, 0, bytearray(4))]).wait()
    change(shard)
    text = error_of(reader, request(shard, 4, bytearray(4)))
    assert text == (
        f"expert 517 of layer 3 needs bytes 4..8 of model-00002.safetensors, but {shard} {words} "
        "since the model was loaded: leave the files alone, and load the model again"
    )


def identity(path):
    """Return the identity of a file."""
    with path.open("rb") as f:
        return FileIdentity.from_fd(f.fileno())


@CHANGES
def test_file_changed_before_its_first_read_raises_read_error(shard, change, words):
    known = {shard: identity(shard)}
    change(shard)
    with Reader(2, known) as reader:
        for _ in range(2):
            text = error_of(reader, request(shard, 0, bytearray(3)))
            words = words if shard.exists() else "is missing"
            assert f"bytes 0..3 of model-00002.safetensors, but {shard} {words}" in text


def test_removing_a_hard_link_is_no_change(shard):
    os.link(shard, shard.with_name("link"))
    with Reader(2, {shard: identity(shard)}) as reader:
        shard.with_name("link").unlink()
        buffer = bytearray(12)
        reader.submit([request(shard, 0, buffer)]).wait()
        assert buffer == b"0123456789ab"


def test_adding_a_hard_link_is_no_change(reader, shard):
    reader.submit([request(shard, 0, bytearray(4))]).wait()
    os.link(shard, shard.with_name("link"))
    reader.submit([request(shard, 0, bytearray(4))]).wait()


@pytest.mark.parametrize("job_nbytes", [1, 1 << 20])
@pytest.mark.parametrize("bad", [0, 4, 8])
def test_failed_range_does_not_stop_the_others(monkeypatch, reader, file, data, bad, job_nbytes):
    monkeypatch.setattr(reader_module, "_JOB_NBYTES", job_nbytes)
    buffers = [bytearray(1000 + i) for i in range(9)]
    starts = [SIZE - 5 if i == bad else 1000 * i for i in range(9)]
    requests = [request(file, s, b, 1, bad) for s, b in zip(starts, buffers, strict=True)]
    assert error_of(reader, *requests).startswith(f"expert {bad} of layer 1 needs bytes {SIZE - 5}")
    for i, (start, buffer) in enumerate(zip(starts, buffers, strict=True)):
        assert i == bad or buffer == data[start : start + len(buffer)]
    assert reader.stats.reads == 8


def test_wait_raises_only_after_all_reads_have_ended(tmp_path):
    big = tmp_path / "big"
    big.write_bytes(b"\1" * (1 << 20) * 64)
    with Reader(depth=2) as reader:
        for _ in range(5):
            buffer = np.zeros(64 << 20, np.uint8)
            failing = request(tmp_path / "missing", 0, np.empty(1 << 20, np.uint8))
            error_of(reader, failing, request(big, 0, buffer))
            assert buffer.all()


@pytest.mark.parametrize("buffer", [b"read-only", np.zeros((4, 4))[:, 1]], ids=["bytes", "column"])
def test_thread_survives_a_bad_buffer(buffer, file):
    with Reader(depth=1) as reader:
        pending = reader.submit([request(file, 0, buffer)])
        with pytest.raises((TypeError, BufferError, ValueError)):
            pending.wait()
        good = bytearray(5)
        reader.submit([request(file, 0, good)]).wait()


def test_second_wait_raises_the_error_again(reader, shard):
    pending = reader.submit([request(shard, 9, bytearray(8))])
    for _ in range(2):
        with pytest.raises(ReadError):
            pending.wait()
    assert pending.done()


def test_empty_submit_is_done_at_once(reader):
    pending = reader.submit([])
    assert pending.done()
    pending.wait()
    assert reader.stats == ReadStats()


@pytest.mark.parametrize("depth", [1, 16])
def test_eight_concurrent_callers_get_their_own_bytes(depth, file, data):
    failures = []

    def call(seed):
        rng = random.Random(seed)
        for _ in range(30):
            starts = [rng.randrange(SIZE - 50_000) for _ in range(9)]
            buffers = [np.empty(rng.randrange(1, 50_000), np.uint8) for _ in starts]
            requests = [request(file, s, b) for s, b in zip(starts, buffers, strict=True)]
            reader.submit(requests).wait()
            for start, buffer in zip(starts, buffers, strict=True):
                if buffer.tobytes() != data[start : start + len(buffer)]:
                    failures.append((seed, start, len(buffer)))

    with Reader(depth) as reader:
        callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert reader.stats.reads == 8 * 30 * 9
    assert failures == []


class GateLock:
    """A lock that opens a gate when somebody waits for the lock."""

    def __init__(self, lock, gate):
        self.lock, self.gate = lock, gate

    def __enter__(self):
        self.gate.set()
        self.lock.acquire()

    def __exit__(self, *exc):
        self.lock.release()

    def release(self):
        self.lock.release()


def test_counters_count_reads_and_waits(reader, file, monkeypatch):
    reader.submit([request(file, 0, bytearray(100))]).wait()
    before = reader.stats
    buffer = np.empty(2_000_000, np.uint8)
    # The reads begin when wait() blocks: on a busy machine they could end before it is called.
    gate, read = threading.Event(), reader._pool.io.read
    monkeypatch.setattr(reader._pool.io, "read", lambda *args: gate.wait(60) and read(*args))
    pending = reader.submit([request(file, i, buffer) for i in range(90)])
    pending._running = GateLock(pending._running, gate)
    pending.wait()
    after = reader.stats
    pending.wait()
    delta = after - before
    assert (delta.bytes, delta.reads, delta.waits) == (180_000_000, 90, 1)
    assert delta.seconds > 0
    assert delta.wait_seconds > 0
    assert before.bytes == 100
    assert reader.stats == after  # a wait that does not block is not counted


def test_done_is_true_only_after_the_read(file):
    with Reader(depth=1) as reader:
        first = reader.submit([request(file, 0, np.empty(SIZE, np.uint8))])
        buffer = np.zeros(SIZE, np.uint8)
        second = reader.submit([request(file, 0, buffer)])
        while not second.done():
            pass
        assert first.done()
        assert buffer.tobytes() == file.read_bytes()


def test_idle_thread_does_not_keep_a_buffer_alive(reader, shard):
    for start in (0, 99):  # a good read and a failed one
        buffer = np.empty(4, np.uint8)
        alive = weakref.ref(buffer)
        pending = reader.submit([request(shard, start, buffer)])
        try:
            pending.wait()
        except ReadError:
            assert start == 99
        # After another read on each thread, none holds the first one any more.
        for other in [reader.submit([request(shard, 0, bytearray(1))]) for _ in range(9)]:
            other.wait()
        del pending, buffer
        gc.collect()
        assert alive() is None


def test_close_finishes_reads_and_frees_threads_and_files(file, data):
    def descriptors():
        return len(os.listdir("/dev/fd"))

    open_before, threads_before = descriptors(), threading.active_count()
    reader = Reader(depth=4)
    buffers = [bytearray(100_000) for _ in range(40)]
    pending = [reader.submit([request(file, i, buffer)]) for i, buffer in enumerate(buffers)]
    reader.close()
    assert all(p.done() for p in pending)
    assert all(b == data[i : i + len(b)] for i, b in enumerate(buffers))
    assert descriptors() == open_before
    assert threading.active_count() == threads_before
    reader.close()
    with pytest.raises(RuntimeError, match="this Reader is closed"):
        reader.submit([request(file, 0, bytearray(1))])


@pytest.mark.parametrize("depth", [1, 5])
def test_wait_idle_returns_after_all_reads(depth, file, data):
    failures = []

    def call():
        for _ in range(10):
            buffers = [np.zeros(300_000, np.uint8) for _ in range(8)]
            for i, buffer in enumerate(buffers):
                reader.submit([request(file, i, buffer), request(file, SIZE, bytearray(1))])
            reader.wait_idle()
            failures.extend(
                i for i, b in enumerate(buffers) if b.tobytes() != data[i : i + 300_000]
            )

    with Reader(depth) as reader:
        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        buffer = np.zeros(SIZE, np.uint8)
        pending = reader.submit([request(file, 0, buffer)])
    reader.wait_idle()
    assert pending.done()
    assert failures == []


def ended(reader_threads):
    """Return whether all threads end within a minute."""
    stop = time.monotonic() + 60
    while time.monotonic() < stop and any(t.is_alive() for t in reader_threads):
        time.sleep(0.01)
    return not any(t.is_alive() for t in reader_threads)


def test_dropped_reader_finishes_reads_and_frees_threads_and_files(file, data):
    open_before, others = len(os.listdir("/dev/fd")), set(threading.enumerate())
    reader = Reader(depth=4)
    buffers = [bytearray(100_000) for _ in range(40)]
    pending = [reader.submit([request(file, i, buffer)]) for i, buffer in enumerate(buffers)]
    own = set(threading.enumerate()) - others
    assert {t.name for t in own} == {f"flashmoe-read-{i}" for i in range(4)}
    del reader
    gc.collect()
    for p in pending:  # reads that were submitted before still finish
        p.wait()
    assert all(b == data[i : i + len(b)] for i, b in enumerate(buffers))
    assert ended(own)
    assert len(os.listdir("/dev/fd")) == open_before


def test_reader_in_a_reference_cycle_is_freed(file):
    others = set(threading.enumerate())
    reader = Reader(depth=2)
    reader.submit([request(file, 0, bytearray(9))]).wait()
    reader.cycle = reader
    own = set(threading.enumerate()) - others
    del reader
    gc.collect()
    assert ended(own)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("", ""),
        ("", "del reader"),
        ("", "atexit.register(reader.close)"),
        # A function that is registered before the first finalizer runs after all finalizers.
        ("atexit.register(lambda: reader.close())", ""),
    ],
)
def test_python_exits_while_reads_are_in_flight(file, first, last):
    code = f"""
import atexit, sys
from pathlib import Path
{first}
from flashmoe.streaming.reader import Reader, ReadRequest
reader = Reader(4)
for i in range(50):
    reader.submit([ReadRequest(Path(sys.argv[1]), i, bytearray(2_000_000), 0, 0)])
{last}
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], timeout=120, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_file_is_opened_once(reader, file):
    before = len(os.listdir("/dev/fd"))
    for other in [reader.submit([request(file, i, bytearray(9))]) for i in range(50)]:
        other.wait()
    assert len(os.listdir("/dev/fd")) == before + 1
    for name in os.listdir("/dev/fd"):
        if Path(f"/dev/fd/{name}").exists() and os.path.samefile(f"/dev/fd/{name}", file):
            assert not os.get_inheritable(int(name))


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_below_one_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, must be 1 or more"):
        Reader(depth)


def test_unknown_io_mode_is_refused():
    with pytest.raises(ValueError, match="io is 'fast', must be one of buffered, uncached, direct"):
        Reader(io="fast")
