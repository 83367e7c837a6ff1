"""Load `flashmoe serve` with many clients, some of which give up or send garbage.

    python benchmarks/serve.py flashmoe-demo --clients 32 --seconds 300

It starts the server as a process, and requests a set of answers at temperature 0, one by one:
texts, tool calls, JSON by a schema. Then each client sends these requests in random order, streamed
or not, and the answers must be the same. One request in ten is cut off in the middle of its answer;
one in ten is garbage, which must be refused with the status that belongs to it.

    wrong          answers that differ from those to single requests, during the load or after it
    unexpected     wrong statuses: 5xx, good requests that were refused, garbage that was accepted
    hung           requests that were not complete after --bound seconds
    latency        seconds of whole answers: median, 95th percentile, maximum
    tokens_per_second   of all whole answers together; answers that were cut off do not count
    rss            bytes of the server's memory, after each fifth of the time and at the end
    files          open files of the server, at the same times
    left           requests that are left when all clients are done: in flight, answered, waiting

The clients run in this process, on the same cores. The last line is JSON; the exit status is 1 if
anything was wrong, unexpected, hung or left.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles

import httpx

THINGS = ("rain", "bread", "a cat", "the sea", "a train", "snow", "a garden", "a song", "gold")
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
DOG = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def ask(text: str, **fields) -> dict:
    """Return the body of a request with one message."""
    fields = {"max_tokens": 30, "temperature": 0} | fields
    return {"model": "MODEL", "messages": [{"role": "user", "content": text}]} | fields


def questions() -> list[dict]:
    """Return the requests whose answers are compared."""
    wanted = {"type": "json_schema", "json_schema": {"name": "dog", "schema": DOG}}
    requests = [ask(f"What is {t}?", max_tokens=8 + 4 * i) for i, t in enumerate(THINGS)]
    requests += [ask(f"Tell me about {t}. " * 20, max_tokens=12) for t in THINGS[:4]]
    requests += [ask(f"What is {i} plus 25?", tools=[ADD], max_tokens=50) for i in (3, 17)]
    requests += [ask(f"A dog in {t}.", response_format=wanted, max_tokens=60) for t in THINGS[:3]]
    requests += [ask("What is 3 plus 4?", think=True, thinking_budget=10)]
    return requests


JSON = {"content-type": "application/json"}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": 3}}
#: Invalid requests, and the status of each; None: not HTTP, or cut off, so any end is right.
GARBAGE = [
    (400, {"content": b"{", "headers": JSON}),
    (400, {"content": bytes(range(256)), "headers": JSON}),
    (400, {"content": b"[" * 50_000, "headers": JSON}),
    (400, {"json": {"messages": 3}}),
    (400, {"json": ask("x", temperature="hot")}),
    (400, {"json": ask("x", n=3)}),
    (400, {"json": ask("x", tools=[{"type": "function", "function": {"name": "a b"}}])}),
    (400, {"json": ask("x", tool_choice="required")}),
    (400, {"json": ask("word " * 20_000)}),
    (400, {"json": ask("x", response_format={"type": "lark", "grammar": "start: ((("})}),
    (400, {"json": ask("x", response_format=NO_SCHEMA)}),
    (404, {"json": ask("x") | {"model": "another"}}),
    (413, {"content": b" " * 9_000_000, "headers": JSON}),
    (415, {"data": {"model": "x"}}),
    (403, {"json": ask("x"), "headers": {"origin": "https://evil.example"}}),
    (403, {"json": ask("x"), "headers": {"host": "evil.example"}}),
    (None, b"\x16\x03\x01\x02\x00\x01\x00\x01"),
    (None, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
     b"application/json\r\nContent-Length: 1000\r\n\r\n{"),
]  # fmt: skip


class Load:
    """The requests of the clients, and counts of what came back."""

    def __init__(self, url: str, name: str, bound: float):
        self.url = url
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.tokens = 0
        self.unexpected: Counter[str] = Counter()
        self._name = name
        self._bound = bound
        self._expected: dict[str, tuple] = {}

    def body(self, fields: dict, **more) -> dict:
        """Return a request with more fields, and with the model of this run."""
        return fields | more | ({"model": self._name} if fields["model"] == "MODEL" else {})

    async def learn(self, client: httpx.AsyncClient) -> None:
        """Record the answers to single requests; answers to a second request must be the same."""
        for fields in questions():
            self._expected.setdefault(json.dumps(fields), await self._whole(client, fields))
            await self._compare(client, fields, stream=False)

    async def client(self, until: float, seed: int) -> None:
        """Send random requests, one after the other, until a time of `time.monotonic`."""
        rng = random.Random(seed)
        async with httpx.AsyncClient(timeout=None) as client:
            while time.monotonic() < until:
                try:
                    await asyncio.wait_for(self._one(client, rng), self._bound)
                except TimeoutError:
                    self.counts["hung"] += 1
                except httpx.HTTPError as e:
                    self.unexpected[type(e).__name__] += 1

    async def _one(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.1:
            await self._garbage(client, *rng.choice(GARBAGE))
        elif kind < 0.2:
            await self._cut(client, rng)
        else:
            start = time.monotonic()
            await self._compare(client, rng.choice(questions()), stream=rng.random() < 0.5)
            self.seconds.append(time.monotonic() - start)

    async def _compare(self, client: httpx.AsyncClient, fields: dict, *, stream: bool) -> None:
        answer = await (self._streamed if stream else self._whole)(client, fields)
        if answer is None:
            return
        self.counts["answers"] += 1
        self.tokens += answer[-1]
        if answer != self._expected[json.dumps(fields)]:
            self.counts["wrong"] += 1
            print("wrong:", fields, answer, self._expected[json.dumps(fields)], file=sys.stderr)

    async def _whole(self, client: httpx.AsyncClient, fields: dict) -> tuple | None:
        answer = await client.post(self.url, json=self.body(fields))
        if answer.status_code != 200:
            self.unexpected[str(answer.status_code)] += 1
            return None
        content = answer.json()
        choice = content["choices"][0]
        message = choice["message"]
        calls = [c["function"] for c in message.get("tool_calls", ())]
        said = message["content"] or "", message.get("reasoning_content", "")
        calls = [(c["name"], c["arguments"]) for c in calls]
        return (*said, calls, choice["finish_reason"], content["usage"]["completion_tokens"])

    async def _streamed(self, client: httpx.AsyncClient, fields: dict) -> tuple | None:
        text, reasoning, reason, tokens = "", "", None, 0
        calls: list[list[str]] = []
        body = self.body(fields, stream=True, stream_options={"include_usage": True})
        async with client.stream("POST", self.url, json=body) as answer:
            if answer.status_code != 200:
                self.unexpected[str(answer.status_code)] += 1
                return None
            done = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or (done := line == "data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.unexpected["event of an error"] += 1
                    return None
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    text += delta.get("content") or ""
                    reasoning += delta.get("reasoning_content") or ""
                    for call in delta.get("tool_calls", ()):
                        if "name" in call["function"]:
                            calls.append([call["function"]["name"], ""])
                        calls[call["index"]][1] += call["function"]["arguments"]
                    reason = choice["finish_reason"] or reason
            if not done:
                self.unexpected["stream without its end"] += 1
        return text, reasoning, [tuple(call) for call in calls], reason, tokens

    async def _cut(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        self.counts["cut"] += 1
        fields = self.body(rng.choice(questions()), max_tokens=500)
        if rng.random() < 0.5:
            lines = rng.randrange(20)
            async with client.stream("POST", self.url, json=fields | {"stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    if (lines := lines - 1) < 0:
                        break
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.post(self.url, json=fields), rng.uniform(0.01, 3))

    async def _garbage(self, client: httpx.AsyncClient, status: int | None, request) -> None:
        self.counts["garbage"] += 1
        if status is None:
            host, port = httpx.URL(self.url).host, httpx.URL(self.url).port
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request)
            writer.write_eof()
            await reader.read()
            writer.close()
            return
        if "json" in request and request["json"].get("model") == "MODEL":
            request = request | {"json": self.body(request["json"])}
        answer = await client.post(self.url, **request)
        if answer.status_code != status:
            self.unexpected[f"{answer.status_code} for {status}"] += 1
        elif not answer.json()["error"]["message"]:
            self.unexpected["error without a message"] += 1


def gauges(url: str) -> dict[str, int]:
    """Return how many requests are left, by the server's own counts."""
    lines = httpx.get(url, timeout=30).text.splitlines()
    values = dict(line.split(" ") for line in lines if line[0] != "#" and "{" not in line)
    names = ("requests_in_flight", "rows", "waiting")
    return {name: int(values[f"flashmoe_{name}"]) for name in names}


def process_facts(pid: int) -> dict[str, int]:
    """Return the memory and the open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": files}


async def load(args: argparse.Namespace, url: str, pid: int) -> dict:
    """Run the clients, and return the figures."""
    run = Load(url + "/chat/completions", args.model, args.bound)
    metrics = url.removesuffix("/v1") + "/metrics"
    async with httpx.AsyncClient(timeout=args.bound) as client:
        await run.learn(client)
        run.counts.clear()
        run.tokens = 0
        start = time.monotonic()
        until = start + args.seconds
        clients = [asyncio.create_task(run.client(until, i)) for i in range(args.clients)]
        facts = []
        for _ in range(5):
            await asyncio.sleep(args.seconds / 5)
            facts.append(process_facts(pid))
        await asyncio.gather(*clients)
        seconds = time.monotonic() - start
        tokens = run.tokens
        end = time.monotonic() + 10
        while any((left := gauges(metrics)).values()) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        facts.append(process_facts(pid))
        # After the load, answers must still be the same.
        for fields in questions():
            await run._compare(client, fields, stream=True)
    cuts = quantiles(run.seconds, n=20)
    latency = {"median": median(run.seconds), "p95": cuts[18], "most": max(run.seconds)}
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        **{name: run.counts[name] for name in ("answers", "cut", "garbage", "wrong", "hung")},
        "unexpected": dict(run.unexpected),
        "latency": {name: round(value, 2) for name, value in latency.items()},
        "tokens_per_second": round(tokens / seconds, 1),
        "rss": [f["rss"] for f in facts],
        "files": [f["files"] for f in facts],
        "left": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="flashmoe-demo")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--bound", type=float, default=120)
    parser.add_argument("--memory", help="memory budget of the server")
    args = parser.parse_args()
    command = [str(Path(sys.executable).parent / "flashmoe"), "serve", args.model, "--port", "0"]
    command += ["--memory", args.memory] if args.memory else []
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"FLASHMOE_CACHE": cache}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        try:
            line = server.stdout.readline()
            if not line:
                raise SystemExit("The server did not start: see its message above.")
            report = asyncio.run(load(args, line.split()[-1], server.pid))
            server.send_signal(signal.SIGINT)
            report["exit"] = server.wait(30)
        finally:
            server.kill()
    print(json.dumps(report))
    bad = report["wrong"] or report["hung"] or report["unexpected"] or any(report["left"].values())
    raise SystemExit(1 if bad or report["exit"] else 0)


if __name__ == "__main__":
    main()
