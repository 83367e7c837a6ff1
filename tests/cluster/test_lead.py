"""Test that a cluster gives the answers of one machine, or an error when a process is lost."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toys import write_chat_toy, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.cluster import collectives as exchange
from flashmoe.cluster.placement import owners
from flashmoe.engine import Engine
from flashmoe.events import Text
from flashmoe.models.loading import load_streaming
from flashmoe.requests import Request

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent

LEAD = """
import json, sys, time
from flashmoe.engine import Engine
from flashmoe.errors import FlashMoEError
from flashmoe.events import End, Text
from flashmoe.requests import Request
path, shares, requests, pause = sys.argv[1:]
with Engine(path, cluster=shares, prompt_store=0, slots=6) as engine:
    answers = [engine.stream(Request(**r)) for r in json.loads(requests)]
    for answer in answers:
        try:
            for event in answer:
                print(json.dumps(["text", event.text] if isinstance(event, Text) else
                    ["end", event.figures()] if isinstance(event, End) else ["other"]), flush=True)
        except FlashMoEError as e:
            print(json.dumps(["error", type(e).__name__, str(e)]), flush=True)
    time.sleep(float(pause))
"""
WORKER = """
import sys
from flashmoe.cli import cli
cli(sys.argv[1:])
"""
#: Processes that wait in a collective keep a core busy, so on a busy machine others may be silent
#: for seconds without being lost.
PATIENCE = """
from flashmoe.cluster import connections
connections.SILENCE, connections.JOIN = {silence}, 600.0
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12, top_k=4)


def ask(text: str, **options) -> dict:
    options = {"max_tokens": 6, "temperature": 0.0} | options
    return {"messages": [{"role": "user", "content": text}], **options}


REQUESTS = [ask("One."), ask("Tell me about cats. " * 12, max_tokens=3), ask("Two.", experts=4)]


def alone(path, requests) -> list[str]:
    with Engine(path, slots=12, prompt_store=0) as engine:
        answers = [engine.stream(Request(**a)) for a in requests]
        return ["".join(e.text for e in events if isinstance(e, Text)) for events in answers]


class Cluster:
    """The processes of a cluster on this machine, started as mlx.launch starts them.

    Args:
        count: how many processes, the lead included.
        pause: seconds for which the lead waits after its last answer.
        others: checkpoints of the workers. By default they have the lead's.
        slots: slots of each worker.
        rings: for each process, the addresses of all. By default free ports of the loopback.
        inside: a command that runs another command in the workers' network.
        silence: seconds after which a process that sends nothing is lost.
    """

    def __init__(
        self,
        tmp_path,
        path,
        shares,
        requests,
        count=2,
        *,
        pause=0,
        others=(),
        slots="6",
        rings=None,
        inside=(),
        silence=120.0,
    ):
        patience = PATIENCE.format(silence=silence)
        free = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ring = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in free]
        for server in free:
            server.close()
        self.processes = []
        for rank in range(count):
            command = [
                sys.executable,
                "-c",
                patience + LEAD,
                str(path),
                shares,
                json.dumps(requests),
                str(pause),
            ]
            if rank:
                where = str(others[rank - 1] if others else path)
                command = [
                    *inside,
                    sys.executable,
                    "-c",
                    patience + WORKER,
                    "run",
                    where,
                    "x",
                    "--slots",
                    slots,
                ]
                command += ["--cluster", shares]
            file = tmp_path / f"ring{rank}.json"
            file.write_text(json.dumps(rings[rank] if rings else ring))
            process = subprocess.Popen(
                command,
                env=os.environ | {"MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)

    def finish(self, timeout=900) -> list[tuple[int, str, str]]:
        """Return (exit code, output, errors) of each process."""
        results = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            results.append((process.returncode, out, err))
        return results

    def kill(self):
        for process in self.processes:
            process.kill()

    def line(self, rank=0) -> list:
        """Read the next event that a process prints."""
        return json.loads(self.processes[rank].stdout.readline())


def texts(out: str) -> list[str | list]:
    """Return the text of each answer, or the class and text of its error."""
    answers, text = [], ""
    for kind, *rest in map(json.loads, out.splitlines()):
        if kind == "text":
            text += rest[0]
        elif kind in ("end", "error"):
            answers.append(text if kind == "end" else rest)
            text = ""
    return answers


def ends(out: str) -> list[dict]:
    return [rest[0] for kind, *rest in map(json.loads, out.splitlines()) if kind == "end"]


def test_cluster_gives_the_same_answers_as_one_machine(toy, tmp_path):
    """The cluster has four processes with uneven shares and six slots each."""
    results = Cluster(tmp_path, toy, "4,1,1,2", REQUESTS, count=4).finish()
    assert [code for code, *_ in results] == [0] * 4, results
    assert texts(results[0][1]) == alone(toy, REQUESTS)
    figures = ends(results[0][1])
    assert max(end["batch"] for end in figures) > 1
    assert all(end["bytes_read"] > 0 and end["experts"] == 4 for end in figures)
    counts = np.bincount(owners(12, (4.0, 1.0, 1.0, 2.0)))
    for rank in range(1, 4):
        assert results[rank][1] == ""
        assert f"worker {rank}: {counts[rank]} of 12 experts a layer" in results[rank][2]


def test_experts_split_over_workers_give_the_same_bits(tmp_path):
    """Nine rows choose few experts; each row is the same as alone, whichever worker computes it."""
    path = write_toy(tmp_path / "toy", num_experts=8, top_k=2)
    model = load_streaming(Checkpoint.open(path), slots=8)
    switch, hidden = next(iter(model.blocks.values())).switch_mlp, 64
    x = mx.random.normal((9, 1, hidden), key=mx.random.key(0))
    indices = np.random.default_rng(0).integers(0, 4, (9, 1, 1)) + np.array([0, 4])
    alone = [switch(x[i : i + 1], mx.array(indices[i : i + 1])) for i in range(9)]
    alone = np.concatenate([np.array(y) for y in alone]).reshape(18, hidden)
    (y,) = switch.start([(x, mx.array(indices))]).finish()
    np.testing.assert_array_equal(np.array(y).reshape(18, hidden), alone)

    rows, chosen = np.array(x).reshape(9, hidden), indices.reshape(9, 2)
    shared_request = exchange.ExpertRequest(0, [rows], [chosen], mx.float32, [True])
    summed = np.zeros_like(alone)
    for owned in (np.arange(8) % 3 == 0, np.arange(8) % 3 != 0):
        pairs = exchange.own_pairs(shared_request, owned)
        (y,) = switch.start(exchange.switch_inputs(shared_request, pairs)).finish()
        summed[pairs[0]] = np.array(y).reshape(-1, hidden)
    np.testing.assert_array_equal(summed, alone)
    model.close()


def test_worker_that_does_not_fit_is_refused(toy, tmp_path):
    other = write_chat_toy(tmp_path / "other", num_experts=12, top_k=4, seed=3)
    cases = [(other, "6", "is not the checkpoint that the lead has"), (toy, "1", "are too few")]
    for path, slots, why in cases:
        results = Cluster(tmp_path, toy, "equal", REQUESTS[:1], others=[path], slots=slots).finish()
        ((kind, text),) = texts(results[0][1])
        assert kind == "ClusterError"
        assert "worker 1" in text
        assert why in text
        assert results[1][0] == 1
        assert why in results[1][2]
        assert "Traceback" not in results[1][2]


@pytest.fixture
def two_networks():
    """Yield an address of this network namespace, one of another, and the command to run there."""
    name = f"flashmoe-{os.getpid()}"
    here, there = f"fm{os.getpid()}a", f"fm{os.getpid()}b"
    # Test runs at the same time, and those that were killed, have networks of their own.
    pid = os.getpid()
    network, block = f"10.213.{pid % 256}", pid // 256 % 63 * 4
    address_here, address_there = f"{network}.{block + 1}", f"{network}.{block + 2}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there}",
        f"ip link set {there} netns {name}",
        f"ip addr add {address_here}/30 dev {here}",
        f"ip link set {here} up",
        f"ip netns exec {name} ip addr add {address_there}/30 dev {there}",
        f"ip netns exec {name} ip link set {there} up",
        f"ip netns exec {name} ip link set lo up",
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr}")
        yield address_here, address_there, ["ip", "netns", "exec", name]
    except FileNotFoundError as e:
        pytest.skip(f"no network namespaces here: {e}")
    finally:
        for command in (f"ip link del {here}", f"ip netns del {name}"):
            subprocess.run(command.split(), capture_output=True)


def delayed(to: tuple[str, int], seconds: float) -> int:
    """Return the port of a new proxy that forwards to an address, and delays each byte."""
    ready, port = threading.Event(), []

    async def pump(reader, writer):
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 16):
            loop.call_later(seconds, writer.write, data)
        loop.call_later(seconds, writer.close)

    async def both(reader, writer):
        for _ in range(1200):  # until the other end listens
            try:
                there, back = await asyncio.open_connection(*to)
                break
            except OSError:
                await asyncio.sleep(0.1)
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    async def serve():
        server = await asyncio.start_server(both, "0.0.0.0", 0)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert ready.wait(60)
    return port[0]


def test_slow_network_does_not_change_an_answer(toy, tmp_path, two_networks):
    """The processes are in two networks, and each byte takes 2 ms."""
    here, there, inside = two_networks
    lead, other = f"{here}:31877", f"{there}:31878"
    to_lead = f"{here}:{delayed((here, 31877), 0.002)}"
    to_other = f"{here}:{delayed((there, 31878), 0.002)}"
    rings = [[[lead], [to_other]], [[to_lead], [other]]]
    run = Cluster(tmp_path, toy, "equal", REQUESTS[:2], rings=rings, inside=inside)
    results = run.finish()
    assert [code for code, *_ in results] == [0, 0], results
    assert texts(results[0][1]) == alone(toy, REQUESTS[:2])
    # Two sums in each layer take some milliseconds each, so the proxies are really in use.
    assert min(end["tokens_per_second"] for end in ends(results[0][1])) < 60


def test_lead_reports_a_worker_that_dies(toy, tmp_path):
    for how in (signal.SIGKILL, signal.SIGSTOP):
        requests = [ask("Tell me.", max_tokens=3000, seed=i) for i in range(2)]
        run = Cluster(tmp_path, toy, "equal", requests, count=3, silence=5.0)
        try:
            run.line()
            run.processes[1].send_signal(how)
            out, err = run.processes[0].communicate(timeout=300)
            last = run.processes[2].communicate(timeout=300)[1]
        finally:
            run.kill()
        errors = [rest for rest in texts(out) if isinstance(rest, list)]
        assert len(errors) == 2
        for kind, text in errors:
            assert kind == "ClusterError"
            assert "worker 1" in text or "worker 2" in text
            assert "Start all machines again" in text
        assert run.processes[0].returncode == 0, err
        assert "Traceback" not in err + last


def test_worker_ends_when_the_lead_dies(toy, tmp_path):
    run = Cluster(tmp_path, toy, "equal", [ask("Hello.")], pause=300)
    try:
        while run.line()[0] != "end":
            pass
        run.processes[0].kill()
        _, err = run.processes[1].communicate(timeout=300)
        assert run.processes[1].returncode == 1
        assert "the lead is gone" in err
        assert "Traceback" not in err
    finally:
        run.kill()


def test_idle_worker_does_not_keep_a_core_busy(toy, tmp_path):
    run = Cluster(tmp_path, toy, "equal", [ask("Hello.")], pause=300)
    try:
        while run.line()[0] != "end":
            pass

        def ticks() -> int:
            """Return the CPU time of the worker in hundredths of a second."""
            fields = Path(f"/proc/{run.processes[1].pid}/stat").read_text().split()
            return int(fields[13]) + int(fields[14])

        # The worker may still be busy with the end of the answer, so more than one try counts.
        used = []
        while not used or used[-1] >= 40:
            assert len(used) < 30, used
            before = ticks()
            time.sleep(2)
            used.append(ticks() - before)
    finally:
        run.kill()
        run.finish()


def test_expert_that_a_worker_cannot_read_is_an_error(tmp_path):
    path = write_chat_toy(tmp_path / "chat", num_experts=12, top_k=4)
    broken = write_chat_toy(tmp_path / "broken", num_experts=12, top_k=4)
    requests = [ask("Tell me.", max_tokens=3000)]
    run = Cluster(tmp_path, path, "equal", requests, others=[broken])
    try:
        run.line()
        (broken / "model.safetensors").rename(broken / "away")
        (broken / "away").unlink()
        out, err = run.processes[0].communicate(timeout=300)
    finally:
        run.kill()
        run.finish()
    (error,) = texts(out)
    assert error[0] == "ReadError", (out, err)
    assert "worker 1" in error[1]
    assert "is missing" in error[1] or "was deleted" in error[1]


def test_cluster_runs_under_the_launcher_of_mlx(toy, tmp_path):
    """Cluster the command of the docs, which uses MLX's own launcher."""
    command = [BIN / "mlx.launch", "-n", "2", "--backend", "ring", "-p", "23470", BIN / "flashmoe"]
    command += ["run", toy, "One.", "--cluster", "equal", "--slots", "6", "--max-tokens", "6"]
    command += ["--temperature", "0"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert alone(toy, REQUESTS[:1])[0].strip() in done.stdout
    assert "Traceback" not in done.stderr


def test_cluster_of_one_machine_is_refused(toy):
    command = [sys.executable, "-c", WORKER, "run", str(toy), "x", "--cluster", "equal"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "mlx.launch" in done.stderr
    assert "Traceback" not in done.stderr
