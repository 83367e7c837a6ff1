"""Test conversations as clients send them back: cut calls, late system messages, prefills."""

import json

import openai
import pytest
from example_tools import ADD
from server_in_thread import serve

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine

HELLO = [{"role": "user", "content": "Hello."}]
STORY = [{"role": "user", "content": "Write a story about a dog."}]
WRITE = {
    "type": "function",
    "function": {
        "name": "write_file",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
            "required": ["path", "text"],
        },
    },
}


@pytest.fixture(scope="module")
def client():
    engine = Engine(find(DEMO))
    with engine, serve(engine, name="flashmoe-demo") as server:
        yield openai.OpenAI(base_url=server.url, api_key="x")


def ask(client, messages=HELLO, **fields):
    fields = {"model": "flashmoe-demo", "temperature": 0, "max_tokens": 8} | fields
    return client.chat.completions.create(messages=messages, **fields)


@pytest.mark.parametrize("limit", [9, 14, 20])
def test_call_that_was_cut_short_can_be_sent_back(client, limit):
    fields = {"tools": [WRITE], "tool_choice": "required", "max_tokens": limit}
    whole = ask(client, **fields).choices[0]
    assert whole.finish_reason == "length"
    [call] = whole.message.tool_calls
    assert "<" not in call.function.arguments
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)
    pieces = [c.choices[0].delta.tool_calls for c in ask(client, **fields, stream=True)]
    text = "".join(p[0].function.arguments or "" for p in pieces if p)
    assert text == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "Error: cut short"}
    history = [*HELLO, whole.message.model_dump(exclude_none=True), result]
    assert ask(client, history, tools=[WRITE]).choices[0].message.content is not None


def test_late_system_messages_keep_the_prefix_for_twelve_turns(client):
    messages, cached = [{"role": "system", "content": "Rule. " * 40}], []
    for turn in range(12):
        late = {"role": "system", "content": f"reminder {turn}"}
        messages += [late, {"role": "user", "content": f"q{turn}"}]
        answer = ask(client, messages, max_tokens=2)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or "x"})
    assert all(later > earlier for earlier, later in zip(cached, cached[1:], strict=False))


def test_last_message_of_the_assistant_is_continued(client):
    said = {"role": "assistant", "content": "The answer is"}
    answer = ask(client, [*HELLO, said]).choices[0].message.content
    assert answer.startswith(" ")
    assert ask(client, [*HELLO, said], extra_body={"continue_final_message": False})


def test_system_messages_are_answered(client):
    system = {"role": "system", "content": "Say hello."}
    assert ask(client, [system]).choices[0].message.content
    said = {"role": "assistant", "content": "y"}
    assert ask(client, [*HELLO, said, system]).choices[0].message.content


def test_several_answers_and_their_probabilities(client):
    fields = {"n": 3, "logprobs": True, "top_logprobs": 2, "temperature": 1, "seed": 5}
    answer = ask(client, STORY, **fields)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) > 1
    for choice in answer.choices:
        tokens = choice.logprobs.content
        text = b"".join(bytes(t.bytes) for t in tokens).decode(errors="replace")
        assert text.strip() == choice.message.content.strip()
        assert all(len(t.top_logprobs) == 2 for t in tokens)
    texts = ["", "", ""]
    for chunk in ask(client, STORY, **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in answer.choices]


def test_penalties_and_odd_texts_are_taken(client):
    plain = ask(client, STORY, max_tokens=40).choices[0].message.content
    varied = ask(client, STORY, max_tokens=40, presence_penalty=2, frequency_penalty=2)
    assert varied.choices[0].message.content != plain
    body = {"chat_template_kwargs": {"preserve_thinking": True}, "enable_thinking": False}
    assert (
        ask(client, extra_body=body).choices[0].message.content
        == ask(client).choices[0].message.content
    )


def test_one_odd_tool_does_not_refuse_the_others(client):
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^\\p{L}+$"}}}
    odd = {
        "type": "function",
        "function": {"name": "odd", "parameters": parameters | {"required": ["b"]}},
    }
    answer = ask(
        client,
        tools=[odd, {"type": "function", "function": ADD}],
        tool_choice="required",
        max_tokens=60,
    ).choices[0]
    assert answer.finish_reason in ("tool_calls", "length")
