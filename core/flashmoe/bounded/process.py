"""Start a helper process and run calls in it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from time import monotonic
from typing import Any, BinaryIO, cast

from ..errors import HelperError
from .child import read_frame, write_frame

#: The fewest clock seconds in which a helper must answer. They pass only when the machine is far
#: too busy.
CLOCK_SECONDS = 10.0
#: Seconds between two looks at the memory of a helper, where the system has no limit for it.
LOOK_SECONDS = 0.1

_PROGRAM = "from flashmoe.bounded.child import main; main()"
#: One thread for each library: more would take address space and processors, and save nothing.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


class OutOfTime(Exception):
    """Raised when a call took more processor time than it may."""


class OutOfMemory(Exception):
    """Raised when a call took more memory than it may, or broke its process."""


class HelperProcess:
    """One helper process, which runs one call at a time.

    Args:
        niceness: how far its priority is lowered.
        modules: modules that it imports at its start.

    Attributes:
        usable: whether it can take another call.

    Raises:
        HelperError: the system starts no process.
    """

    def __init__(self, niceness: int, modules: tuple[str, ...]):
        self.usable = True
        # Held during a call, so that the pipes are not closed under it.
        self._lock = threading.Lock()
        arguments = [sys.executable, "-P", "-c", _PROGRAM, str(niceness), *modules]
        environment = {**os.environ, **_ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}
        try:
            # In a session of its own: Ctrl-C in the terminal is for the parent.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=environment,
            )
        except OSError as e:
            raise HelperError(
                f"no helper process can be started ({e}): requests are checked in one; raise the "
                "limit of processes (ulimit -u), or free memory"
            ) from e
        self._requests = cast(BinaryIO, self._process.stdin)
        self._replies = cast(BinaryIO, self._process.stdout)

    def run(self, request: bytes, seconds: float, nbytes: int) -> dict[str, Any]:
        """Run a call and return the reply of `flashmoe.bounded.child`.

        Args:
            request: a pickled `Work`.
            seconds, nbytes: its limits.

        Raises:
            OutOfTime, OutOfMemory: the limit was reached; the process has ended.
            HelperError: the process could not start.
        """
        with self._lock:
            if not self.usable:
                raise self._ended()
            return self._run(request, seconds, nbytes)

    def _run(self, request: bytes, seconds: float, nbytes: int) -> dict[str, Any]:
        end = monotonic() + max(CLOCK_SECONDS, 3 * seconds)
        try:
            write_frame(self._requests, request)
        except OSError:
            raise self._ended() from None
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        look = sys.platform == "darwin"
        while not poll.poll(1000 * (LOOK_SECONDS if look else max(0.0, end - monotonic()))):
            if monotonic() >= end:
                self.kill()
                raise OutOfTime
            if look and resident_nbytes(self._process.pid) > nbytes:
                self.kill()
                raise OutOfMemory
        frame = read_frame(self._replies)
        if frame is None:
            raise self._ended()
        reply = json.loads(frame)
        if reply["last"]:
            self.kill()
        return reply

    def alive(self) -> bool:
        """Return whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process. May be called again, and from any thread."""
        self.usable = False
        self._process.kill()
        # Nobody waits for the end of the process, but it must not stay a zombie.
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        self._process.wait()
        with self._lock:
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                if pipe is not None:
                    with suppress(OSError):  # what it still held is not wanted
                        pipe.close()

    def _ended(self) -> Exception:
        """Return the error of a process that has ended by itself."""
        if not self.usable:
            return HelperError("the helper processes were closed during a request: send it again")
        self.usable = False
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return OutOfTime()
        if status < 0:
            return OutOfMemory()
        assert self._process.stderr is not None
        text = self._process.stderr.read()[-2000:].decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else f"exit status {status}"
        return HelperError(f"a helper process could not start: {last}")


def resident_nbytes(pid: int) -> int:
    """Return the bytes of memory of a process, 0 when it is gone."""
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(ps.stdout.strip() or 0) * 1024
