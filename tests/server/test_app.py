"""The server over a toy: what is refused, who is let in, what is said while a client waits, what is
left of one that went away."""

import asyncio
import json
import socket
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
from server_in_thread import metrics, serve
from toys import write_chat_toy

from flashmoe.engine import Engine
from flashmoe.events import Text
from flashmoe.requests import Request
from flashmoe.server.app import Limits

SETTINGS = {"prompt_store": 0, "memory": "2GB"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """An engine that is warm."""
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
    return httpx.post(server.url + "/chat/completions", timeout=30, **kwargs)


def expected(engine, text: str, **options) -> str:
    options = {"temperature": 0, "max_tokens": 8} | options
    events = engine.stream(Request(messages(text), **options))
    return "".join(event.text for event in events if isinstance(event, Text))


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def idle(engine) -> bool:
    return engine.running == 0 and engine.waiting == 0


# What comes back.


def test_answer_is_another_one(server, client, toy):
    found = client.chat.completions.create(**body("Tell me."))
    assert found.choices[0].message.content == expected(toy, "Tell me.")
    assert found.model == "toy"
    assert found.usage.completion_tokens == 8
    assert found.choices[0].finish_reason == "length"
    assert found.flashmoe["experts"] == 3
    again = client.chat.completions.create(**body("Tell me.", model="alias"))
    assert again.choices[0].message.content == found.choices[0].message.content


def test_stream_is_another_answer(server, client, toy):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**body("Tell me."), **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(toy, "Tell me.")
    assert last.usage.completion_tokens == 8
    assert chunks[-1].choices[0].finish_reason == "length"
    raw = post(server, body(stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_clients_at_once_get_other_answers(server, toy):
    prompts = [f"Tell me about {i}." for i in range(6)]
    alone = [expected(toy, prompt) for prompt in prompts]

    async def ask(client, i: int) -> str:
        if i % 2:
            found = await client.chat.completions.create(**body(prompts[i]))
            return found.choices[0].message.content
        stream = await client.chat.completions.create(**body(prompts[i]), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(6)))

    assert asyncio.run(together()) == alone


def test_models_are_not_listed(server, client):
    (model,) = client.models.list()
    assert (model.id, model.created, model.aliases) == ("toy", 7, ["alias"])
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_health_is_unknown(server):
    found = httpx.get(server.url.removesuffix("/v1") + "/health")
    assert (found.status_code, found.json()) == (200, {"status": "ok", "model": "ready"})


def test_metrics_miss_an_answer(server):
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


# What is refused.


@pytest.mark.parametrize(
    ("kwargs", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"json": {"model": "toy"}}, 400, "missing_required_parameter"),
        ({"json": body(model="x")}, 404, "model_not_found"),
        ({"json": body(n=2)}, 400, "unsupported_value"),
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
def test_request_is_taken(server, kwargs, status, code):
    found = post(server, **kwargs)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["code"] == code
    assert error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/completions", 404),
        ("GET", "/", 404),
        ("GET", "/v1/../../etc/passwd", 404),
    ],
)
def test_nothing_answers_there(server, method, path, status):
    found = httpx.request(method, server.url.removesuffix("/v1") + path)
    assert found.status_code == status
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_errors_are_of_other_classes(client):
    for kind, fields in (
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"temprature": 1}}),
    ):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**body(**fields))
        assert caught.value.body["message"] in str(caught.value)


def test_schema_that_is_too_large_is_an_internal_error(server):
    """It turns out when the answer has begun."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(600)}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    found = post(server, body(response_format=wanted, max_tokens=40))
    assert found.status_code == 400
    assert "too large to be enforced" in found.json()["error"]["message"]


def test_garbage_on_the_wire_ends_the_server(server):
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
            s.settimeout(5)
            s.sendall(garbage)
            s.shutdown(socket.SHUT_WR)
            while s.recv(1000):
                pass
    until(lambda: server.metrics.in_flight == 0)
    assert post(server).status_code == 200


# Who goes away.


@pytest.mark.parametrize("stream", [True, False])
def test_answer_outlives_its_client(server, toy, stream):
    name = "flashmoe_disconnects_total"
    before = metrics(server)[name]
    url, fields = server.url + "/chat/completions", body("A story.", max_tokens=3900, stream=stream)
    if stream:
        with httpx.stream("POST", url, json=fields) as answer:
            assert next(answer.iter_lines())
            assert toy.running == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=fields, timeout=0.3)
    until(lambda: idle(toy) and server.metrics.in_flight == 0)
    assert metrics(server)[name] == before + 1


def test_request_that_waits_outlives_its_client(server, toy):
    """It leaves the queue while the rows are still busy."""
    busy = [toy.stream(Request(messages(f"Long {i}."), max_tokens=3000)) for i in range(4)]
    until(lambda: toy.running == 4)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/chat/completions", json=body(), timeout=0.3)
    until(lambda: toy.waiting == 0)
    assert toy.running == 4
    for answer in busy:
        answer.close()
    until(lambda: idle(toy))


def test_client_that_waits_hears_nothing(toy):
    """Comments, while others are before it and while a prompt is read."""
    busy = [toy.stream(Request(messages(f"Long {i}."), max_tokens=3000)) for i in range(4)]
    until(lambda: toy.running == 4)
    fields = body("word " * 2500, max_tokens=2, stream=True)
    heard = []
    with (
        # Shorter than any step, so that there is a silence after each.
        serve(toy, limits=Limits(pause=0.0002)) as server,
        httpx.stream("POST", server.url + "/chat/completions", json=fields, timeout=20) as answer,
    ):
        for line in answer.iter_lines():
            heard.append(line)
            if line == ": waiting":
                for running in busy:
                    running.close()
    assert ": waiting" in heard
    assert any(line.startswith(": reading ") and " of 25" in line for line in heard)
    assert heard[-2] == "data: [DONE]"
    assert all(not line or line.startswith((":", "data: ")) for line in heard)


def test_error_after_the_first_byte_is_no_event(toy):
    limits = Limits(seconds=0.3, pause=0.01)
    with serve(toy, limits=limits) as server:
        client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0)
        stream = client.chat.completions.create(**body(max_tokens=3000), stream=True)
        with pytest.raises(openai.APIError, match="timeout=0.3 seconds"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="timeout=0.3 seconds"):
            client.chat.completions.create(**body(max_tokens=3000))
        until(lambda: idle(toy))
        assert metrics(server)["flashmoe_stream_errors_total"] == 1


def test_one_request_too_many_is_taken(toy):
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
def test_end_of_the_server_leaves_clients_waiting(toy, stream):
    found = []

    def ask(url):
        fields = body(max_tokens=3900, stream=stream)
        found.append(httpx.post(url + "/chat/completions", json=fields, timeout=20))

    with serve(toy, limits=Limits(pause=0.01)) as server:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        until(lambda: toy.running == 1)
        time.sleep(0.1)
        begun = time.monotonic()
    asking.join(10)
    assert time.monotonic() - begun < 3
    text = found[0].text
    assert found[0].status_code == (200 if stream else 503)
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    until(lambda: idle(toy))


# Who is let in.


def test_key_is_not_needed(toy):
    with serve(toy, key="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": b"Bearer s3cret\xff"},
        ):
            found = post(server, json=body(), headers=headers)
            assert found.status_code == 401
            assert found.headers["www-authenticate"] == "Bearer"
            assert httpx.get(server.url + "/models", headers=headers).status_code == 401
        root = server.url.removesuffix("/v1")
        assert httpx.get(root + "/metrics").status_code == 401
        assert httpx.get(root + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="x").chat.completions.create(**body())
        client = openai.OpenAI(base_url=server.url, api_key="s3cret", max_retries=0)
        assert client.chat.completions.create(**body()).choices
        # The name of another machine is no matter then.
        named = {"Authorization": "Bearer s3cret", "Host": "box.example"}
        assert httpx.get(server.url + "/models", headers=named).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", ""]
)
def test_rebound_name_is_let_in(server, host):
    found = post(server, json=body(), headers={"Host": host})
    assert (found.status_code, found.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080"])
def test_own_name_is_kept_out(server, host):
    assert httpx.get(server.url + "/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_web_page_is_let_in(server, origin):
    for found in (
        post(server, json=body(), headers={"Origin": origin}),
        httpx.options(
            server.url + "/chat/completions",
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        ),
    ):
        assert (found.status_code, found.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in found.headers


def test_allowed_page_is_kept_out(toy):
    page = "https://chat.example"
    with serve(toy, key="k", origins=[page]) as server:
        preflight = httpx.options(
            server.url + "/chat/completions",
            headers={
                "Origin": page,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        found = post(server, json=body(), headers={"Origin": page, "Authorization": "Bearer k"})
        assert found.status_code == 200
        assert found.headers["access-control-allow-origin"] == page
        assert post(server, json=body(), headers={"Origin": page}).status_code == 401
        other = {"Origin": "https://evil.example", "Authorization": "Bearer k"}
        assert post(server, json=body(), headers=other).status_code == 403


def test_body_that_does_not_come_is_waited_for(server, monkeypatch):
    monkeypatch.setattr("flashmoe.server.sse.BODY_SECONDS", 0.2)

    def slow():
        yield b"{"
        time.sleep(1)

    found = post(server, content=slow(), headers={"content-type": "application/json"})
    assert found.status_code == 408


def test_client_that_does_not_read_holds_a_row(toy, monkeypatch):
    """Its answer is given up when nothing was taken for so long."""
    monkeypatch.setattr("flashmoe.server.sse.SEND_SECONDS", 0.2)
    text = json.dumps(body("Go on.", max_tokens=3900, stream=True)).encode()
    with serve(toy, send_buffer=4096) as server, socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        s.connect((host, int(port)))
        s.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )
        until(lambda: toy.running == 1)
        until(lambda: idle(toy) and server.metrics.in_flight == 0, 20)
        assert server.metrics.prometheus_text(toy).count("flashmoe_disconnects_total 1\n") == 1
