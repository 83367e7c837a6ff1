"""Run what users do with models of full size, and hold peaks and speeds to the plan.

    python benchmarks/fullsize.py --work /tmp/full --out /tmp/full/results.json

The checkpoints are those of `synth.py --like`, written where they are missing (26 GB). Each case
is a process of the program that users call, with directories of its own; it is asked for the peak
of its memory, the time to the first token, tokens per second, hit rate and bytes read. The last
line is JSON; `--table FILE` prints a file of such results as the table of docs/fullsize.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import like
from runs import CGROUPS, can_limit, nbytes

BIN = Path(sys.executable).parent
#: Name -> the checkpoint of `synth.py --like`, and the K of the pruned preset.
MODELS = {
    "qwen3.6-35b": ("qwen3.6-35b-4bit", False, 4),
    "qwen3.5-397b": ("qwen3.5-397b-4bit", True, 4),
}
MEMORIES = ("6GB", "12GB", "default")
PROMPTS = (20, 500, 4000, 16000)
TIMEOUT = 3600
SCHEMA = "name, age int"
WEATHER = (
    'def weather(city: str) -> str:\n    """Return the weather of a city."""\n    return "mild"\n'
)
AGENT = """
import json, sys
from langchain_flashmoe import ChatFlashMoE
from langchain_core.tools import tool

@tool
def weather(city: str) -> str:
    "Return the weather of a city."
    return "mild"

model, memory = sys.argv[1:3]
settings = {} if memory == "default" else {"memory": memory}
chat = ChatFlashMoE(model=model, max_tokens=40, **settings)
answer = chat.bind_tools([weather], tool_choice="any").invoke("How is the weather in Rome?")
print(json.dumps(answer.response_metadata, default=str))
"""


class Runner:
    """Runs commands with directories of their own, and keeps what they report."""

    def __init__(self, work: Path):
        self.work = work
        names = {"FLASHMOE_CONFIG": "config", "FLASHMOE_CACHE": "cache", "LLM_USER_PATH": "llm"}
        self.environment = os.environ | {key: str(work / name) for key, name in names.items()}
        self.results: list[dict[str, Any]] = []

    def record(self, case: str, model: str, memory: str, measure: Callable[[], dict]) -> None:
        """Run a case, and keep its figures or its error."""
        start, result = time.perf_counter(), {"case": case, "model": model, "memory": memory}
        try:
            result |= {"ok": True} | measure()
        except Exception as e:
            result |= {"ok": False, "error": str(e)[-400:]}
        result["seconds"] = round(time.perf_counter() - start, 1)
        budget = None if memory in ("-", "default") else nbytes(memory)
        if budget and result.get("peak"):
            result["within"] = result["peak"] <= budget
            result["ok"] &= result["within"]
        self.results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)

    def call(self, *command: str, stdin: str | None = None) -> str:
        """Return what a command prints; an exit code that is not 0 is an error."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} exits {done.returncode}: {done.stderr}")
        return done.stdout

    def llm(self, *args: str, model: str, memory: str, stdin: str | None = None) -> dict:
        """Ask `llm`, and return the figures of its last answer."""
        options = [] if memory == "default" else ["-o", "memory", memory]
        self.call(str(BIN / "llm"), *args[:1], "-m", model, *options, *args[1:], stdin=stdin)
        (entry,) = json.loads(self.call(str(BIN / "llm"), "logs", "-n", "1", "--json"))
        return figures(entry["response_json"] or {})


def figures(response: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an answer in the names of the table."""
    names = {
        "time_to_first_token": "first_token",
        "tokens_per_second": "tokens_per_second",
        "hit_rate": "hit_rate",
        "bytes_read": "bytes_read",
        "io_wait_seconds": "io_wait",
        "peak_memory": "peak",
        "experts": "k",
    }
    return {new: response[old] for old, new in names.items() if response.get(old) is not None}


def prompt(tokens: int) -> str:
    """Return a text of about so many tokens."""
    sentence = "The river runs past the old mill and turns where the road begins to climb. "
    return sentence * max(1, tokens // 16)


def ask(runner: Runner, name: str, memory: str, flash: int, quick: bool) -> Iterator[tuple]:
    """Yield the cases of one model and one budget: (case, measure)."""
    few = ("-o", "max_tokens", "8" if quick else "32")

    def llm(*args: str, **options: Any) -> Callable[[], dict]:
        return lambda: runner.llm("prompt", *args, model=name, memory=memory, **options)

    yield "K as trained", llm(*few, "Hello, who are you?")
    yield f"K={flash}", llm(*few, "-o", "experts", str(flash), "Hello, who are you?")
    yield "schema", llm(*few, "--schema", SCHEMA, "A person")
    yield "tool", llm(*few, "--functions", WEATHER, "--chain-limit", "1", "The weather in Rome?")
    for tokens in PROMPTS[: 2 if quick else None]:
        yield f"prompt of {tokens}", llm("-o", "max_tokens", "4", prompt(tokens))
    turns = "\n".join([*(f"And number {i}?" for i in range(5)), "exit", ""])

    def chat() -> dict:
        return runner.llm("chat", *few, model=name, memory=memory, stdin=turns)

    yield "chat of 5 turns", chat

    def agent() -> dict:
        last = runner.call(sys.executable, "-c", AGENT, name, memory).splitlines()[-1]
        return figures(json.loads(last))

    yield "LangChain, tool", agent
    yield "serve, 4 clients", lambda: serve(runner, name, memory, quick)
    yield "Ctrl-C", lambda: interrupt(runner, name, memory)


@contextmanager
def server(runner: Runner, name: str, memory: str, join: Path | None = None) -> Iterator[tuple]:
    """Yield the process and the address of a server."""
    options = [] if memory == "default" else ["--memory", memory]
    command = [str(BIN / "flashmoe"), "serve", name, "--port", "0", *options]

    def enter() -> None:
        if join is not None:
            (join / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(
        command,
        env=runner.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=enter,
    )
    try:
        address = None
        for line in process.stdout:
            if match := re.search(r"http://[\d.]+:\d+", line):
                address = match[0]
                break
        if address is None:
            raise RuntimeError("the server ended before it had an address")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process, address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve(runner: Runner, name: str, memory: str, quick: bool) -> dict:
    """Ask a server four things at a time, one of them with a tool that must be called."""
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    errors: list[str] = []

    def client(address: str, number: int) -> None:
        body: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": f"{number}: the weather in Rome?"}],
            "max_tokens": 8 if quick else 32,
        }
        if number == 0:
            body |= {"tools": [tool], "tool_choice": "required"}
        try:
            post(address, body)
        except Exception as e:
            errors.append(str(e))

    with server(runner, name, memory) as (process, address):
        threads = [threading.Thread(target=client, args=(address, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        peak = high_water(process.pid)
    if errors:
        raise RuntimeError("; ".join(errors))
    return {"peak": peak}


def lowered(runner: Runner, name: str, first: int, second: int) -> dict:
    """Lower the limit of a cgroup around a server that answers; return what came of it."""
    group = CGROUPS / f"flashmoe-full-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / "memory.limit_in_bytes"
        limit.write_text(str(first))
        with server(runner, name, "default", group) as (process, address):
            body = {"model": name, "messages": [{"role": "user", "content": "Tell me a story."}]}
            done: list[Any] = []

            def client() -> None:
                done.append(post(address, body | {"max_tokens": 24}))

            thread = threading.Thread(target=client)
            thread.start()
            time.sleep(20)
            before, end = resident(process.pid), time.monotonic() + 60
            while True:  # the kernel refuses a limit below what it cannot reclaim yet
                try:
                    limit.write_text(str(int(second)))
                    break
                except OSError:
                    second = int(second * 1.05)
                    if time.monotonic() > end:
                        raise
                    time.sleep(1)
            thread.join()
            if not done:
                raise RuntimeError("the answer failed after the limit was lowered")
            return {"before": before, "after": resident(process.pid), "limit": int(second)}
    finally:
        time.sleep(1)
        group.rmdir()


def interrupt(runner: Runner, name: str, memory: str) -> dict:
    """Interrupt `llm` while it imports, while it loads, and in the prompt; return the seconds."""
    options = [] if memory == "default" else ["-o", "memory", memory]
    seconds = {}
    for after in (1, 4, 20):
        command = [str(BIN / "llm"), "-m", name, *options, prompt(500)]
        process = subprocess.Popen(
            command, env=runner.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(after)
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
        seconds[f"after {after} s"] = round(time.perf_counter() - start, 2)
    return {"ends": seconds}


def post(address: str, body: dict) -> dict:
    """Send a chat request, and return the answer."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


def high_water(pid: int) -> int:
    """Return the most bytes that a process has held."""
    return _status(pid, "VmHWM")


def resident(pid: int) -> int:
    """Return the bytes that a process holds."""
    return _status(pid, "VmRSS")


def _status(pid: int, field: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.M)[1]) * 1024


def measure(args: argparse.Namespace) -> list[dict]:
    """Run all cases that were asked for."""
    runner = Runner(args.work)
    only = re.compile("|".join(args.only or [""]))
    for name in args.models:
        recipe, sparse, flash = MODELS[name]
        path = args.work / recipe
        if not path.exists():
            print(json.dumps(like.write(path, recipe, sparse=sparse)), file=sys.stderr)
        flashmoe = str(BIN / "flashmoe")
        runner.call(flashmoe, "register", str(path), "--name", name)
        for case in ("info", "doctor"):
            if only.search(case):
                command = (flashmoe, case, name, "--json")
                runner.record(case, name, "-", lambda c=command: {"bytes": len(runner.call(*c))})
        for memory in args.memory:
            options = [] if memory == "default" else ["--memory", memory]

            def plan(command: tuple = (flashmoe, "plan", name, "--json", *options)) -> dict:
                found = json.loads(runner.call(*command))
                return {
                    "planned": found["memory"]["plan"]["total"],
                    "tokens_per_second": round(found["token"]["tokens_per_second"], 2),
                    "first_token": round(found["prompt"]["seconds"], 1),
                    "hit_rate": round(found["routing"]["hit_rate"], 3),
                }

            cases = [("plan", plan), *ask(runner, name, memory, flash, args.quick)]
            if memory == "default" and can_limit():
                cases.append(
                    (
                        "limit lowered",
                        lambda name=name: lowered(runner, name, 16 * 10**9, 13 * 10**9),
                    )
                )
            for case, run in cases:
                if only.search(case):
                    runner.record(case, name, memory, run)
    return runner.results


def table(results: list[dict]) -> Iterator[str]:
    """Yield the lines of the table of docs/fullsize.md."""
    heads = "model", "memory", "case", "first token, s", "tokens/s", "hit rate, %", "GB read"
    yield f"| {' | '.join(heads)} | peak, GB | ok |"
    yield "|---|---|---|---|---|---|---|---|---|"

    def number(value: Any, unit: float = 1, digits: int = 1) -> str:
        return "" if value is None else f"{value / unit:.{digits}f}"

    for r in results:
        note = "yes" if r["ok"] else f"NO: {r.get('error', 'above the budget')[:120]}"
        if "ends" in r:
            note += f"; ends within {max(r['ends'].values())} s"
        cells = [
            *(r["model"], r["memory"], r["case"], number(r.get("first_token"))),
            *(number(r.get("tokens_per_second"), 1, 2), number(r.get("hit_rate"), 0.01, 0)),
            *(number(r.get("bytes_read"), 1e9), number(r.get("peak", r.get("planned")), 1e9, 2)),
            note.replace("|", "/").replace("\n", " "),
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/full"), help="26 GB are needed")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--memory", nargs="+", default=list(MEMORIES))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="short answers and prompts")
    parser.add_argument("--out", type=Path, help="write the results here, too")
    parser.add_argument("--table", type=Path, help="print the table of these results, and end")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_text()))))
        return
    results = measure(args)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    print("\n".join(table(results)), file=sys.stderr)
    print(json.dumps(results))
    if not all(r["ok"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
