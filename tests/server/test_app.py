"""Test the server over a toy model: answers, refusals, access, and clients that wait or go away."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
from server_in_thread import metrics, serve
from toys import write_chat_toy

from flashmoe.engine import Engine
from flashmoe.events import Text
from flashmoe.requests import Request
from flashmoe.server.answering import Limits

SETTINGS = {"prompt_store": 0, "memory": "2GB"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Return an engine that has its model in memory."""
    path = write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)
    with Engine(path, batch=4, **SETTINGS) as engine:
        list(engine.stream(Request(messages("Hello"), max_tokens=2)))
        yield engine


@pytest.fixture(scope="module")
def server(toy):
    with serve(toy, limits=Limits(body=20_000, requests=12, pause=0.02)) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def body(text: str = "Hello", **fields) -> dict:
    fields = {"model": "toy", "messages": messages(text), "temperature": 0} | fields
    return {"max_tokens": 8} | fields


def post(server, fields: dict | None = None, **kwargs):
    kwargs = kwargs or {"json": body() if fields is None else fields}
    return httpx.post(server.url + "/chat/completions", timeout=120, **kwargs)


@contextmanager
def sent(server, fields: dict, receive_buffer: int | None = None):
    """Send a request over a connection of its own, which is closed afterwards."""
    text = json.dumps(fields).encode()
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )
        yield connection


def expected(engine, text: str, **options) -> str:
    """Return the answer of the engine itself."""
    options = {"temperature": 0, "max_tokens": 8} | options
    events = engine.stream(Request(messages(text), **options))
    return "".join(event.text for event in events if isinstance(event, Text))


def until(condition, seconds: float = 120) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def slow_steps(toy, monkeypatch):
    """Let each step of the engine take 20 ms more.

    A long answer then takes more than a minute, so it is not over before the test has cancelled it,
    even if the test's thread gets no time for a while.
    """
    step = toy._batch.step

    def slow_step():
        time.sleep(0.02)
        step()

    monkeypatch.setattr(toy._batch, "step", slow_step)


def long_answers(engine) -> list:
    """Begin as many long answers as fit into the batch."""
    # The toy model writes far more than a thousand tokens after each of these prompts.
    prompts = ("A story.", "Hello", "Long 0.", "Long 1.")
    requests = [Request(messages(p), max_tokens=3000, temperature=0) for p in prompts]
    answers = [engine.stream(request) for request in requests]
    until(lambda: engine.running == 4)
    return answers


def idle(engine) -> bool:
    return engine.running == 0 and engine.waiting == 0


# Answers.


def test_completion_is_the_answer_of_the_engine(server, client, toy):
    response = client.chat.completions.create(**body("Tell me."))
    assert response.choices[0].message.content == expected(toy, "Tell me.")
    assert response.model == "toy"
    assert response.usage.completion_tokens == 8
    assert response.choices[0].finish_reason == "length"
    assert response.flashmoe["experts"] == 3
    again = client.chat.completions.create(**body("Tell me.", model="alias"))
    assert again.choices[0].message.content == response.choices[0].message.content


def test_streamed_completion_is_the_same_answer(server, client, toy):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**body("Tell me."), **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(toy, "Tell me.")
    assert last.usage.completion_tokens == 8
    assert chunks[-1].choices[0].finish_reason == "length"
    raw = post(server, body(stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_concurrent_clients_get_their_own_answers(server, toy):
    prompts = [f"Tell me about {i}." for i in range(6)]
    alone = [expected(toy, prompt) for prompt in prompts]

    async def ask(client, i: int) -> str:
        if i % 2:
            response = await client.chat.completions.create(**body(prompts[i]))
            return response.choices[0].message.content
        stream = await client.chat.completions.create(**body(prompts[i]), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(6)))

    assert asyncio.run(together()) == alone


def test_models_are_listed(server, client):
    (model,) = client.models.list()
    assert (model.id, model.created, model.aliases) == ("toy", 7, ["alias"])
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_health_says_that_the_model_is_ready(server):
    response = httpx.get(server.url.removesuffix("/v1") + "/health", timeout=120)
    assert (response.status_code, response.json()) == (200, {"status": "ok", "model": "ready"})


def test_metrics_count_answers_and_refusals(server):
    before = metrics(server)
    post(server, body("Count me.", max_tokens=5))
    post(server, {})
    after = metrics(server)

    def more(name: str) -> float:
        return after[f"flashmoe_{name}"] - before.get(f"flashmoe_{name}", 0)

    assert more("completion_tokens_total") == 5
    assert more("prompt_tokens_total") > 5
    assert more("tokens_per_second_count") == more("hit_rate_count") == 1
    assert more('requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert more('requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert after["flashmoe_resident_memory_bytes"] > 10**7
    assert after["flashmoe_model_loaded"] == 1


# Refused requests.


@pytest.mark.parametrize(
    ("kwargs", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"json": {"model": "toy"}}, 400, "missing_required_parameter"),
        ({"json": body(model="x")}, 404, "model_not_found"),
        ({"json": body(audio={})}, 400, "unsupported_value"),
        ({"json": body(experts=9)}, 400, "invalid_value"),
        ({"json": body("a " * 5000)}, 400, "context_length_exceeded"),
        ({"content": json.dumps(body())}, 415, "not_json"),
        ({"data": {"model": "toy"}}, 415, "not_json"),
        ({"json": body(), "headers": {"content-encoding": "gzip"}}, 415, "not_json"),
        ({"json": body("word " * 5000)}, 413, "body_too_large"),
        ({"json": body("word " * 500_000)}, 413, "body_too_large"),
        (
            {
                "content": (b" " * 1000 for _ in range(1000)),
                "headers": {"content-type": "application/json"},
            },
            413,
            "body_too_large",
        ),
    ],
)
def test_invalid_request_is_refused(server, kwargs, status, code):
    response = post(server, **kwargs)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/", 405),
        ("GET", "/v1/../../etc/passwd", 404),
    ],
)
def test_unknown_path_or_method_is_refused(server, method, path, status):
    response = httpx.request(method, server.url.removesuffix("/v1") + path, timeout=120)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_openai_client_raises_its_own_error_classes(client):
    for kind, fields in (
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"temprature": 1}}),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**body(**fields))
        assert caught.value.body["message"] in str(caught.value)


def test_schema_that_is_too_large_is_a_bad_request(server):
    """The schema turns out to be too large only when the answer has begun."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(600)}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    response = post(server, body(response_format=wanted, max_tokens=40))
    assert response.status_code == 400
    assert "too large to be enforced" in response.json()["error"]["message"]


def test_server_goes_on_after_garbage_on_a_connection(server):
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as s, suppress(OSError):
            s.settimeout(60)
            s.sendall(garbage)
            s.shutdown(socket.SHUT_WR)
            while s.recv(1000):
                pass
    until(lambda: server.metrics.in_flight == 0)
    assert post(server).status_code == 200


# Clients that wait or go away.


@pytest.mark.parametrize("stream", [True, False])
def test_answer_is_cancelled_when_its_client_goes_away(server, toy, slow_steps, stream):
    name = "flashmoe_disconnects_total"
    before = metrics(server)[name]
    with sent(server, body("A story.", max_tokens=3900, stream=stream)) as connection:
        # A stream has its first comment when the engine may not have begun yet.
        assert not stream or connection.recv(1)
        until(lambda: toy.running == 1)
    until(lambda: idle(toy) and server.metrics.in_flight == 0)
    assert metrics(server)[name] == before + 1


def test_waiting_request_is_dropped_when_its_client_goes_away(server, toy, slow_steps):
    """The request leaves the queue while the answers before it still run."""
    busy = long_answers(toy)
    with sent(server, body()):
        until(lambda: toy.waiting == 1)
    until(lambda: toy.waiting == 0)
    assert toy.running == 4
    for answer in busy:
        answer.close()
    until(lambda: idle(toy))


def test_waiting_client_gets_comments(toy):
    """Comments are sent while other requests come first, and during the prefill."""
    busy = long_answers(toy)
    fields = body("word " * 2500, max_tokens=2, stream=True)
    lines = []
    with (
        # The pause is shorter than any step, so that there is a silence after each.
        serve(toy, limits=Limits(pause=0.0002)) as server,
        httpx.stream("POST", server.url + "/chat/completions", json=fields, timeout=120) as answer,
    ):
        for line in answer.iter_lines():
            lines.append(line)
            if line == ": waiting":
                for running in busy:
                    running.close()
    assert ": waiting" in lines
    assert any(line.startswith(": reading ") and " of 25" in line for line in lines)
    assert lines[-2] == "data: [DONE]"
    assert all(not line or line.startswith((":", "data: ")) for line in lines)


def test_error_in_a_stream_is_sent_as_an_event(toy, slow_steps):
    # Time enough for the first comment, and too little for the answer.
    limits = Limits(seconds=3, pause=0.01)
    with serve(toy, limits=limits) as server:
        client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0)
        stream = client.chat.completions.create(**body(max_tokens=3000), stream=True)
        with pytest.raises(openai.APIError, match="timeout=3 seconds"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="timeout=3 seconds"):
            client.chat.completions.create(**body(max_tokens=3000))
        until(lambda: idle(toy))
        assert metrics(server)["flashmoe_stream_errors_total"] == 1


def test_requests_beyond_the_limit_are_told_to_come_back(toy, slow_steps):
    with serve(toy, limits=Limits(requests=2)) as server:
        client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0)
        fields = body(max_tokens=3000, stream=True)
        streams = [client.chat.completions.create(**fields) for _ in range(2)]
        first = [next(stream) for stream in streams]
        assert first
        with pytest.raises(openai.RateLimitError, match="2 requests") as caught:
            client.chat.completions.create(**body())
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        for stream in streams:
            stream.close()
        until(lambda: server.metrics.in_flight == 0)
        assert client.chat.completions.create(**body()).choices


@pytest.mark.parametrize("stream", [True, False])
def test_shutdown_ends_answers_with_an_error(toy, slow_steps, stream):
    begun, answers = threading.Event(), []

    def ask(url):
        fields = body(max_tokens=3900, stream=stream)
        with httpx.stream("POST", url + "/chat/completions", json=fields, timeout=120) as answer:
            begun.set()
            answer.read()
            answers.append(answer)

    with serve(toy, limits=Limits(pause=0.01)) as server:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        until(lambda: toy.running == 1)
        assert not stream or begun.wait(60)
    asking.join(60)
    (answer,) = answers
    assert answer.status_code == (200 if stream else 503)
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    until(lambda: idle(toy))


# Access.


def test_api_key_is_required(toy):
    with serve(toy, key="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": b"Bearer s3cret\xff"},
        ):
            response = post(server, json=body(), headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert (
                httpx.get(server.url + "/models", headers=headers, timeout=120).status_code == 401
            )
        root = server.url.removesuffix("/v1")
        assert httpx.get(root + "/metrics", timeout=120).status_code == 401
        assert httpx.get(root + "/health", timeout=120).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="x").chat.completions.create(**body())
        client = openai.OpenAI(base_url=server.url, api_key="s3cret", max_retries=0)
        assert client.chat.completions.create(**body()).choices
        # With a key, clients may use another name of this machine.
        named = {"Authorization": "Bearer s3cret", "Host": "box.example"}
        assert httpx.get(server.url + "/models", headers=named, timeout=120).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", ""]
)
def test_foreign_host_name_is_refused(server, host):
    response = post(server, json=body(), headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080"])
def test_loopback_host_name_is_allowed(server, host):
    assert httpx.get(server.url + "/models", headers={"Host": host}, timeout=120).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_foreign_web_page_is_refused(server, origin):
    for response in (
        post(server, json=body(), headers={"Origin": origin}),
        httpx.options(
            server.url + "/chat/completions",
            timeout=120,
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        ),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers


def test_allowed_web_page_is_served(toy):
    page = "https://chat.example"
    with serve(toy, key="k", origins=[page]) as server:
        preflight = httpx.options(
            server.url + "/chat/completions",
            timeout=120,
            headers={
                "Origin": page,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
                "Access-Control-Request-Private-Network": "true",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        response = post(server, json=body(), headers={"Origin": page, "Authorization": "Bearer k"})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == page
        assert post(server, json=body(), headers={"Origin": page}).status_code == 401
        other = {"Origin": "https://evil.example", "Authorization": "Bearer k"}
        assert post(server, json=body(), headers=other).status_code == 403


def test_incomplete_body_times_out(server, monkeypatch):
    monkeypatch.setattr("flashmoe.server.streams.BODY_SECONDS", 0.2)
    name = 'flashmoe_requests_total{path="/v1/chat/completions",status="408"}'
    before = metrics(server).get(name, 0)

    def slow():
        yield b"{"
        until(lambda: metrics(server).get(name, 0) > before)

    response = post(server, content=slow(), headers={"content-type": "application/json"})
    assert response.status_code == 408


def test_client_that_does_not_read_is_dropped(toy, monkeypatch):
    """The answer is cancelled when the client has read nothing for SEND_SECONDS."""
    monkeypatch.setattr("flashmoe.server.streams.SEND_SECONDS", 0.2)
    fields = body("Go on.", model="alias", max_tokens=3900, stream=True)
    # Each chunk has the name of the model: a long one fills all buffers within a few tokens.
    name = "x" * 10_000
    with (
        serve(toy, name=name, send_buffer=4096) as server,
        sent(server, fields, receive_buffer=4096),
    ):
        until(lambda: metrics(server)["flashmoe_disconnects_total"] == 1)
        until(lambda: idle(toy) and server.metrics.in_flight == 0)
