"""Clients that send slowly, half or too much do not keep others out, and leave nothing behind."""

import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from server_in_thread import serve
from toys import write_chat_toy

from flashmoe.engine import Engine
from flashmoe.server.answering import Limits
from flashmoe.server.connections import VITAL_PATHS, ConnectionLimits

HELLO = [{"role": "user", "content": "Hello"}]
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_HEAD = HEALTH[:20]
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
#: Few and short, so that tests are short.
FEW = ConnectionLimits(count=6, vital=2, head=0.5, rest=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)


@pytest.fixture(scope="module")
def toy(path):
    with Engine(path, batch=4, prompt_store=0, memory="2GB") as engine:
        yield engine


@pytest.fixture
def server(toy):
    with serve(toy, limits=Limits(body=20_000, pause=0.02), connections=FEW) as server:
        yield server


def connect(url, data=b"", **options):
    """Return a connection to a server, over which data was sent."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def received(connection):
    """Return all that a server sends until it closes the connection."""
    data = b""
    with connection, suppress(ConnectionError):
        while piece := connection.recv(10_000):
            data += piece
    return data


def error(response):
    """Return the status and the error of a response."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def status(url, path="/health"):
    return httpx.get(url.removesuffix("/v1") + path, timeout=60).status_code


def ask(url, **fields):
    fields = {"model": "toy", "messages": HELLO, "max_tokens": 3} | fields
    return httpx.post(url + "/chat/completions", json=fields, timeout=120)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.02)


def post(body, length=None):
    return POST + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


# Time limits.


def test_head_that_does_not_arrive_is_refused(server):
    for sent in (HALF_HEAD, b"GET", HEALTH[:-2]):
        code, why = error(received(connect(server.url, sent)))
        assert (code, why["code"]) == (408, "timeout")
        assert "within 0.5 s" in why["message"]


def test_head_that_drips_is_refused(server):
    connection = connect(server.url, HALF_HEAD)
    start = time.monotonic()
    with connection, suppress(ConnectionError):
        while time.monotonic() < start + 60:
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() < start + 60


def test_silent_connection_is_closed(server):
    assert received(connect(server.url)) == b""


def test_idle_connection_stays_open_for_the_next_request(server):
    with connect(server.url) as connection:
        for pause in (4 * FEW.head, 0):
            connection.sendall(HEALTH)
            response = b""
            while not response.endswith(b"}"):
                response += connection.recv(10_000)
            assert response.startswith(b"HTTP/1.1 200")
            time.sleep(pause)
        # Half of another head is due as soon as the first one was.
        connection.sendall(HALF_HEAD)
        assert error(received(connection))[0] == 408


def test_body_that_nobody_waits_for_is_not_waited_for_long(server):
    """The request is refused by its head; its body never comes."""
    response = received(connect(server.url, post(b"", length=100).replace(b"/v1/chat", b"/v2")))
    assert response.startswith(b"HTTP/1.1 404")


def test_client_that_receives_nothing_is_dropped(toy):
    """Its requests come one after the other, until no buffer takes another response."""
    with serve(toy, connections=FEW, send_buffer=4096) as server:
        with connect(server.url, SO_RCVBUF=2048) as connection:
            connection.settimeout(5)
            with suppress(OSError):
                for _ in range(5000):
                    connection.sendall(HEALTH.replace(b"health", b"metrics"))
            until(lambda: not server.connections)
        assert status(server.url) == 200


# Places.


@pytest.mark.parametrize("sent", [b"", HALF_HEAD, post(b"{", length=100)])
def test_clients_that_wait_give_way_to_newcomers(toy, sent):
    limits = ConnectionLimits(count=6, vital=2)
    with serve(toy, connections=limits) as server, ExitStack() as stack:
        waiting = [stack.enter_context(connect(server.url, sent)) for _ in range(20)]
        until(lambda: len(server.connections) == 6)
        for _ in range(8):
            assert status(server.url) == 200
        assert ask(server.url).status_code == 200
        assert len(server.connections) <= 6
        # Those that have waited longest were closed.
        assert received(waiting[0]) == b""


@pytest.fixture
def slow_steps(toy, monkeypatch):
    """Let each step of the engine take 20 ms more, so that a long answer lasts for the test."""
    assert ask_engine(toy)
    step = toy._batch.step

    def slow_step():
        time.sleep(0.02)
        step()

    monkeypatch.setattr(toy._batch, "step", slow_step)


def ask_engine(engine):
    from flashmoe.requests import Request

    return list(engine.stream(Request(HELLO, max_tokens=2)))


def test_health_has_places_of_its_own(server, toy, slow_steps):
    fields = {"model": "toy", "messages": HELLO, "max_tokens": 3000, "stream": True}
    story = post(json.dumps(fields | {"temperature": 5}).encode())
    with ExitStack() as stack:
        for _ in range(FEW.count):
            answer = stack.enter_context(connect(server.url, story))
            assert answer.recv(100).startswith(b"HTTP/1.1 200")
        for each in VITAL_PATHS:
            assert status(server.url, each) == 200
        response = httpx.get(server.url + "/models", timeout=60)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "too_many_connections"
        assert response.headers["retry-after"] == "1"
        assert ask(server.url).status_code == 503
    until(lambda: server.metrics.in_flight == 0)
    assert ask(server.url).status_code == 200


def test_slow_bodies_do_not_take_the_places_of_answers(toy):
    with serve(toy, limits=Limits(requests=2)) as server, ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connect(server.url, post(b"{", length=1000)))
        assert ask(server.url).status_code == 200


def test_bodies_have_one_limit_of_memory(toy):
    with serve(toy, limits=Limits(body=1000)) as server, ExitStack() as stack:
        # Eight times the largest body.
        for _ in range(8):
            stack.enter_context(connect(server.url, post(b" " * 999, length=1000)))
        until(lambda: server._answering._bodies._free == 8)
        response = ask(server.url)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_bodies")
        # A body that is too large anyway takes none.
        assert ask(server.url, user="x" * 1000).status_code == 413
        stack.close()
        until(lambda: server._answering._bodies._free == 8000)
        assert ask(server.url).status_code == 200


# What is not HTTP.


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9, 8\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 500 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: zip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: " + b"y" * 100_000, 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_what_is_not_http_is_refused(server, sent, code):
    found, why = error(received(connect(server.url, sent)))
    assert (found, why["type"]) == (code, "server_error" if code > 500 else "invalid_request_error")
    assert why["code"] == "invalid_http"
    assert status(server.url) == 200


# The process.


FLASHMOE = str(Path(sys.executable).parent / "flashmoe")


def test_fewer_connections_are_allowed_where_few_files_are():
    code = (
        "from flashmoe.server.run import connection_limits\n"
        "limits, backlog = connection_limits()\n"
        "print(limits.count, backlog)"
    )
    for files in (256, 4096):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            preexec_fn=lambda files=files: resource.setrlimit(
                resource.RLIMIT_NOFILE, (files, files)
            ),
        )
        count, backlog = map(int, done.stdout.split())
        assert 8 <= count <= 1000
        assert backlog >= 8
        assert count + backlog < files - 64
    assert (count, backlog) == (1000, 512)


def test_vanished_clients_are_probed_for(server):
    with connect(server.url, HEALTH) as client:
        client.recv(1000)
        (connection,) = server.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@contextmanager
def process(path, files=None):
    """Run a server, and yield its process and its URL. It must end cleanly."""

    def limit():
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [FLASHMOE, "serve", str(path), "--port", "0", "--memory", "2GB"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    ) as server:
        try:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            yield server, line.split()[-1]
            server.terminate()
            assert server.wait(60) == 0
            assert server.stderr.read() == ""
        finally:
            server.kill()


def files_and_threads(pid):
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def resident_mb(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def goes_on(path, url):
    """Check that a server answers others within some seconds."""
    start = time.monotonic()
    assert status(url) == 200
    assert ask(url, model=str(path)).status_code == 200
    assert time.monotonic() - start < 60


def connections(url, count, sent):
    made = []
    for _ in range(count):
        with suppress(OSError):
            made.append(connect(url, sent))
    return made


def half_heads(path, url, count):
    made = connections(url, count, HALF_HEAD)
    goes_on(path, url)
    for connection in made:
        connection.close()


def slow_bodies(path, url, count):
    made = connections(url, count, post(b"{", length=1000))
    goes_on(path, url)
    for connection in made:
        connection.close()


def at_once(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def large_bodies(path, url, count):
    """Send bodies of 100 MB at once."""
    codes = []

    def send():
        with connect(url, post(b"", length=10**8)) as connection:
            connection.settimeout(300)
            for _ in range(100):
                connection.sendall(b"[" * 10**6)
            codes.append(int(connection.recv(1000).split()[1]))

    threads = at_once(count, send)
    goes_on(path, url)
    for thread in threads:
        thread.join()
    assert codes == [413] * count


def dense_bodies(path, url, count):
    """Send bodies whose parsing would take the interpreter for seconds."""
    lists = b'{"metadata": [' + b"[]," * 2_600_000 + b"1]}"
    deep = b"[" * 100_000 + b"]" * 100_000
    text = {"model": str(path), "messages": [{"role": "user", "content": "Hello, " * 10**6}]}
    bodies = {lists: 413, deep: 400, json.dumps(text).encode(): 400}
    codes = []

    def send():
        for body, code in bodies.items():
            headers = {"Content-Type": "application/json"}
            response = httpx.post(
                url + "/chat/completions", content=body, headers=headers, timeout=300
            )
            codes.append((response.status_code, code))

    threads = at_once(count, send)
    goes_on(path, url)
    for thread in threads:
        thread.join()
    assert [found for found, _ in codes] == [expected for _, expected in codes]


def cancel_storm(path, url, count):
    """Begin answers and drop the connections, half of them with a reset."""
    fields = {"model": str(path), "messages": HELLO, "max_tokens": 2000, "stream": True}
    request = post(json.dumps(fields).encode())
    end = time.monotonic() + 10

    def send():
        while time.monotonic() < end:
            with suppress(OSError), connect(url, request) as connection:
                time.sleep(random.uniform(0, 0.05))
                if random.random() < 0.5:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    threads = at_once(count, send)
    goes_on(path, url)
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the files of a process are looked up in /proc")
@pytest.mark.parametrize(
    ("attack", "count", "files"),
    [
        (half_heads, 500, None),
        (half_heads, 1000, None),
        (half_heads, 3000, None),
        (half_heads, 600, 256),
        (slow_bodies, 1500, None),
        (large_bodies, 16, None),
        (dense_bodies, 8, None),
        (cancel_storm, 8, None),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_server_is_as_before_after(path, attack, count, files):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 200 > soft:
        if count + 200 > hard:
            pytest.skip(f"this test needs {count} open files, and the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, hard))
    with process(path, files) as (server, url):
        pid = server.pid
        goes_on(path, url)
        # The memory of large bodies is kept for the next ones; what is too little grows twice.
        for _ in range(2):
            attack(path, url, count)
        before, mb = files_and_threads(pid), resident_mb(pid)
        attack(path, url, count)
        until(lambda: files_and_threads(pid)[0] <= before[0] + 10)
        goes_on(path, url)
        # There are at most 32 threads that read requests.
        assert files_and_threads(pid)[1] <= before[1] + 32
        assert resident_mb(pid) < mb + 150


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_ends_under_attack(path, number):
    """Long prompts are computed, bodies arrive, and heads are half."""
    with process(path) as (server, url):
        made = connections(url, 100, HALF_HEAD) + connections(url, 100, post(b"{", length=10**6))
        fields = {"model": str(path), "messages": [{"role": "user", "content": "Go on. " * 900}]}
        made += connections(url, 20, post(json.dumps(fields).encode()))
        time.sleep(random.uniform(0, 1))
        server.send_signal(number)
        # The other status: what is under way took longer than a second and a half.
        assert server.wait(30) in (0, 128 + number)
        server.returncode = 0
        for connection in made:
            connection.close()
