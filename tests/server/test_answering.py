"""Test that limits, keys, metrics and cancelling are the same for all APIs."""

import json
import time

import httpx
import pytest
from server_in_thread import metrics, serve
from toys import write_chat_toy

from flashmoe.engine import Engine
from flashmoe.server.answering import Limits

ASK = [{"role": "user", "content": "A story."}]
#: For each API: what asks for an answer of 3,000 tokens, and how its errors look.
APIS = {
    "/v1/chat/completions": ({"messages": ASK, "max_tokens": 3000}, ("error", "code")),
    "/v1/responses": ({"input": "A story.", "max_output_tokens": 3000}, ("error", "code")),
    "/v1/completions": ({"prompt": "A story.", "max_tokens": 3000}, ("error", "code")),
    "/v1/messages": ({"messages": ASK, "max_tokens": 3000}, ("error", "type")),
    "/api/chat": ({"messages": ASK, "options": {"num_predict": 3000}}, ("error",)),
}
KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)
    with Engine(path, batch=4, prompt_store=0, memory="2GB") as engine:
        limits = Limits(body=5_000, requests=2, pause=0.02)
        with serve(engine, limits=limits, key="s3cret", ollama=True) as server:
            server.base = server.url.removesuffix("/v1")
            yield server


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize("path", APIS)
def test_refusals_have_the_form_of_the_api(server, path):
    fields, place = APIS[path]
    url = server.base + path
    large = json.dumps(fields | {"model": "x" * 6_000}).encode()
    json_type = {"content-type": "application/json"}
    for status, options in (
        (401, {"json": fields}),
        (400, {"content": b"[", "headers": KEY | json_type}),
        (404, {"json": fields | {"model": "other"}, "headers": KEY}),
        (413, {"content": large, "headers": KEY | json_type}),
        (415, {"content": b"x", "headers": KEY}),
    ):
        response = httpx.post(url, timeout=60, **options)
        assert response.status_code == status
        value = response.json()
        for name in place:
            value = value[name]
        assert isinstance(value, str)


@pytest.mark.parametrize("path", APIS)
def test_client_that_goes_away_cancels_its_answer(server, path):
    fields = APIS[path][0] | {"model": "toy", "stream": True}
    gone = metrics(server, **KEY).get("flashmoe_disconnects_total", 0)
    with httpx.stream("POST", server.base + path, json=fields, headers=KEY, timeout=60) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        while "A" not in next(lines) and metrics(server, **KEY)["flashmoe_rows"] == 0:
            pass
    until(lambda: metrics(server, **KEY)["flashmoe_disconnects_total"] == gone + 1)
    until(lambda: metrics(server, **KEY)["flashmoe_rows"] == 0)
    assert metrics(server, **KEY)["flashmoe_requests_in_flight"] == 0


def test_request_beyond_the_limit_is_told_when_to_come_again(server):
    streams = []
    try:
        for path in ("/v1/responses", "/v1/messages"):
            fields = APIS[path][0] | {"model": "toy", "stream": True}
            client = httpx.Client(timeout=60)
            request = client.build_request("POST", server.base + path, json=fields, headers=KEY)
            streams.append((client, client.send(request, stream=True)))
        for path in APIS:
            fields = APIS[path][0] | {"model": "toy"}
            full = httpx.post(server.base + path, json=fields, headers=KEY, timeout=60)
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
    finally:
        for client, stream in streams:
            stream.close()
            client.close()
