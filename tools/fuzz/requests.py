"""Send mutated requests to servers of a toy, and check what they answer and how they go on."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from time import monotonic, sleep

from . import request_mutations
from .findings import Findings
from .hostile_requests import ask, by_schema
from .served_toy import NoAnswer, ServedToy
from .toy_files import TOYS, write_toys

#: Seconds that a request may take; that /health may take on a busy machine; and from SIGTERM to the
#: end of the process.
SECONDS, HEALTH_SECONDS, END_SECONDS = 20.0, 5.0, 5.0
#: How much more a server may have at its end than at its start.
GROWTH = {"rss": 400_000_000, "files": 20, "threads": 20}
LONGEST = 2000
#: Statuses that docs/serve.md names.
DOCUMENTED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431, 503}
DOG = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
NORMAL = [
    ask("What is bread?", max_tokens=6),
    ask("A number.", max_tokens=6, temperature=0.8, seed=5),
    by_schema(DOG, max_tokens=30),
]


class _Client:
    """One server, and what sends it one hostile request after the other."""

    def __init__(self, model: Path, work: Path, seed: int, findings: Findings):
        self._model, self._work, self._seed, self.findings = model, work, seed, findings
        self._server: ServedToy | None = None
        self._right: list[str] = []
        self._before: dict[str, int] = {}
        self._number = 0
        self._slowest = 0.0
        self._errors = ""
        self._stopped = False

    def run(self, number: int) -> str:
        """Send the request of a number; return what came of it."""
        server = self._ready()
        self._number = number
        request = request_mutations.make(self._seed, number)
        normal: list[str] = []
        beside = threading.Thread(target=lambda: normal.append(self._normal(server, number)))
        if number % 4 == 0:
            beside.start()
        body = request.body.replace(b'"model": "toy"', f'"model": "{self._model}"'.encode(), 1)
        watch = threading.Event()
        watcher = threading.Thread(target=self._watch_health, args=(server, watch))
        watcher.start()
        try:
            outcome = _judge(*server.post(body, request.headers, SECONDS))
        except NoAnswer as e:
            outcome = f"no answer: {e}"
        finally:
            watch.set()
            watcher.join()
        if beside.ident is not None:
            beside.join()
            if normal[0] and outcome.startswith("status"):
                outcome = f"beside it: {normal[0]}"
        if not server.alive:
            outcome = f"crash {server.status()}"
        elif after := self._normal(server, number):
            outcome = f"{outcome}; afterwards: {after}" if _bad(outcome) else f"afterwards: {after}"
        errors = server.new_errors()
        if "Traceback (most recent" in errors and not _bad(outcome):
            outcome = f"traceback of the server: {errors.strip().splitlines()[-1][:100]}"
        if self._slowest > HEALTH_SECONDS and not _bad(outcome):
            outcome = f"/health took {self._slowest:.0f} s"
        self._slowest = 0.0
        if not server.alive or "afterwards" in outcome or "no answer" in outcome:
            if outcome.startswith("no answer") and server.alive:
                outcome += f"; /health {server.health(HEALTH_SECONDS)}"
            server.kill()
            self._server = None
        self._errors = errors
        return outcome

    def work(self, numbers: Iterator[int]) -> None:
        """Send the requests of all numbers and report."""
        try:
            self._send_all(numbers)
        except Exception as e:  # this thread's caller would not see it
            if not self._stopped:
                self.findings.broken = e
        self.close()

    def stop(self) -> None:
        """End the server at once, whatever is under way."""
        self._stopped = True
        if (server := self._server) is not None:
            server.kill()

    def _send_all(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            outcome = self.run(number)
            if self._stopped:
                return
            if _bad(outcome):
                changes = request_mutations.make(self._seed, number)
                text = changes.body[:300].decode(errors="replace")
                kind = re.sub(r"\d\d+", "N", outcome)
                what = f"{'; '.join(changes.changes)[:300]}\n    {text}\n    {outcome}"
                replay = f"requests --replay {self._seed}:{number}"
                if outcome.startswith("undocumented status 5"):
                    kind = f"{outcome[:23]}: {_raised(self._errors)}"
                what += f"\n    {self._errors[-300:].strip()}"
                self.findings.add(kind[:160], "", replay, what)
            else:
                self.findings.count(outcome)

    def close(self) -> None:
        """End the server as an operator would, and look what it leaves."""
        if self._server is None:
            return
        server, self._server = self._server, None
        replay = f"requests={self._number + 1} --seed {self._seed}"
        # What connections held is given back soon after them.
        end = monotonic() + 10
        while (grown := self._grown(server)) and monotonic() < end:
            sleep(0.5)
        for name, (before, after) in grown.items():
            self.findings.add(f"{name} grew", "", replay, f"from {before} to {after}")
        status = server.terminate(END_SECONDS)
        if status != 0:
            what = f"exit status {status} within {END_SECONDS:g} s"
            self.findings.add("SIGTERM", str(status), replay, what)
        server.kill()

    def _grown(self, server: ServedToy) -> dict[str, tuple[int, int]]:
        after = server.facts()
        return {
            name: (self._before[name], after[name])
            for name in after
            if after[name] > self._before[name] + GROWTH[name]
        }

    def _ready(self) -> ServedToy:
        if self._server is None:
            self._server = ServedToy(self._model, self._work)
            answers = [_content(*self._server.ask(body, 120)) for body in NORMAL]
            self._right = self._right or answers
            self._before = self._server.facts()
        return self._server

    def _normal(self, server: ServedToy, number: int) -> str:
        """Return what is wrong with the answer to a normal request, or nothing."""
        at = number % len(NORMAL)
        try:
            content = _content(*server.ask(NORMAL[at], SECONDS))
        except NoAnswer as e:
            return f"no answer: {e}"
        return "" if content == self._right[at] else f"wrong answer {content[:100]}"

    def _watch_health(self, server: ServedToy, over: threading.Event) -> None:
        while not over.wait(0.2):
            start = monotonic()
            status = server.health(SECONDS)
            self._slowest = max(self._slowest, monotonic() - start)
            if status != 200:
                self._slowest = SECONDS


def _raised(errors: str) -> str:
    """Return the line that names the last exception in a log."""
    lines = [line for line in errors.splitlines() if re.match(r"[\w.]+: ", line)]
    return re.sub(r"\d\d+", "N", lines[-1]) if lines else ""


def _content(status: int, body: bytes) -> str:
    if status != 200:
        return f"status {status}: {body[:200]!r}"
    choice = json.loads(body)["choices"][0]
    return json.dumps([choice["message"], choice["finish_reason"]])


def _bad(outcome: str) -> bool:
    return re.fullmatch(r"status \d+( \w+)?", outcome) is None


def _judge(status: int, body: bytes) -> str:
    """Return "status N" for an answer as it should be, otherwise what is wrong with it."""
    if status not in DOCUMENTED:
        return f"undocumented status {status}: {body[:200]!r}"
    if status == 431:
        return "status 431"
    text = body.decode(errors="replace")
    try:
        if status == 200 and text.startswith((": ", "data: ")):
            return _judge_stream(text)
        value = json.loads(text)
        if status == 200:
            return "status 200" if value["choices"][0]["finish_reason"] else "no finish_reason"
        return _judge_error(status, value)
    except (ValueError, KeyError, TypeError, IndexError) as e:
        return f"status {status} with a broken body: {type(e).__name__} {body[:100]!r}"


def _judge_stream(text: str) -> str:
    events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    if events[-1] == "[DONE]":
        return "status 200 streamed"
    value = json.loads(events[-1])
    code = value["error"]["code"]
    if code == "model_failed":
        return f"stream ends with model_failed: {value['error']['message'][:100]}"
    return _judge_error(200, value).replace("status 200", f"status 200 {code}")


def _judge_error(status: int, value: dict) -> str:
    message = value["error"]["message"]
    if not isinstance(message, str) or not message:
        return f"status {status} without a message"
    if len(message) > LONGEST:
        return f"status {status} with {len(message)} characters"
    if "Traceback" in message or "<class '" in message:
        return f"status {status} with internals: {message[:100]}"
    return f"status {status}"


class Run:
    """Requests from one seed, to some servers at a time.

    Args:
        seed: of all requests.
        jobs: the number of servers.
        findings: where outcomes are counted.
    """

    def __init__(self, seed: int, jobs: int, findings: Findings):
        memory = Path("/dev/shm")
        self._root = Path(mkdtemp(prefix="flashmoe-fuzz-", dir=memory if memory.is_dir() else None))
        self._seed, self._jobs, self.findings = seed, jobs, findings
        self._lock = threading.Lock()
        self._clients: list[_Client] = []
        self._over = False
        write_toys(self._root, {"toy": TOYS["qwen3_5"] | {"max_position_embeddings": 1024}})

    def close(self) -> None:
        """End the servers, and remove the files."""
        self._over = True
        for client in self._clients:
            client.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def run(self, first: int, count: int | None, until: float) -> None:
        """Send requests from number `first` on, until a count or a time (monotonic) is reached."""
        numbers = iter(range(first, sys.maxsize if count is None else first + count))
        self._clients = [self._client(job) for job in range(self._jobs)]
        threads = [
            threading.Thread(target=client.work, args=[self._until(numbers, until)], daemon=True)
            for client in self._clients
        ]
        for thread in threads:
            thread.start()
        self.findings.wait(threads)

    def replay(self, number: int) -> dict:
        """Return what one request does to a fresh server."""
        client = self._client(number)
        start = monotonic()
        outcome = client.run(number)
        seconds = monotonic() - start
        client.close()
        return {"outcome": outcome, "seconds": round(seconds, 2)} | self.findings.kinds

    def changes(self, number: int) -> list[str]:
        """Return what was changed in a request."""
        return request_mutations.make(self._seed, number).changes

    def keep(self, number: int, directory: Path) -> None:
        """Write the body of a request into a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "body.json").write_bytes(request_mutations.make(self._seed, number).body)

    def _client(self, number: int) -> _Client:
        return _Client(
            self._root / "toy", self._root / f"server-{number}", self._seed, self.findings
        )

    def _until(self, numbers: Iterator[int], until: float) -> Iterator[int]:
        while monotonic() < until and self.findings.broken is None and not self._over:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number
