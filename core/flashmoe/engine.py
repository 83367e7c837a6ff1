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
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from .events import Event, Request


class Cancelled(Exception):
    """Raised inside the thread to leave a request that nobody waits for any more."""


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
            if not loop.is_closed():
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
        job = Job(request, put, threading.Event())
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the engine of {self.path} is closed")
            self._jobs.put(job)
        return job

    def _run(self) -> None:
        import mlx.core as mx

        session = None
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if self._closed:
                    job.cancelled.set()
                self._running = job
            try:
                if not job.cancelled.is_set():
                    if session is None:
                        from .session import Session

                        session = Session(self.path, **self.settings)
                    for event in session.generate(job.request, job.cancelled):
                        job.put(event)
                job.put(None)
            except Cancelled:
                job.put(None)
            except BaseException as e:  # whatever it is, it belongs to the caller
                job.put(e)
            finally:
                with self._lock:
                    self._running = None
            del job
        if session is not None:
            session.close()
        del session
        gc.collect()
        mx.clear_streams()


_shared: dict[tuple, Engine] = {}
_shared_lock = threading.Lock()


def shared(path: str | Path, **settings) -> Engine:
    """The engine of this process for a checkpoint and its settings; made on first use."""
    key = (Path(path).resolve(), tuple(sorted(settings.items())))
    with _shared_lock:
        engine = _shared.get(key)
        if engine is None or engine._closed:
            engine = _shared[key] = Engine(path, **settings)
        return engine


def release() -> None:
    """Close the shared engines and free their memory."""
    with _shared_lock:
        for engine in _shared.values():
            engine.close()
        _shared.clear()
