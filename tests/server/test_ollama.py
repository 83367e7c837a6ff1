"""Test Ollama's API over the demo model: what its clients send and read."""

import json

import example_tools
import httpx
import pytest
from server_in_thread import serve

ADD = {"type": "function", "function": example_tools.ADD}
ASK = [{"role": "user", "content": "What is 17 plus 25? Use the tool."}]
COLD = {"model": "flashmoe-demo:latest", "options": {"temperature": 0, "num_predict": 60}}


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, name="flashmoe-demo", ollama=True) as server:
        yield server.url.removesuffix("/v1")


def chat(url, **fields):
    return httpx.post(url + "/api/chat", json=COLD | fields, timeout=120)


def test_tool_loop_without_ids(url):
    lines = [json.loads(t) for t in chat(url, messages=ASK, tools=[ADD]).text.splitlines()]
    assert [line["done"] for line in lines] == [*(False for _ in lines[1:]), True]
    calls = [c for line in lines for c in line["message"].get("tool_calls", ())]
    assert calls[0]["function"]["arguments"] == {"a": 17, "b": 25}
    assert lines[-1]["eval_count"] > 0
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": calls[0]["function"]}],
    }
    result = {"role": "tool", "tool_name": "add", "content": "42"}
    done = chat(url, messages=[*ASK, called, result], tools=[ADD], stream=False).json()
    assert "42" in done["message"]["content"]
    assert done["done_reason"] == "stop"


def test_answer_has_the_form_of_a_schema(url):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    done = chat(url, messages=ASK, format=schema, stream=False, think=False).json()
    assert isinstance(json.loads(done["message"]["content"])["n"], int)


def test_model_is_listed_and_shown(url):
    (tag,) = httpx.get(url + "/api/tags", timeout=60).json()["models"]
    assert (tag["name"], tag["size"] > 10**6) == ("flashmoe-demo:latest", True)
    shown = httpx.post(url + "/api/show", json={"model": tag["name"]}, timeout=60).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    architecture = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{architecture}.context_length"] == 4096
    assert httpx.get(url + "/api/version", timeout=60).json()["version"]


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({}, 400, "messages is missing"),
        ({"messages": ASK, "model": "llama3"}, 404, "ask for 'flashmoe-demo'"),
        ({"messages": [ASK[0] | {"images": ["x"]}]}, 400, "take text only"),
        ({"messages": [3]}, 400, "message 0 is 3"),
        ({"messages": ASK, "format": "xml"}, 400, "must be json or a schema"),
        ({"messages": ASK, "options": {"temperature": "hot"}}, 400, "temperature"),
        ({"messages": ASK, "think": "huge"}, 400, "huge"),
    ],
)
def test_field_that_cannot_be_used_is_refused_in_the_form_of_the_api(url, fields, status, text):
    response = chat(url, **fields)
    assert response.status_code == status
    assert text in response.json()["error"]
