"""Test that the openai package and LangChain's ChatOpenAI work with a server of the demo model."""

import asyncio
import json
import re
from pathlib import Path
from typing import Literal

import example_tools
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from server_in_thread import serve

from flashmoe.server.request_fields import FIELDS

ADD = {"type": "function", "function": example_tools.ADD}
ASK = [{"role": "user", "content": "What is 17 plus 25? Use the tool."}]


class Dog(BaseModel):
    name: str
    color: Literal["brown", "black"]
    age: int


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, name="flashmoe-demo") as server:
        yield server.url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def create(client):
    def create(messages=ASK, **options):
        options = {"temperature": 0, "max_tokens": 60} | options
        return client.chat.completions.create(model="flashmoe-demo", messages=messages, **options)

    return create


def test_openai_client_runs_a_tool_loop(create):
    message = create(tools=[ADD]).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 17, "b": 25})
    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    # The message is sent back as it was received, with all of its empty fields.
    completion = create([*ASK, message.model_dump(), result], tools=[ADD])
    assert "42" in completion.choices[0].message.content
    assert completion.usage.prompt_tokens_details.cached_tokens > 50


def test_streamed_call_adds_up(create):
    options = {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}
    chunks = list(create(stream=True, **options))
    calls = [c for k in chunks for c in k.choices[0].delta.tool_calls or ()]
    assert calls[0].id
    assert [c.function.name for c in calls if c.function.name] == ["add"]
    assert json.loads("".join(c.function.arguments for c in calls)) == {"a": 17, "b": 25}
    assert {c.index for c in calls} == {0}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_helpers_parse_the_answer(client):
    fields = {"model": "flashmoe-demo", "temperature": 0, "max_tokens": 100}
    ask = [{"role": "user", "content": "Invent a dog."}]
    completion = client.chat.completions.parse(messages=ask, response_format=Dog, **fields)
    assert isinstance(completion.choices[0].message.parsed, Dog)
    with client.chat.completions.stream(messages=ask, response_format=Dog, **fields) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            messages=ask, response_format=Dog, **fields | {"max_tokens": 3}
        )
    tool = openai.pydantic_function_tool(Dog)
    completion = client.chat.completions.parse(
        messages=ask, tools=[tool], tool_choice="required", **fields
    )
    assert completion.choices[0].message.tool_calls[0].function.parsed_arguments


def test_json_object_format_gives_json(create):
    completion = create(
        [{"role": "user", "content": "A dog as JSON."}],
        response_format={"type": "json_object"},
        max_tokens=60,
    )
    text = completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_reasoning_is_apart_from_the_content(create):
    completion = create(
        [{"role": "user", "content": "What is 3 plus 4?"}],
        reasoning_effort="low",
        max_tokens=200,
        extra_body={"thinking_budget": 20},
    )
    message = completion.choices[0].message
    assert message.reasoning_content
    assert message.reasoning_content not in message.content
    assert 0 < completion.usage.completion_tokens_details.reasoning_tokens <= 25
    off = create([{"role": "user", "content": "Hello!"}], reasoning_effort="none")
    assert not hasattr(off.choices[0].message, "reasoning_content")


def test_async_client_gets_the_same_answer(url, create):
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            fields = {"model": "flashmoe-demo", "temperature": 0, "max_tokens": 20}
            stream = await client.chat.completions.create(messages=ASK, stream=True, **fields)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(ask()) == create(max_tokens=20).choices[0].message.content


@pytest.fixture
def chat(url):
    return ChatOpenAI(
        model="flashmoe-demo", base_url=url, api_key="none", temperature=0, max_tokens=80
    )


def test_langchain_gets_the_same_answer(chat, create):
    answer = chat.invoke("Hello!")
    assert answer.text == create([{"role": "user", "content": "Hello!"}]).choices[0].message.content
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream("Hello!", stream_usage=True))
    assert "".join(c.text for c in chunks) == answer.text
    assert chunks[-1].usage_metadata or chunks[-2].usage_metadata
    assert asyncio.run(chat.ainvoke("Hello!")).text == answer.text


def test_langchain_runs_a_tool_loop(chat):
    bound = chat.bind_tools([ADD])
    ask = HumanMessage(ASK[0]["content"])
    answer = bound.invoke([ask])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 17, "b": 25})
    done = bound.invoke([ask, answer, ToolMessage("42", tool_call_id=call["id"])])
    assert "42" in done.text
    whole = None
    for chunk in bound.stream([ask]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_structured_output(chat, method):
    assert isinstance(chat.with_structured_output(Dog, method=method).invoke("Invent a dog."), Dog)


PAGES = Path(__file__).parents[2] / "docs"
DOCS = (PAGES / "serve.md").read_text()
BOTH = DOCS + (PAGES / "clients.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", BOTH, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_of_the_docs_runs(url, code, capsys):
    assert "http://127.0.0.1:8080" in code
    exec(code.replace("http://127.0.0.1:8080", url.removesuffix("/v1")), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("field", FIELDS)
def test_docs_name_every_field(field):
    assert f"`{field}`" in DOCS or FIELDS[field] is FIELDS["user"] or f"`{field}:" in DOCS
