"""Parallel positioned reads of expert bytes, straight into buffers that the caller gives.

A `Reader` owns the threads and the open files; it knows nothing of models. The buffers stay the
caller's: between `submit` and the end of `Pending.wait` they belong to the reads.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from .errors import ReadError

# The ranges of one submit go to the threads in jobs of at least this many bytes. A hand-over costs
# some 15 us, a small read less: a 7 MB expert makes six jobs, a tiny one a single job.
_JOB_NBYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One byte range: `start` up to `start` + the size of `buffer`, in bytes of the file `path`.

    buffer: any writable C-contiguous buffer. layer and expert are for the text of errors.
    """

    path: Path
    start: int
    buffer: Any
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Counters of a `Reader` since its start; subtract two for what lies between them."""

    bytes: int = 0
    reads: int = 0  # ranges read to their end
    seconds: float = 0.0  # busy time, summed over the threads
    waits: int = 0  # calls of wait() that had to block
    wait_seconds: float = 0.0  # time they were blocked, summed over the callers

    def __sub__(self, earlier: ReadStats) -> ReadStats:
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return ReadStats(*(now - then for now, then in pairs))


class Pending:
    """The reads of one `submit`."""

    def __init__(self, reader: Reader, jobs: int):
        self._reader = reader
        self._jobs_left = jobs
        self._error: Exception | None = None
        # Held until the last job ends: a bare lock costs a tenth of a threading.Event.
        self._running = threading.Lock()
        if jobs:
            self._running.acquire()

    def done(self) -> bool:
        """True when all reads have ended, well or badly: `wait` will not block."""
        return self._jobs_left == 0

    def wait(self) -> None:
        """Return when ALL reads have ended, then raise the first error (`ReadError`), if any.

        After it returned or raised that error no buffer is written any more. May be called again.
        """
        if self._jobs_left:
            start = perf_counter()
            with self._running:
                pass
            self._reader._count_wait(perf_counter() - start)
        if self._error is not None:
            raise self._error


class Reader:
    """`depth` threads that read byte ranges; as many reads are in flight at the drive at most.

    Safe to use from several threads. Files are opened once, on first use, and kept until `close`.
    """

    def __init__(self, depth: int = 8):
        if depth < 1:
            raise ValueError(f"depth is {depth}, must be 1 or more")
        self.depth = depth
        self._queue: SimpleQueue[tuple[Pending, list[ReadRequest]] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards what follows, and the fields of each Pending
        self._stats = ReadStats()
        self._closed = False
        self._files_lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._threads = [
            threading.Thread(target=self._work, name=f"flashmoe-read-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> ReadStats:
        """The counters as they are now."""
        with self._lock:
            return self._stats

    def submit(self, requests: Sequence[ReadRequest]) -> Pending:
        """Start the reads, usually the ranges of one expert. Errors come from `Pending.wait`."""
        jobs = list(_jobs(requests))
        pending = Pending(self, len(jobs))
        with self._lock:
            if self._closed:
                raise RuntimeError("this Reader is closed: it takes no more reads")
            for job in jobs:
                self._queue.put((pending, job))
        return pending

    def close(self) -> None:
        """End the reads that were submitted, then the threads, then close the files."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            thread.join()
        with self._files_lock:
            while self._files:
                os.close(self._files.popitem()[1].fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._run(*item)
            del item  # an idle thread must not keep a caller's buffers alive

    def _run(self, pending: Pending, job: list[ReadRequest]) -> None:
        start = perf_counter()
        nbytes = reads = 0
        error = None
        for request in job:
            try:
                nbytes += self._read(request)
                reads += 1
            except Exception as e:  # the thread lives on: it goes to whoever waits
                error = error or e
        with self._lock:
            self._add(ReadStats(nbytes, reads, perf_counter() - start))
            pending._error = pending._error or error
            pending._jobs_left -= 1
            last = pending._jobs_left == 0
        if last:
            pending._running.release()

    def _count_wait(self, seconds: float) -> None:
        with self._lock:
            self._add(ReadStats(waits=1, wait_seconds=seconds))

    def _add(self, more: ReadStats) -> None:
        now = self._stats
        self._stats = ReadStats(
            now.bytes + more.bytes,
            now.reads + more.reads,
            now.seconds + more.seconds,
            now.waits + more.waits,
            now.wait_seconds + more.wait_seconds,
        )

    def _read(self, request: ReadRequest) -> int:
        """Fill the buffer; returns its size in bytes."""
        buffer = request.buffer
        nbytes = memoryview(buffer).nbytes
        try:
            file = self._files.get(request.path) or self._open(request.path)
            done = got = os.preadv(file.fd, [buffer], request.start)
            while done < nbytes and got:
                rest = memoryview(buffer).cast("B")[done:]
                got = os.preadv(file.fd, [rest], request.start + done)
                done += got
            # After the read, so that bytes of a changed file never pass as good ones.
            change = file.change()
        except FileNotFoundError as e:
            raise ReadError(
                f"{_need(request, nbytes)}, but {request.path} is missing: put the file back, or "
                "download the model again"
            ) from e
        except OSError as e:
            name = errno.errorcode.get(e.errno, e.errno)
            raise ReadError(
                f"{_need(request, nbytes)}, which cannot be read: {os.strerror(e.errno)} ({name}); "
                f"check the drive that holds {request.path}, then load the model again"
            ) from e
        if change:
            raise ReadError(
                f"{_need(request, nbytes)}, but {request.path} {change} while the model was in "
                "use: leave the files alone, and load the model again"
            )
        if done < nbytes:
            raise ReadError(
                f"{_need(request, nbytes)}, which has {file.opened.st_size}: the download is "
                "incomplete; download it again"
            )
        return nbytes

    def _open(self, path: Path) -> _File:
        with self._files_lock:
            file = self._files.get(path)
            if file is None:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                file = self._files[path] = _File(fd, os.fstat(fd))
            return file


@dataclass(frozen=True, slots=True)
class _File:
    fd: int
    opened: os.stat_result

    def change(self) -> str | None:
        """What happened to the file since it was opened, in words."""
        now, then = os.fstat(self.fd), self.opened
        # A file that was replaced by a rename is an unlinked one behind our descriptor.
        if now.st_nlink == 0 and then.st_nlink != 0:
            return "was deleted or replaced"
        if now.st_size != then.st_size:
            return f"changed its size from {then.st_size} to {now.st_size} bytes"
        if now.st_mtime_ns != then.st_mtime_ns:
            return "was written to"
        return None


def _jobs(requests: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Cut `requests`, in their order, into lists of `_JOB_NBYTES` or more, but for the last."""
    job, nbytes = [], 0
    for request in requests:
        job.append(request)
        nbytes += memoryview(request.buffer).nbytes
        if nbytes >= _JOB_NBYTES:
            yield job
            job, nbytes = [], 0
    if job:
        yield job


def _need(request: ReadRequest, nbytes: int) -> str:
    """The start of every error: who needs which bytes of what."""
    return (
        f"expert {request.expert} of layer {request.layer} needs bytes {request.start}.."
        f"{request.start + nbytes} of {request.path.name}"
    )
