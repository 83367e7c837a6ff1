"""Feed mutated checkpoints to worker processes, and watch these for crashes, hangs and memory."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from time import monotonic

from .findings import Broken, Findings
from .toy_files import write_toys

#: Seconds that a mutant may take, and that a worker may take to start on a busy machine.
SECONDS, START_SECONDS = 20.0, 180.0
#: Bytes by which a worker may grow with one mutant.
NBYTES = 10**9
#: A worker is replaced after so many mutants, so that what it leaks does not add up.
MUTANTS = 5000


class Died(Exception):
    """Raised when a worker crashed or had to be ended; the text says why, `where` the place."""

    def __init__(self, why: str, where: str):
        super().__init__(why)
        self.where = where


class Worker:
    """A process of `checkpoint_worker`.

    Args:
        root: the directory of the toys.
        work: a directory of its own, preferably in memory.
        seed: of all mutants.
    """

    def __init__(self, root: Path, work: Path, seed: int):
        work.mkdir(parents=True, exist_ok=True)
        self._errors = work / "stderr"
        read, write = os.pipe()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "NUMBA_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "FLASHMOE_CACHE": str(root / "cache"),
            "FLASHMOE_CONFIG": str(root / "config"),
        }
        arguments = [sys.executable, "-m", "fuzz.checkpoint_worker", root, work, seed, write]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                list(map(str, arguments)),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[write],
                env=environment,
                start_new_session=True,
                text=True,
            )
        self.pid = self._process.pid
        os.close(write)
        self._replies = os.fdopen(read)
        try:
            self._reply(START_SECONDS)
        except Died as e:
            raise Broken(f"a worker did not start: {e}\n{self._tail()}") from None
        self._base = _resident(self.pid)
        self.grown = 0

    def run(self, number: int) -> dict:
        """Return the outcome of one mutant.

        Raises:
            Died: the process is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        reply = self._reply(SECONDS)
        self.grown = _resident(self.pid) - self._base
        return reply

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process. May be called again."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._replies.close()

    def _reply(self, seconds: float) -> dict:
        end = monotonic() + seconds
        before = _resident(self.pid)
        while not select.select([self._replies], [], [], 0.05)[0]:
            if monotonic() > end:
                where = self._stack()
                self.close()
                raise Died("hang", where)
            if seconds == SECONDS and _resident(self.pid) - before > NBYTES:
                # The stack tells where; a process in C code may be too busy to write it.
                with suppress(OSError):
                    self._process.send_signal(signal.SIGABRT)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                where = self._stack()
                self.close()
                raise Died("memory", where)
        line = self._replies.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> Died:
        status = self._process.wait()
        self.close()
        name = signal.Signals(-status).name if status < 0 else f"exit {status}"
        return Died(f"crash {name}", self._stack() or self._tail()[-200:])

    def _tail(self) -> str:
        return self._errors.read_bytes()[-3000:].decode(errors="replace")

    def _stack(self) -> str:
        """Return the innermost lines of a thread at work, as faulthandler wrote them last."""
        text = self._errors.read_bytes()[-100_000:].decode(errors="replace")
        threads = [
            [line.strip() for line in thread.splitlines() if '  File "' in line]
            for thread in re.split(r"(?:Current t|T)hread 0x", text)
        ]
        # A thread that waits for the next work, or for another one, is not the cause.
        idle = re.compile(r"(threading|queue)\.py\"|in (_receive|__next__|wait|work)$")
        ours = [lines for lines in threads if any("/flashmoe/" in line for line in lines)]
        busy = [lines for lines in ours if not idle.search(lines[0])]
        lines = (busy or [[]])[-1]
        inner = [line for line in lines if "/flashmoe/" in line][:1]
        return " < ".join(_shorten(line) for line in dict.fromkeys([*lines[:1], *inner]))


def _shorten(line: str) -> str:
    file, _, rest = line.removeprefix('File "').partition('", line ')
    return f"{'/'.join(Path(file).parts[-2:])}:{rest}"


def _resident(pid: int) -> int:
    """Return a process's bytes of memory, 0 where /proc is missing: then none are watched."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Run:
    """Mutants from one seed, in some workers at a time.

    Args:
        seed: of all mutants.
        jobs: the number of workers.
        findings: where outcomes are counted.
    """

    def __init__(self, seed: int, jobs: int, findings: Findings):
        memory = Path("/dev/shm")
        self._root = Path(mkdtemp(prefix="flashmoe-fuzz-", dir=memory if memory.is_dir() else None))
        self._seed, self._jobs, self.findings = seed, jobs, findings
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._over = False
        write_toys(self._root)

    def close(self) -> None:
        """End the workers, and remove the files."""
        with self._lock:
            self._over = True
            for worker in self._workers:
                worker.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def run(self, first: int, count: int | None, until: float) -> None:
        """Run mutants from number `first` on, until a count or a time (monotonic) is reached."""
        numbers = iter(range(first, sys.maxsize if count is None else first + count))
        threads = [
            threading.Thread(target=self._work, args=(job, numbers, until), daemon=True)
            for job in range(self._jobs)
        ]
        for thread in threads:
            thread.start()
        self.findings.wait(threads)

    def replay(self, number: int) -> dict:
        """Return what one mutant does in a fresh process."""
        worker = self._start(f"alone-{number}")
        try:
            return worker.run(number)
        except Died as e:
            return {"outcome": str(e), "where": e.where, "changes": self.changes(number)}
        finally:
            worker.close()

    def changes(self, number: int) -> list[str]:
        """Return what was changed in a mutant."""
        from .checkpoint_worker import make
        from .toy_files import TOYS, read_toy

        toys = {name: read_toy(self._root / name) for name in TOYS}
        mutant, original, fields = make(self._seed, number, toys)
        return [original.toy.name, *mutant.changes, *([str(fields)] if fields else [])]

    def keep(self, number: int, directory: Path) -> None:
        """Write a mutant's files into a directory."""
        from .checkpoint_worker import make
        from .toy_files import TOYS, read_toy

        toys = {name: read_toy(self._root / name) for name in TOYS}
        mutant, original, _ = make(self._seed, number, toys)
        mutant.write(directory, original)

    def _start(self, name: str) -> Worker:
        worker = Worker(self._root, self._root / name, self._seed)
        with self._lock:
            self._workers = {w for w in self._workers if w.alive} | {worker}
            if self._over:
                worker.close()
        return worker

    def _next(self, numbers: Iterator[int], until: float) -> int | None:
        with self._lock:
            over = self._over or self.findings.broken is not None or monotonic() >= until
            return None if over else next(numbers, None)

    def _work(self, job: int, numbers: Iterator[int], until: float) -> None:
        worker, done = None, 0
        try:
            while (number := self._next(numbers, until)) is not None:
                if worker is None:
                    worker, done = self._start(f"work-{job}"), 0
                try:
                    self._report(number, worker.run(number))
                    done += 1
                except Died as e:
                    worker = None
                    self._confirm(number, e)
                if worker is not None and (done >= MUTANTS or worker.grown > NBYTES):
                    if worker.grown > NBYTES:
                        what = f"{worker.grown >> 20} MB in {done} mutants up to {number}"
                        self.findings.add("leak", "", f"--seed {self._seed}", what)
                    worker.close()
                    worker = None
        except Exception as e:  # this thread's caller would not see it
            if not self._over:
                self.findings.broken = e
        finally:
            if worker is not None:
                worker.close()

    def _confirm(self, number: int, died: Died) -> None:
        again = self.replay(number)
        if again["outcome"] in ("loaded", "refused"):
            again |= {"outcome": f"{died}, not when alone", "where": died.where}
        self._report(number, again)

    def _report(self, number: int, result: dict) -> None:
        outcome = result["outcome"]
        if outcome in ("loaded", "refused"):
            self.findings.count(outcome)
            return
        changes = self.changes(number)
        self.findings.add(
            outcome,
            result.get("where", ""),
            f"checkpoints --replay {self._seed}:{number}",
            f"{'; '.join(changes)[:600]}\n    {result.get('text', '')}",
        )
