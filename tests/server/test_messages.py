"""Test the Messages API with the anthropic package, LangChain, and what Claude Code sends."""

import json

import anthropic
import example_tools
import httpx
import pytest
from langchain_anthropic import ChatAnthropic
from server_in_thread import serve

from flashmoe.events import ToolCall, ToolCallArguments, ToolCallStart
from flashmoe.server.messages_answer import MessagesAnswer
from flashmoe.server.messages_request import chat_fields

ADD = {
    "name": "add",
    "description": example_tools.ADD["description"],
    "input_schema": example_tools.ADD["parameters"],
    "cache_control": {"type": "ephemeral"},
}
ASK = [{"role": "user", "content": "What is 17 plus 25? Use the tool."}]
MODEL = {"model": "flashmoe-demo", "max_tokens": 60}
#: The package has no field for it any more.
COLD = {"extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, name="flashmoe-demo", key="s3cret") as server:
        yield server.url.removesuffix("/v1")


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="s3cret", max_retries=0) as client:
        yield client


def post(url, fields, path="/v1/messages", key="s3cret"):
    return httpx.post(url + path, json=fields, headers={"x-api-key": key}, timeout=120)


# Clients.


def test_anthropic_client_runs_a_tool_loop(client):
    first = client.messages.create(**MODEL, **COLD, messages=ASK, tools=[ADD])
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("add", {"a": 17, "b": 25})
    assert first.usage.input_tokens + first.usage.cache_read_input_tokens > 50
    result = {"type": "tool_result", "tool_use_id": call.id}
    result["content"] = [{"type": "text", "text": "42", "cache_control": {"type": "ephemeral"}}]
    turns = [*ASK, {"role": "assistant", "content": first.content}]
    turns.append({"role": "user", "content": [result]})
    done = client.messages.create(**MODEL, **COLD, messages=turns, tools=[ADD])
    assert "42" in done.content[-1].text
    assert done.stop_reason == "end_turn"
    assert done.usage.cache_read_input_tokens > 50


def test_streamed_message_is_the_same_and_its_events_are_in_order(client, url):
    whole = client.messages.create(**MODEL, **COLD, messages=ASK, tools=[ADD])
    with client.messages.stream(**MODEL, **COLD, messages=ASK, tools=[ADD]) as stream:
        streamed = stream.get_final_message()
    assert [b.input for b in streamed.content] == [b.input for b in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (
        whole.stop_reason,
        whole.usage.output_tokens,
    )
    raw = post(
        url, MODEL | {"temperature": 0, "messages": ASK, "tools": [ADD], "stream": True}
    ).text
    names = [line[7:] for line in raw.split("\n") if line.startswith("event: ")]
    without_deltas = [n for n in names if n != "content_block_delta"]
    assert without_deltas == [
        *("message_start", "ping", "content_block_start", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]


def test_thoughts_are_blocks_and_go_back(client):
    thinking = {"type": "enabled", "budget_tokens": 8}
    ask = [{"role": "user", "content": "What is 3 plus 4?"}]
    fields = MODEL | {"messages": ask, "thinking": thinking, "max_tokens": 20}
    message = client.messages.create(**fields, **COLD)
    thought, *_ = message.content
    assert thought.type == "thinking"
    assert thought.thinking
    assert thought.signature
    with client.messages.stream(**fields, **COLD) as stream:
        again = stream.get_final_message().content
    assert [b.type for b in again] == [b.type for b in message.content]
    assert again[0].thinking == thought.thinking
    turns = [*ask, {"role": "assistant", "content": message.content}, *ask]
    client.messages.create(**COLD, **fields | {"messages": turns, "max_tokens": 2})


def test_tokens_are_counted_as_the_answer_counts_them(client):
    fields = {"model": "flashmoe-demo", "messages": ASK, "tools": [ADD], "system": "Be brief."}
    counted = client.messages.count_tokens(**fields)
    message = client.messages.create(**fields, **COLD, max_tokens=1)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert message.stop_reason == "max_tokens"


def test_langchain_runs_a_tool_loop_over_messages(url):
    chat = ChatAnthropic(
        model="flashmoe-demo", base_url=url, api_key="s3cret", temperature=0, max_tokens=60
    )
    answer = chat.bind_tools([ADD]).invoke(ASK[0]["content"])
    assert answer.tool_calls[0]["args"] == {"a": 17, "b": 25}
    chat.max_tokens = 8
    pieces = list(chat.stream("Hello!"))
    assert "".join(p.text for p in pieces) == chat.invoke("Hello!").text


#: What Claude Code sends, shortened.
CLAUDE_CODE = {
    "model": "flashmoe-demo",
    "max_tokens": 5,
    "stream": True,
    "metadata": {"user_id": "user_1"},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=7f3a1;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "low"},
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>x</system-reminder>"},
                {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
            ],
        }
    ],
    "tools": [
        ADD | {"eager_input_streaming": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "not_known_yet": 1,
}


def test_request_of_claude_code_is_answered(url):
    path = "/v1/messages?beta=true"
    response = post(url, CLAUDE_CODE, path)
    assert response.status_code == 200, response.text
    assert "event: message_stop" in response.text
    assert "billing" not in str(chat_fields(CLAUDE_CODE)["messages"])


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"messages": ASK, "max_tokens": None}, 400, "max_tokens is missing"),
        ({"messages": ASK, "max_token": 3}, 400, "did you mean 'max_tokens'"),
        ({"messages": [3]}, 400, r"messages[0] is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "take text only"),
        ({"messages": ASK, "tools": [{"name": "f"}]}, 400, "has no input_schema"),
        ({"messages": ASK, "tool_choice": {"type": "some"}}, 400, "tool_choice"),
        ({"messages": ASK, "thinking": {"type": "on"}}, 400, "use enabled, disabled or adaptive"),
        ({"messages": ASK, "mcp_servers": [{}]}, 400, "mcp_servers"),
        ({"messages": ASK, "stop_sequences": [1]}, 400, "stop_sequences: "),
        ({"messages": ASK, "model": "claude-opus"}, 404, "ask for 'flashmoe-demo'"),
    ],
)
def test_field_that_cannot_be_used_is_refused_in_the_form_of_the_api(url, fields, status, text):
    response = post(url, MODEL | fields)
    error = response.json()
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert (response.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert text in error["error"]["message"]


def test_wrong_key_is_refused_in_the_form_of_the_api(url):
    response = post(url, {}, key="wrong")
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")


# Translation.


def test_results_come_before_what_the_user_says():
    blocks = [
        {"type": "tool_result", "tool_use_id": "1", "content": "no", "is_error": True},
        {"type": "text", "text": "a"},
        {"type": "document", "source": {"type": "text", "data": "b"}},
    ]
    use = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
    turns = [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, use]}]
    turns.append({"role": "user", "content": blocks})
    assistant, result, user = chat_fields({"messages": turns})["messages"]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert result == {"role": "tool", "tool_call_id": "1", "content": "Error: no"}
    assert user == {"role": "user", "content": "a\nb"}


def test_call_that_cannot_be_used_is_text_in_a_whole_message():
    answer = MessagesAnswer("m")
    for event in (
        ToolCallStart(0, "c", "f"),
        ToolCallArguments(0, "c", '{"a": '),
        ToolCall(0, "c", "f", None, "<f a=", error="cut"),
    ):
        answer.chunks(event)
    assert answer._blocks == [{"type": "text", "text": "<f a="}]
