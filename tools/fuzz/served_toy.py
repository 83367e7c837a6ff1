"""Run `flashmoe serve` as a process, and ask it as a client that waits only so long."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import httpx

from .findings import Broken

START_SECONDS = 180.0


class NoAnswer(Exception):
    """Raised when an answer was not complete in time, or the connection broke."""


def ask_at(url: str, body: dict, seconds: float) -> tuple[int, bytes]:
    """Ask a server for a chat completion over a new connection; see `ServedToy.post`."""
    headers = {"content-type": "application/json"}
    with httpx.Client(verify=False) as client:
        return _post(client, url, json.dumps(body).encode(), headers, seconds)


def _post(
    client: httpx.Client, url: str, body: bytes, headers: dict[str, str], seconds: float
) -> tuple[int, bytes]:
    end = monotonic() + seconds
    parts = []
    path = url + "/v1/chat/completions"
    try:
        with client.stream("POST", path, content=body, headers=headers, timeout=seconds) as answer:
            for part in answer.iter_raw():
                parts.append(part)
                if monotonic() > end:
                    raise NoAnswer(f"more than {seconds:g} s")
            return answer.status_code, b"".join(parts)
    except httpx.TimeoutException:
        raise NoAnswer(f"more than {seconds:g} s") from None
    except httpx.HTTPError as e:
        raise NoAnswer(f"{type(e).__name__}: {e}") from None


class ServedToy:
    """A server process.

    Args:
        model: the directory that it serves.
        work: a directory for its output and caches.
        threads: how many threads compute; None for as many as usual.
    """

    def __init__(self, model: Path, work: Path, *, threads: int | None = 1):
        work.mkdir(parents=True, exist_ok=True)
        self.name = str(model)
        self._errors = work / "stderr"
        self._read = 0
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "FLASHMOE_CACHE": str(work / "cache"),
            "FLASHMOE_CONFIG": str(work / "config"),
        }
        if threads is not None:
            names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS")
            environment |= dict.fromkeys(names, str(threads))
        program = "from flashmoe.cli import cli; cli()"
        command = [sys.executable, "-c", program, "serve", str(model), "--port", "0"]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                text=True,
            )
        self.pid = self._process.pid
        # A run that is stopped leaves no processes.
        atexit.register(self.kill)
        # Without TLS no certificates need to be read, which takes longer than most answers.
        self._client = httpx.Client(verify=False, limits=httpx.Limits(max_connections=None))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            text = self._errors.read_text(errors="replace")[-2000:]
            self.kill()
            raise Broken(f"the server did not start: {text}")
        self.url = line.split()[-1].removesuffix("/v1")

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def status(self) -> int | None:
        """Return the exit status of the process, None while it runs."""
        return self._process.poll()

    def post(self, body: bytes, headers: dict[str, str], seconds: float) -> tuple[int, bytes]:
        """Ask for a chat completion; return the status and the body of the answer.

        Raises:
            NoAnswer: not complete in so many seconds, or broken off.
        """
        return _post(self._client, self.url, body, headers, seconds)

    def ask(self, body: dict, seconds: float) -> tuple[int, bytes]:
        """Do what `post` does with JSON, for the model of this server."""
        body = body | {"model": self.name} if body.get("model") == "toy" else body
        return self.post(json.dumps(body).encode(), {"content-type": "application/json"}, seconds)

    def health(self, seconds: float) -> int | None:
        """Return the status of /health, None when there was no answer in time."""
        try:
            return self._client.get(self.url + "/health", timeout=seconds).status_code
        except httpx.HTTPError:
            return None

    def new_errors(self) -> str:
        """Return what the process wrote to standard error since the last call."""
        text = self._errors.read_bytes()[self._read :]
        self._read += len(text)
        return text.decode(errors="replace")

    def facts(self) -> dict[str, int]:
        """Return memory in bytes, open files and threads; nothing where /proc is missing."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{self.pid}/fd"))
            threads = len(os.listdir(f"/proc/{self.pid}/task"))
        except OSError:
            return {}
        return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": files, "threads": threads}

    def terminate(self, seconds: float) -> int | None:
        """Send SIGTERM; return the exit status, None when it did not end in time."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process at once. May be called again."""
        atexit.unregister(self.kill)
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._client.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
