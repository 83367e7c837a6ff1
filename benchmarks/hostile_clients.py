"""Measure a server's latency while clients send it what costs a server without limits its life.

    python benchmarks/hostile_clients.py --clients 8 --samples 300

It serves a copy of the demo model, whose chat template loops when a message has a certain word.
Four times it measures `/health` and a normal request: on a quiet server; while the clients send
normal requests as well, each one after the other; while they send schemas with patterns of
exponential time, schemas whose validation is exponential, enums and objects that are too large,
and that word; and on a quiet server again. No two hostile requests are equal, so that no cache of
refusals hides their cost.

    health, normal  milliseconds: median, 99th percentile, maximum
    samples         how many of each; fewer normal ones where --limit ended the phase
    wrong           normal answers that differ from those of the quiet server
    answered        requests of the clients by kind and status; "none": no answer in time
    rss             bytes of the server's memory after each of the four

Clients are processes on the same cores. The last line is JSON; the exit status is 1 if a normal
request was not answered, or wrongly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from fuzz.served_toy import NoAnswer, ServedToy, ask_at  # noqa: E402

from flashmoe.catalog import DEMO, find  # noqa: E402
from fuzz import hostile_requests  # noqa: E402

ATTACKS = {
    "pattern": hostile_requests.slow_pattern,
    "references": hostile_requests.doubled_references,
    "enum": hostile_requests.large_enum,
    "properties": hostile_requests.many_properties,
    "template": hostile_requests.costly_template,
}
EXPLODES = (
    "{%- if 'explode' in messages[-1].content %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif -%}"
)
SHARED = {"normal": lambda number: NORMAL}
PHASES = ("quiet", "shared", "attacked", "afterwards")
NORMAL = hostile_requests.ask("What is bread?", max_tokens=8)
#: Seconds after which a hostile or a normal request counts as not answered.
PATIENCE = 120.0


def send(what: str, url: str, model: str, client: int, clients: int, counts, over) -> None:
    """Send requests, one after the other, until `over` is set or the benchmark was killed."""
    makers = {"shared": SHARED, "attacked": ATTACKS}[what]
    number = client
    parent = multiprocessing.parent_process()
    while not over.is_set() and parent is not None and parent.is_alive():
        kind = list(makers)[number % len(makers)]
        try:
            status, _ = ask_at(url, makers[kind](number) | {"model": model}, PATIENCE)
        except NoAnswer:
            status = None
        counts.put(f"{kind} {'none' if status is None else status}")
        number += clients


def measure(server: ServedToy, args: argparse.Namespace, right: str) -> dict:
    """Return the latencies of /health and of normal requests."""
    health: list[float] = []
    enough = threading.Event()

    def ask_health() -> None:
        while len(health) < args.samples or not enough.is_set():
            start = time.perf_counter()
            if server.health(PATIENCE) is None:
                health.append(PATIENCE)
            else:
                health.append(time.perf_counter() - start)
            time.sleep(0.05)

    thread = threading.Thread(target=ask_health)
    thread.start()
    normal, wrong = [], 0
    end = time.monotonic() + args.limit
    while len(normal) < args.samples and (time.monotonic() < end or len(normal) < 2):
        start = time.perf_counter()
        try:
            answer = content(*server.ask(NORMAL, PATIENCE))
        except NoAnswer as e:
            answer = str(e)
        normal.append(time.perf_counter() - start)
        wrong += answer != right
    enough.set()
    thread.join()
    report = {
        "health": summary(health),
        "normal": summary(normal),
        "samples": [len(health), len(normal)],
        "wrong": wrong,
        "rss": server.facts().get("rss"),
    }
    print(report, file=sys.stderr)
    return report


def content(status: int, body: bytes) -> str:
    """Return what a normal answer says, or its status."""
    if status != 200:
        return f"status {status}: {body[:200]!r}"
    return json.dumps(json.loads(body)["choices"])


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum, in milliseconds."""
    values = {
        "p50": median(seconds),
        "p99": quantiles(seconds, n=100, method="inclusive")[98],
        "most": max(seconds),
    }
    return {name: round(1000 * value, 1) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--samples", type=int, default=300, help="of each kind in each phase")
    parser.add_argument("--limit", type=float, default=300, help="seconds of each phase")
    args = parser.parse_args()
    # The server is ended, however the benchmark is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(shutil.copytree(find(DEMO), Path(directory) / "model"))
        template = model / "chat_template.jinja"
        template.write_text(EXPLODES + template.read_text())
        server = ServedToy(model, Path(directory) / "work", threads=None)
        try:
            report = run(server, args)
            report["exit"] = server.terminate(10)
        finally:
            server.kill()
    print(f"{'':<12}{'/health, ms':>28}{'normal request, ms':>32}{'wrong':>8}")
    print(f"{'':<12}{'p50':>10}{'p99':>9}{'most':>9}{'p50':>14}{'p99':>9}{'most':>9}")
    for phase in PHASES:
        row = report[phase]
        numbers = [*row["health"].values(), *row["normal"].values()]
        wide = zip(numbers, (10, 9, 9, 14, 9, 9), strict=True)
        print(f"{phase:<12}" + "".join(f"{n:>{w}.1f}" for n, w in wide) + f"{row['wrong']:>8}")
    print(json.dumps(report))
    raise SystemExit(any(report[p]["wrong"] for p in PHASES))


def run(server: ServedToy, args: argparse.Namespace) -> dict:
    """Measure the four phases."""
    right = [content(*server.ask(NORMAL, PATIENCE)) for _ in range(3)][-1]
    report: dict = {"clients": args.clients}
    report["quiet"] = measure(server, args, right)
    report["shared"] = beside("shared", server, args, right)
    report["attacked"] = beside("attacked", server, args, right)
    report["afterwards"] = measure(server, args, right)
    return report


def beside(what: str, server: ServedToy, args: argparse.Namespace, right: str) -> dict:
    """Measure while clients send requests; add what was answered to them."""
    context = multiprocessing.get_context("spawn")
    counts, over = context.Queue(), context.Event()
    clients = [
        context.Process(
            target=send,
            args=(what, server.url, server.name, i, args.clients, counts, over),
            daemon=True,
        )
        for i in range(args.clients)
    ]
    for client in clients:
        client.start()
    # The first requests are on their way.
    time.sleep(5)
    report = measure(server, args, right)
    over.set()
    answered: Counter[str] = Counter()
    # A process ends only when what it put into the queue was taken out.
    while any(client.is_alive() for client in clients) or not counts.empty():
        while not counts.empty():
            answered[counts.get()] += 1
        time.sleep(0.1)
    return report | {"answered": dict(sorted(answered.items()))}


if __name__ == "__main__":
    main()
