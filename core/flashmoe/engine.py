"""The engine: one thread that owns MLX. Requests go in, events come out.

MLX arrays, streams and seeds belong to the thread that made them. So one thread loads the model,
generates, and ends its own streams; callers on any thread, or in asyncio, only pass messages.
Requests are answered in the order in which they came. Closing the iterator of an answer cancels
it: the thread looks before each token, and between the chunks of a prompt.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from .errors import Cancelled, ReadError
from .events import Event, Request, check_request


@dataclass(frozen=True)
class Job:
    request: Request
    put: Callable[[Event | BaseException | None], None]
    cancelled: threading.Event


class Engine:
    """One loaded checkpoint and its thread. Nothing is loaded before the first request.

    Args:
        path: the checkpoint directory.
        memory, experts, slots, depth: as in `flashmoe.load`.
    """

    def __init__(self, path: str | Path, **settings):
        self.path = Path(path)
        self.settings = settings
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._running: Job | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="flashmoe-engine", daemon=True)
        self._thread.start()
        # A thread that ends with live MLX streams aborts the process at exit.
        atexit.register(self.close)

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of an answer. Closing the iterator cancels it.

        Raises:
            FlashMoEError: it cannot be loaded or generated; the text is for the user.
        """
        events: SimpleQueue = SimpleQueue()
        job = self._submit(request, events.put)
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            job.cancelled.set()

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        """`stream` for asyncio: cancelling the task or closing the iterator cancels the answer."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue = asyncio.Queue()

        def put(event):
            # The loop may have been closed while the thread was still at work.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._submit(request, put)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            job.cancelled.set()

    def close(self) -> None:
        """Cancel what is in flight, free the model, and end the thread. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
            running = self._running
        if running is not None:
            running.cancelled.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _submit(self, request: Request, put) -> Job:
        check_request(request)
        job = Job(request, put, threading.Event())
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the engine of {self.path} is closed")
            self._jobs.put(job)
        return job

    def _run(self) -> None:
        session = None
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if self._closed:
                    job.cancelled.set()
                self._running = job
            try:
                if not job.cancelled.is_set():
                    if session is None:
                        # Late, and here: an MLX that cannot be imported is an answer too.
                        from .session import Session

                        session = Session(self.path, **self.settings)
                    for event in session.generate(job.request, job.cancelled):
                        job.put(event)
                job.put(self._ended())
            except Cancelled:
                job.put(self._ended())
            except BaseException as e:  # whatever it is, it belongs to the caller
                if isinstance(e, ReadError) and session is not None:
                    # The files changed: the next request loads the model anew.
                    session.close()
                    session = None
                job.put(e)
            with self._lock:
                self._running = None
            del job
        if session is not None:
            session.close()
        del session
        gc.collect()
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].clear_streams()

    def _ended(self) -> RuntimeError | None:
        """What ends the events of a job: None, or an error when `close` cut it short."""
        return RuntimeError(f"the engine of {self.path} was closed") if self._closed else None


_shared: dict[Path, Engine] = {}
_shared_lock = threading.Lock()


def shared(path: str | Path, **settings) -> Engine:
    """The engine of this process for a checkpoint; made on first use.

    With other settings than before, the old one is closed first: two would not fit.
    """
    path = Path(path).resolve()
    with _shared_lock:
        engine = _shared.get(path)
        if engine is not None and (engine._closed or engine.settings != settings):
            engine.close()
            engine = None
        if engine is None:
            engine = _shared[path] = Engine(path, **settings)
        return engine


def release() -> None:
    """Close the shared engines and free their memory."""
    with _shared_lock:
        for engine in _shared.values():
            engine.close()
        _shared.clear()
