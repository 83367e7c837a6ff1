"""Read byte ranges of files in parallel, straight into the caller's buffers.

A buffer in the memory of a device is filled through a staging buffer in host memory (see
`flashmoe.streaming.device_copy`). A `Reader` owns the threads and the open files; it knows nothing
of models. The buffers stay the caller's: between `submit` and the end of `PendingRead.wait` they
belong to the reads.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from ..checkpoint.file_identity import FileIdentity
from ..errors import ReadError
from .device_copy import STAGING_NBYTES, DeviceBytes
from .io_modes import BLOCK, IO_MODES, Buffered

# The ranges of one submit go to the threads in jobs of at least this many bytes. A hand-over costs
# some 15 us, a small read less: a 7 MB expert makes six jobs, a tiny one a single job.
_JOB_NBYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One byte range: `start` up to `start` + the size of `buffer`, in bytes of the file `path`.

    Attributes:
        buffer: any writable C-contiguous buffer, or `DeviceBytes`.
        layer, expert: named in the text of errors.
    """

    path: Path
    start: int
    buffer: Any
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Counters of a `Reader` since its start; subtract two for what lies between them.

    Attributes:
        bytes: bytes read.
        reads: ranges read to their end.
        seconds: time that the threads were busy, summed over them.
        waits: calls of `PendingRead.wait` that had to block.
        wait_seconds: time that those calls were blocked, summed over them.
    """

    bytes: int = 0
    reads: int = 0
    seconds: float = 0.0
    waits: int = 0
    wait_seconds: float = 0.0

    def __sub__(self, earlier: ReadStats) -> ReadStats:
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return ReadStats(*(now - then for now, then in pairs))


class PendingRead:
    """The reads of one `Reader.submit`."""

    def __init__(self, pool: _Pool, jobs: int):
        self._pool = pool
        self._jobs_left = jobs
        self._error: Exception | None = None
        # Held until the last job ends: a bare lock costs a tenth of a threading.Event.
        self._running = threading.Lock()
        if jobs:
            self._running.acquire()

    def done(self) -> bool:
        """Return whether all reads have ended, well or badly, so that `wait` will not block."""
        return self._jobs_left == 0

    def wait(self) -> None:
        """Wait until ALL reads have ended; no buffer is written after that. May be called again.

        Raises:
            ReadError: the first error of the reads, raised when all of them have ended.
        """
        if self._jobs_left:
            start = perf_counter()
            with self._running:
                pass
            with self._pool.lock:
                self._pool.add(ReadStats(waits=1, wait_seconds=perf_counter() - start))
        if self._error is not None:
            raise self._error


class Reader:
    """Threads that read byte ranges. Safe to use from several threads.

    Files are opened once, on first use, and kept open until `close`, or until the Reader is garbage
    and the reads that were submitted have ended.

    Args:
        depth: the number of threads, and so the most reads in flight at the drive.
        identities: what the files must be when they are opened. A file that is not named here must
            stay what it was at its first read.
        io: one of `io_modes.IO_MODES`.
        split: ranges of more bytes are cut into pieces of this many, for several threads; 0: no
            range is cut.
    """

    def __init__(
        self,
        depth: int = 8,
        identities: Mapping[Path, FileIdentity] | None = None,
        io: str = "buffered",
        split: int = 0,
    ):
        if depth < 1:
            raise ValueError(f"depth is {depth}, must be 1 or more")
        if split and split < BLOCK:
            raise ValueError(f"split is {split} bytes, must be 0, or {BLOCK} or more")
        if io not in IO_MODES:
            raise ValueError(f"io is {io!r}, must be one of {', '.join(IO_MODES)}")
        self._split = split
        self._pool = _Pool(depth, identities or {}, IO_MODES[io]())
        self._stop = weakref.finalize(self, self._pool.to_each, None)
        # At exit the system closes the files, and a thread that waits does no harm.
        self._stop.atexit = False
        # The threads hold the pool, not the Reader, so that it can become garbage.
        self._threads = [
            threading.Thread(target=self._pool.work, name=f"flashmoe-read-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> ReadStats:
        """The counters now."""
        with self._pool.lock:
            return self._pool.stats

    def submit(self, requests: Sequence[ReadRequest]) -> PendingRead:
        """Start reads, usually the ranges of one expert.

        Errors are raised by `PendingRead.wait`.
        """
        jobs = list(_jobs([piece for r in requests for piece in _pieces(r, self._split)]))
        pending = PendingRead(self._pool, len(jobs))
        with self._pool.lock:
            if not self._stop.alive:
                raise RuntimeError("this Reader is closed: it takes no more reads")
            for job in jobs:
                self._pool.queue.put(partial(self._pool.run, pending, job))
        return pending

    def wait_idle(self) -> None:
        """Wait until all reads that were submitted before have ended.

        For the caller of a `submit` that an interrupt kept from returning its PendingRead.
        """
        idle = threading.Event()
        meet = threading.Barrier(len(self._threads), action=idle.set).wait
        with self._pool.lock:
            if is_open := self._stop.alive:
                self._pool.to_each(meet)
        if is_open:
            idle.wait()
        else:
            self.close()  # perhaps another thread closes it, and reads have not ended

    def close(self) -> None:
        """Wait for the submitted reads and end the threads; the last one closes the files."""
        with self._pool.lock:
            # Not self._stop(): late in the exit of Python that does nothing, and join would hang.
            if self._stop.alive:
                self._pool.to_each(None)
                self._stop.detach()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class _Pool:
    """The state that the threads of a Reader share: jobs, open files, counters."""

    def __init__(self, depth: int, identities: Mapping[Path, FileIdentity], io: Buffered):
        self.queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.lock = threading.Lock()  # guards what follows, and the fields of each Pending
        self.stats = ReadStats()
        self._depth = self._threads_left = depth
        self._identities = identities
        self.io = io
        self._files_lock = threading.Lock()
        # Descriptor, and what the file must be.
        self._files: dict[Path, tuple[int, FileIdentity]] = {}

    def to_each(self, job: Callable[[], object] | None) -> None:
        """Queue a job once for each thread; None ends a thread.

        Takes no lock, because the garbage collector may call this at any point of any thread. It is
        one call of C, so that no interrupt leaves a part undone.
        """
        deque(map(self.queue.put, [job] * self._depth), maxlen=0)

    def work(self) -> None:
        """Do jobs until one is None: what each thread runs."""
        while (job := self.queue.get()) is not None:
            job()
            del job  # an idle thread must not keep a caller's buffers alive
        with self.lock:
            self._threads_left -= 1
            last = self._threads_left == 0
        if last:  # no read runs any more
            while self._files:
                os.close(self._files.popitem()[1][0])

    def add(self, more: ReadStats) -> None:
        """Add to the counters. The caller holds the lock."""
        now = self.stats
        self.stats = ReadStats(
            now.bytes + more.bytes,
            now.reads + more.reads,
            now.seconds + more.seconds,
            now.waits + more.waits,
            now.wait_seconds + more.wait_seconds,
        )

    def run(self, pending: PendingRead, job: list[ReadRequest]) -> None:
        """Do the reads of one job and record them in `pending`."""
        start = perf_counter()
        nbytes = reads = 0
        error = None
        for request in job:
            try:
                nbytes += self._read(request)
                reads += 1
            except Exception as e:  # the thread lives on, and `wait` raises it
                error = error or e
        with self.lock:
            self.add(ReadStats(nbytes, reads, perf_counter() - start))
            pending._error = pending._error or error
            pending._jobs_left -= 1
            last = pending._jobs_left == 0
        if last:
            pending._running.release()

    def _read(self, request: ReadRequest) -> int:
        """Fill the buffer and return its size in bytes."""
        nbytes = _nbytes(request.buffer)
        to_device = isinstance(request.buffer, DeviceBytes)
        try:
            fd, identity = self._files.get(request.path) or self._open(request.path)
            buffer = request.buffer.staging(request.start) if to_device else request.buffer
            done = self.io.read(fd, buffer, request.start)
            # After the read, so that bytes of a changed file never pass as good ones.
            change = identity.change(fd)
        except FileNotFoundError as e:
            raise ReadError(
                f"{_need(request, nbytes)}, but {request.path} is missing: put the file back, or "
                "download the model again"
            ) from e
        except OSError as e:
            code = e.errno or 0
            name = errno.errorcode.get(code, code)
            raise ReadError(
                f"{_need(request, nbytes)}, which cannot be read: {os.strerror(code)} ({name}); "
                f"check the drive that holds {request.path}, then load the model again"
            ) from e
        if change:
            raise ReadError(
                f"{_need(request, nbytes)}, but {request.path} {change} since the model was "
                "loaded: leave the files alone, and load the model again"
            )
        if done < nbytes:
            raise ReadError(
                f"{_need(request, nbytes)}, which has {identity.nbytes}: the download is "
                "incomplete; download it again"
            )
        if to_device:
            request.buffer[:] = buffer
        return nbytes

    def _open(self, path: Path) -> tuple[int, FileIdentity]:
        with self._files_lock:
            file = self._files.get(path)
            if file is None:
                fd = self.io.open(path)
                file = self._files[path] = (
                    fd,
                    self._identities.get(path) or FileIdentity.from_fd(fd),
                )
            return file


def _nbytes(buffer: Any) -> int:
    return buffer.nbytes if isinstance(buffer, DeviceBytes) else memoryview(buffer).nbytes


def _pieces(request: ReadRequest, nbytes: int) -> Iterator[ReadRequest]:
    """Cut a request at blocks of the file, so that no block is read for two pieces.

    Args:
        nbytes: bytes of a piece; 0: all of the request, or what a staging buffer holds.
    """
    whole = request.buffer
    if isinstance(whole, DeviceBytes):
        if nbytes or whole.nbytes > STAGING_NBYTES:
            nbytes = min(nbytes or STAGING_NBYTES, STAGING_NBYTES)
    elif nbytes:
        whole = memoryview(whole).cast("B")
    if not nbytes:
        yield request
        return
    done = 0
    while done < whole.nbytes:
        end = (request.start + done + nbytes) // BLOCK * BLOCK - request.start
        end = min(end, whole.nbytes)
        yield replace(request, start=request.start + done, buffer=whole[done:end])
        done = end


def _jobs(requests: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Cut requests, in their order, into lists of `_JOB_NBYTES` or more, except for the last."""
    job: list[ReadRequest] = []
    nbytes = 0
    for request in requests:
        job.append(request)
        nbytes += _nbytes(request.buffer)
        if nbytes >= _JOB_NBYTES:
            yield job
            job, nbytes = [], 0
    if job:
        yield job


def _need(request: ReadRequest, nbytes: int) -> str:
    """Return the beginning of every error text: who needs which bytes of which file."""
    return (
        f"expert {request.expert} of layer {request.layer} needs bytes {request.start}.."
        f"{request.start + nbytes} of {request.path.name}"
    )
