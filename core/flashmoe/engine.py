"""Run a model on one thread that owns MLX: requests go in, events come out.

MLX arrays, streams and seeds belong to the thread that made them. So one thread loads the model,
generates, keeps the prompt cache, and ends its own streams; callers on any thread, or in asyncio,
only pass messages. Requests begin in the order in which they were made, and run together as far as
memory allows: see `flashmoe.generation.batch`.

    Engine.stream -> Job -> Preparation -> AnswerState (limits, grammar, events)
                            Batch.admit -> ActiveSequence (prompt cache, sampler)
                            Batch.step  -> one pass of all sequences through the model
    EventStream  <- Job.put <- Delivery <- events of each answer

What depends on a client's schemas and messages runs beside that thread: a request is prepared on a
thread of its own, and values are checked on another. Both leave the work to helper processes, which
have limits: see `flashmoe.bounded`.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any

from .bounded import calls
from .errors import ReadError, TimedOut
from .events import End, Event
from .generation.job import Cancellation, Job
from .generation.preparation import AHEAD, HOLD_SECONDS, Preparation
from .options import EngineOptions, with_settings
from .process_limits import check_threads
from .requests import Request, check_request
from .shutdown import close_at_exit

if TYPE_CHECKING:
    from .generation.batch import Batch


class _Deadline:
    """The time at which an answer must be complete, counted from now.

    Args:
        timeout: seconds, None for no limit.
    """

    def __init__(self, timeout: float | None):
        self._timeout = timeout
        self._end = None if timeout is None else monotonic() + timeout

    def left(self) -> float | None:
        """Return the seconds that are left, None for no limit."""
        return None if self._end is None else max(0.0, self._end - monotonic())

    def error(self) -> TimedOut:
        """Return the error to raise when no time is left."""
        assert self._timeout is not None, "there is no limit"
        return TimedOut(
            f"the answer was not complete after timeout={self._timeout:g} seconds, in which other "
            "requests may have run before it: raise timeout, or lower max_tokens"
        )


async def _within(deadline: _Deadline, coming: Coroutine) -> Event | BaseException:
    """Return what `coming` returns.

    Not by `asyncio.wait_for`, which before Python 3.12 forgets that it was cancelled when the
    result arrives at the same moment.

    Raises:
        TimedOut: it took too long.
    """
    task = asyncio.ensure_future(coming)
    try:
        await asyncio.wait([task], timeout=deadline.left())
        if not task.done():
            raise deadline.error()
        return task.result()
    finally:
        task.cancel()


class EventStream(Iterator[Event]):
    """Iterates over the events of an answer as they are generated.

    The last event is an End, unless an error is raised. Closing the stream cancels the rest of the
    answer, and so does dropping it.
    """

    def __init__(self, submit: Callable[[Callable], Job], timeout: float | None = None):
        self._deadline = _Deadline(timeout)
        self._events: SimpleQueue = SimpleQueue()
        self._over = False
        self._job: Job | None = None
        self._job = submit(self._events.put)

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        try:
            event = self._events.get(timeout=self._deadline.left())
        except Empty:
            self.close()
            raise self._deadline.error() from None
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(event, BaseException):
            self._over = True
            raise event
        self._over = isinstance(event, End)
        return event

    def close(self) -> None:
        """Cancel the answer; the engine stops within a token."""
        self._over = True
        if self._job is not None:
            self._job.cancelled.set()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Engine:
    """One checkpoint and the thread that runs it. Nothing is loaded before the first request.

    Args:
        path: the checkpoint directory.
        options: how to load it and how to answer.
        settings: fields of `EngineOptions` (memory, experts, batch, prompt_cache, ...), which
            replace those of `options`.

    Raises:
        SettingError: an option has an impossible value.
        TypeError: an option does not exist.
    """

    def __init__(self, path: str | Path, options: EngineOptions | None = None, **settings: Any):
        self.path = Path(path)
        self.options = with_settings(options or EngineOptions(), settings)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._closing = threading.Event()
        self._preparations: dict[Job, Preparation] = {}
        self._batch: Batch | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="flashmoe-engine", daemon=True)
        self._thread.start()
        # A thread that ends with live MLX streams aborts the process at exit.
        close_at_exit(self.close)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    @property
    def loaded(self) -> bool:
        """Whether a model is in memory."""
        return self._batch is not None

    @property
    def running(self) -> int:
        """The number of answers that are computed together now."""
        batch = self._batch
        return 0 if batch is None else len(batch.sequences)

    @property
    def waiting(self) -> int:
        """The number of requests that have not begun."""
        return self._jobs.qsize() + len(self._waiting)

    def stream(
        self,
        request: Request,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
    ) -> EventStream:
        """Queue a request and return the events of its answer.

        Args:
            cancel: when it is set, the answer ends within a token, with an End that says so.
            timeout: seconds from now, time in the queue included, after which the answer is
                cancelled and TimedOut is raised.

        Raises:
            SettingError: at once, for an impossible value. Other errors, each a FlashMoEError whose
                text is for the user, are raised while the events are iterated.
        """
        check_request(request)
        return EventStream(lambda put: self._submit(request, put, cancel), timeout)

    async def astream(
        self,
        request: Request,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Do what `stream` does, for asyncio.

        Cancelling the task or closing the iterator cancels the answer.
        """
        check_request(request)
        deadline = _Deadline(timeout)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue = asyncio.Queue()

        def put(event):
            # The loop may have been closed while the thread was still at work.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._submit(request, put, cancel)
        try:
            event = None
            while not isinstance(event, End):
                event = await _within(deadline, events.get())
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            job.cancelled.set()

    def close(self) -> None:
        """Cancel all answers, free the model, and end the thread. May be called again."""
        with self._lock:
            if not self.closed:
                self._closing.set()
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _submit(self, request: Request, put, cancel: threading.Event | None) -> Job:
        def emit(event: Event | BaseException) -> None:
            # An answer that `close` cut short ends with an error.
            put(self._closed_error() if self.closed and isinstance(event, End) else event)

        job = Job(request, emit, Cancellation(cancel, self._closing))
        with self._lock:
            if self.closed:
                raise self._closed_error()
            self._jobs.put(job)
        return job

    def _closed_error(self) -> RuntimeError:
        return RuntimeError(f"the engine of {self.path} is closed")

    def _run(self) -> None:
        waiting = self._waiting
        while self._receive(waiting):
            for job in [job for job in waiting if job.cancelled.closed]:
                self._forget(job)  # its answer was dropped while it waited
            self._begin(waiting)
            if self._batch is not None:
                self._step(self._batch)
        self._drop_model()
        gc.collect()
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].clear_streams()

    def _receive(self, waiting: deque[Job]) -> bool:
        """Add new jobs to `waiting`; wait while there is nothing to do.

        Returns:
            False when the engine is closed and no job is left.
        """
        running = self._batch is not None and bool(self._batch.sequences)
        # None wakes this thread: a job is prepared, or the engine is to close.
        wait = not (running or self._can_begin(waiting) or self.closed)
        while True:
            try:
                # A job that takes long to prepare holds others up for a while only.
                job = self._jobs.get(wait, HOLD_SECONDS if waiting else None)
            except Empty:
                break
            wait = False
            if job is not None:
                waiting.append(job)
        return not self.closed or bool(waiting) or running

    def _can_begin(self, waiting: deque[Job]) -> bool:
        """Return whether `_begin` has something to do."""
        for job in [*waiting][:AHEAD]:
            preparation = self._preparations.get(job)
            if preparation is None or preparation.ended:
                return True
            if preparation.holds:
                break
        return False

    def _begin(self, waiting: deque[Job]) -> None:
        """Let the jobs join the batch, in their order, for which there is room."""
        for job in [*waiting][:AHEAD]:
            if self.closed:
                job.put(self._closed_error())
                self._forget(job)
            elif not self._prepare(job):
                self._forget(job)
        for job in [*waiting][:AHEAD]:
            preparation = self._preparations[job]
            if not preparation.ended:
                if preparation.holds:
                    break
                continue
            try:
                assert self._batch is not None, "a job is prepared by the model in the batch"
                if not self._batch.admit(preparation.result()):
                    break
            except BaseException as e:  # whatever it is, it belongs to the caller
                job.put(e)
            self._forget(job)

    def _prepare(self, job: Job) -> bool:
        """Begin to prepare a job, unless that was done. Returns False after an error."""
        if job in self._preparations:
            return True
        try:
            if self._batch is None:
                self._batch = self._load()
            self._preparations[job] = self._batch.prepare(job, lambda: self._jobs.put(None))
        except BaseException as e:  # whatever it is, it belongs to the caller
            job.put(e)
            return False
        return True

    def _load(self) -> Batch:
        check_threads()
        # It imports transformers, which takes a second, while the model is loaded.
        calls.start("flashmoe.chat.rendering", calls.TEMPLATES)
        # Late, and here: the error of an MLX that cannot be imported is the caller's too.
        from .generation.batch import DEFAULT_BATCH, Batch
        from .generation.loaded_model import LoadedModel

        loaded = LoadedModel(self.path, self.options)
        return Batch(loaded, self.options.batch or DEFAULT_BATCH)

    def _forget(self, job: Job) -> None:
        self._waiting.remove(job)
        self._preparations.pop(job, None)

    def _step(self, batch: Batch) -> None:
        try:
            batch.step()
        except BaseException as e:
            batch.fail(e)
            if isinstance(e, ReadError):
                # The files changed: the next request loads the model again.
                self._drop_model()

    def _drop_model(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None
            # They belong to the model: requests that wait are prepared anew by the next one.
            self._preparations.clear()


_shared: dict[tuple[Path, EngineOptions], Engine] = {}
_shared_lock = threading.Lock()


def shared(path: str | Path, options: EngineOptions | None = None, **settings: Any) -> Engine:
    """Return this process's engine for a checkpoint and options.

    It is made on first use and kept until `release`. Each engine that has answered holds a model in
    memory.

    Args:
        path, options, settings: as for `Engine`.
    """
    path = Path(path).resolve()
    options = with_settings(options or EngineOptions(), settings)
    key = (path, options)
    with _shared_lock:
        engine = _shared.get(key)
        if engine is None or engine.closed:
            engine = _shared[key] = Engine(path, options)
        return engine


def release(path: str | Path | None = None) -> None:
    """Close the shared engines of a checkpoint, or all of them, and free their memory."""
    only = None if path is None else Path(path).resolve()
    with _shared_lock:
        keys = [key for key in _shared if only is None or key[0] == only]
        engines = [_shared.pop(key) for key in keys]
    for engine in engines:
        engine.close()
