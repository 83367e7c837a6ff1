"""Test the Responses API with the openai package, LangChain, and what Codex sends."""

import json

import example_tools
import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from server_in_thread import serve

from flashmoe.errors import OutputError
from flashmoe.events import End, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from flashmoe.server.openai_errors import ApiError
from flashmoe.server.responses_answer import ResponsesAnswer
from flashmoe.server.responses_request import decrypted, encrypted, input_messages
from flashmoe.server.responses_tools import ResponsesTools

ADD = {"type": "function", **example_tools.ADD}
ASK = "What is 17 plus 25? Use the tool."
MODEL = {"model": "flashmoe-demo", "temperature": 0, "max_output_tokens": 60}
NO_TOOLS = ResponsesTools(None, None)


class Dog(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, name="flashmoe-demo", store=2) as server:
        yield server.url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


# Clients.


def test_openai_client_runs_a_stateless_tool_loop(client):
    ask = {"role": "user", "content": ASK}
    response = client.responses.create(**MODEL, input=[ask], tools=[ADD], store=False)
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 17, "b": 25})
    assert (response.status, response.store) == ("completed", False)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    items = [ask, *(item.model_dump() for item in response.output), result]
    done = client.responses.create(**MODEL, input=items, tools=[ADD], store=False)
    assert "42" in done.output_text
    assert done.usage.input_tokens_details.cached_tokens > 50
    assert done.flashmoe["experts"]


def test_streamed_response_is_the_same_and_its_events_are_in_order(client):
    options = {"input": ASK, "tools": [ADD]}
    whole = client.responses.create(**MODEL, **options)
    events = list(client.responses.create(**MODEL, **options, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    types = [e.type.removeprefix("response.") for e in events]
    assert types[:3] == ["created", "in_progress", "output_item.added"]
    assert types[-1] == "completed"
    assert len(set(types)) > 5
    last = events[-1].response
    arguments = [item.arguments for item in last.output if item.type == "function_call"]
    assert arguments == [i.arguments for i in whole.output if i.type == "function_call"]
    pieces = [e.delta for e in events if e.type.endswith("function_call_arguments.delta")]
    assert "".join(pieces) == arguments[0]
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [i.id for i in done] == [i.id for i in last.output]


def test_response_is_continued_by_its_id(client):
    first = client.responses.create(**MODEL, input="Hello!", instructions="Be brief.")
    again = client.responses.create(**MODEL, input="More.", previous_response_id=first.id)
    alone = client.responses.create(
        **MODEL,
        input=[
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "More."},
        ],
        store=False,
    )
    assert again.output_text == alone.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    for id in (first.id, alone.id, "resp_x"):
        with pytest.raises(openai.BadRequestError, match="is not stored here") as caught:
            client.responses.create(**MODEL, input="More.", previous_response_id=id)
        assert caught.value.code == "previous_response_not_found"


def test_structured_output_is_parsed(client):
    fields = MODEL | {"max_output_tokens": 60}
    parsed = client.responses.parse(**fields, input="Invent a dog.", text_format=Dog)
    assert isinstance(parsed.output_parsed, Dog)


def test_answer_that_is_cut_short_is_incomplete(client):
    response = client.responses.create(**MODEL | {"max_output_tokens": 3}, input="Hello!")
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    *_, last = client.responses.create(
        **MODEL | {"max_output_tokens": 3}, input="Hello!", stream=True
    )
    assert last.type == "response.incomplete"


def test_reasoning_comes_as_an_item_and_goes_back(client):
    options = {"include": ["reasoning.encrypted_content"], "store": False}
    options |= {"extra_body": {"thinking_budget": 10}, "reasoning": {"effort": "low"}}
    fields = MODEL | {"max_output_tokens": 16}
    response = client.responses.create(**fields, input="What is 3 plus 4?", **options)
    thought = response.output[0]
    assert thought.type == "reasoning"
    text = thought.content[0].text
    assert text
    assert decrypted(thought.encrypted_content) == text
    options["reasoning"]["summary"] = "auto"
    events = list(client.responses.create(**fields, input="Hi", **options, stream=True))
    deltas = [e.delta for e in events if e.type == "response.reasoning_summary_text.delta"]
    assert "".join(deltas) == events[-1].response.output[0].summary[0].text


def test_langchain_runs_a_tool_loop_over_responses(url):
    chat = ChatOpenAI(
        model="flashmoe-demo",
        base_url=url,
        api_key="none",
        temperature=0,
        max_tokens=60,
        use_responses_api=True,
    )
    bound = chat.bind_tools([{"type": "function", "function": example_tools.ADD}])
    answer = bound.invoke(ASK)
    assert answer.tool_calls[0]["args"] == {"a": 17, "b": 25}
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream("Hello!"))
    assert "".join(p.text for p in pieces) == chat.invoke("Hello!").text


#: The fields and the kinds of tools that Codex sends, as its source has them.
CODEX = {
    "model": "flashmoe-demo",
    "instructions": "You are a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions/>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Run ls."}],
        },
    ],
    "tools": [
        {
            "type": "function",
            "name": "shell",
            "description": "Runs a command.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "array", "items": {"type": "string"}}},
                "required": ["command"],
                "additionalProperties": False,
            },
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edits files.",
            "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
        },
        {"type": "web_search", "external_web_access": False},
        {"type": "image_generation", "output_format": "png"},
        {"type": "namespace", "name": "mcp__docs__", "description": "", "tools": [ADD]},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "none", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "text": {"verbosity": "medium"},
    "client_metadata": {"x-codex-installation-id": "1"},
    "not_known_yet": 1,
}


@pytest.mark.parametrize(
    ("choice", "name", "namespace", "kind"),
    [
        ({"type": "function", "name": "shell"}, "shell", None, "function_call"),
        ({"type": "custom", "name": "apply_patch"}, "apply_patch", None, "custom_tool_call"),
        (
            {"type": "function", "name": "mcp__docs__add"},
            "add",
            "mcp__docs__",
            "function_call",
        ),
    ],
)
def test_request_of_codex_gets_a_call(url, choice, name, namespace, kind):
    fields = CODEX | {"tool_choice": choice, "max_output_tokens": 80, "temperature": 0}
    response = httpx.post(url + "/responses", json=fields, timeout=120)
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    events = [json.loads(line.partition("data: ")[2]) for line in lines if "data: " in line]
    names = [line.split("\n")[0].removeprefix("event: ") for line in lines if "data: " in line]
    assert names == [event["type"] for event in events]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    (item,) = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert (item["type"], item["name"], item.get("namespace")) == (kind, name, namespace)
    back = [*CODEX["input"], item, {"type": f"{kind}_output", "call_id": item["call_id"]}]
    back[-1]["output"] = [{"type": "input_text", "text": "done"}]
    fields = CODEX | {"input": back, "max_output_tokens": 5}
    assert httpx.post(url + "/responses", json=fields, timeout=120).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "max_output_token": 3}, "max_output_token"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "temperature": "hot"}, "temperature"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [3]}, "input"),
        ({"input": "x", "tools": [3]}, "tools"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text"),
        ({"input": "x", "reasoning": {"effort": "huge"}}, "reasoning"),
        ({"input": "x", "conversation": "c"}, "conversation"),
    ],
)
def test_field_that_cannot_be_used_is_named(url, fields, param):
    response = httpx.post(url + "/responses", json=MODEL | fields, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# Translation.


def test_items_of_one_turn_are_one_message():
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "encrypted_content": encrypted("b")},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "x"},
        {"type": "web_search_call", "id": "3"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
    ]
    _, turn, result = input_messages(items, NO_TOOLS)
    assert (turn["reasoning_content"], turn["content"]) == ("b", "c")
    assert [call["function"]["name"] for call in turn["tool_calls"]] == ["f", "g"]
    assert json.loads(turn["tool_calls"][1]["function"]["arguments"]) == {"input": "x"}
    assert result == {"role": "tool", "tool_call_id": "1", "content": "d"}


@pytest.mark.parametrize("content", [None, 3, "gAAAA", "e30=", "bnVsbA==", "[" * 9000])
def test_encrypted_content_of_others_is_no_thought(content):
    assert decrypted(content) == ""


def test_allowed_tools_are_those_that_are_described():
    tools = [ADD, {**ADD, "name": "sub"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "sub"}]}
    allowed = ResponsesTools(tools, choice)
    assert [t["function"]["name"] for t in allowed.definitions] == ["sub"]
    assert allowed.choice == "required"


def end(reason: str) -> End:
    return End(
        reason, 9, 3, 4, 1, 0, 4, 0.5, 1.0, 1, 2, 2, 4.0, "float32", "cpu", 1.0, 0, 0.0, 1
    )  # fmt: skip


def answer(*events, tools=NO_TOOLS):
    head = {"id": "resp_1", "object": "response", "model": "m"}
    built = ResponsesAnswer(head, tools)
    return built, [*built.first_chunks(), *(c for e in events for c in built.chunks(e))]


def test_each_item_ends_before_the_next_begins():
    call = ToolCall(0, "c", "f", {"a": 1}, "")
    built, chunks = answer(
        Reasoning("r"),
        Text("t"),
        ToolCallStart(0, "c", "f"),
        ToolCallArguments(0, "c", '{"a":1}'),
        call,
        Text("u"),
        end("stop"),
    )
    items = [
        (c["type"].rpartition(".")[2], c["output_index"])
        for c in chunks
        if "output_item" in c["type"]
    ]
    assert items == [(name, i) for i in range(4) for name in ("added", "done")]
    kinds = [item["type"] for item in built.to_dict()["output"]]
    assert kinds == ["reasoning", "message", "function_call", "message"]


def test_call_that_is_cut_is_no_complete_item():
    tools = ResponsesTools([{"type": "custom", "name": "patch"}], None)
    for name, kind in (("f", "function_call"), ("patch", "custom_tool_call")):
        cut = ToolCall(0, "c", name, None, "<x>", error="cut")
        built, _ = answer(
            ToolCallStart(0, "c", name),
            ToolCallArguments(0, "c", '{"input": "ab'),
            cut,
            end("length"),
            tools=tools,
        )
        response = built.to_dict()
        (item,) = response["output"]
        assert (item["type"], item["status"]) == (kind, "incomplete")
        assert item.get("input", "ab") == "ab"
        assert response["flashmoe"]["invalid_tool_calls"][0]["error"] == "cut"


def test_error_ends_the_stream_as_failed():
    built, _ = answer(Text("t"))
    (failed,) = built.failure_chunks(ApiError(500, "broken", code="model_failed"))
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "model_failed", "message": "broken"}
    with pytest.raises(OutputError):
        built.error_chunks(OutputError("no JSON"))
