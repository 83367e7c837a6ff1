"""Bodies of OpenAI's API to requests, events to completions. No server, no model."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import errors
from flashmoe.events import End, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from flashmoe.server.openai_errors import ApiError
from flashmoe.server.openai_request import read_call
from flashmoe.server.openai_response import ChatCompletion, to_api_error
from flashmoe.server.request_fields import FIELDS
from flashmoe.server.served_model import ServedModel

SERVED = ServedModel(("toy", "t"), context=512, thinks=True, created=7)
HELLO = [{"role": "user", "content": "Hello"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def call(served=SERVED, **fields):
    return read_call(json.dumps({"model": "toy", "messages": HELLO} | fields).encode(), served)


def refusal(**fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_completion_tokens": 6, "max_tokens": 6}, {"max_tokens": 6}),
        ({"temperature": 0, "top_p": 1, "seed": 3}, {"temperature": 0, "top_p": 1, "seed": 3}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"stop": None}, {"stop": ()}),
        ({"tools": [ADD]}, {"tools": [ADD["function"]], "tool_choice": "auto"}),
        ({"tools": [ADD], "tool_choice": "required"}, {"tool_choice": "required"}),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            {"tool_choice": "add"},
        ),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"response_format": {"type": "text"}}, {"response_format": None}),
        (
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}},
                }
            },
            {"response_format": {"type": "json_schema", "schema": {"type": "integer"}}},
        ),
        ({"reasoning_effort": "none"}, {"think": False}),
        ({"reasoning_effort": "minimal"}, {"think": False}),
        ({"reasoning_effort": "high"}, {"think": True}),
        ({"reasoning_effort": "high", "think": False}, {"think": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"think": False}),
        ({"think": True, "thinking_budget": 9}, {"think": True, "thinking_budget": 9}),
        ({"experts": 2, "top_k": 4, "min_p": 0.1}, {"experts": 2, "top_k": 4, "min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"n": 1, "logprobs": False, "logit_bias": {}, "presence_penalty": 0.0}, {}),
        ({"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, {}),
        ({name: None for name in FIELDS if name not in ("model", "messages")}, {"think": None}),
    ],
)
def test_field_is_lost(fields, expected):
    request = call(**fields).request
    assert {name: getattr(request, name) for name in expected} == expected
    assert request.messages == HELLO


def test_effort_makes_a_model_without_thoughts_think():
    served = ServedModel(("toy",), 512, thinks=False, created=7)
    assert call(served, reasoning_effort="high").request.think is None
    assert call(served, reasoning_effort="none").request.think is False


def test_stream_options_are_lost():
    asked = call(stream=True, stream_options={"include_usage": True})
    assert (asked.stream, asked.include_usage) == (True, True)
    assert (call().stream, call().include_usage) == (False, False)


def test_history_of_calls_is_lost():
    inner = {"name": "add", "arguments": '{"a": 1}'}
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning": "Hm.",
            "tool_calls": [{"id": "c", "type": "function", "function": inner}],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "3"}]},
    ]
    kept = call(messages=messages).request.messages
    assert kept[1]["reasoning_content"] == "Hm."
    assert kept[1]["tool_calls"][0]["function"] == inner
    assert kept[2]["tool_call_id"] == "c"


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": None}, "model", "missing"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hello"}, "messages", "a list"),
        ({"messages": ["Hello"]}, "messages", "a role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "a role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "'image_url'"),
        (
            {"messages": [*HELLO, {"role": "assistant", "function_call": {}}]},
            "messages",
            "function",
        ),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"frobnicate": 1}, "frobnicate", "leave it out"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"temperature": -1}, "temperature", "0 or more"),
        ({"temperature": 10**400}, "temperature", "out of range"),
        ({"top_p": 1.5}, "top_p", "between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"max_completion_tokens": -3}, "max_completion_tokens", "1 or more"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "the same option"),
        ({"seed": -1}, "seed", "out of range"),
        ({"stop": [3]}, "stop", "must be text"),
        ({"stop": ""}, None, "a stop string is empty"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"functions": [{}]}, "functions", "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not a function tool"),
        ({"tools": [ADD, ADD]}, "tools", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice", "not supported"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
            "the tools are add",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format",
            "not a valid JSON schema",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort", "one of none, minimal"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "enable_thinking"),
    ],
)
def test_what_cannot_be_is_taken(fields, param, words):
    error = refusal(**fields)
    assert error.status == 400
    assert error.param == param
    assert words in str(error)
    found = error.body()["error"]
    assert found["type"] == "invalid_request_error"
    assert found["message"] == str(error)


def test_other_model_answers():
    error = refusal(model="gpt-4")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "'toy'" in str(error)
    assert call(model="t").request.messages == HELLO


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"model": "toy"}',
        b'{"model": NaN}',
        b'{"model": 1e999}',
        b'{"model": "\\ud800"}',
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_body_that_is_no_json_object_is_taken(body):
    with pytest.raises(ApiError) as caught:
        read_call(body, SERVED)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(str(caught.value)) < 300


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "role", "content", "schema", "$ref", "id"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def outcome(fields):
    try:
        return read_call(json.dumps(fields).encode(), SERVED)
    except ApiError as e:
        return e


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), _json, max_size=5), st.booleans())
def test_body_ends_in_another_error(fields, whole):
    """Whatever is in the fields: a request, or a refusal that JSON can hold."""
    found = outcome({"model": "toy", "messages": HELLO} | fields if whole else fields)
    if isinstance(found, ApiError):
        assert found.status in (400, 404)
        json.dumps(found.body())


@settings(max_examples=100, deadline=None)
@given(st.lists(_json, min_size=1, max_size=3), st.lists(_json, max_size=2), _json)
def test_messages_and_tools_end_in_another_error(messages, tools, schema):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    fields = {"messages": messages, "tools": tools, "response_format": wanted}
    found = outcome({"model": "toy"} | fields)
    assert not isinstance(found, ApiError) or found.status == 400


END = End(
    finish_reason="stop",
    prompt_tokens=10,
    cached_tokens=4,
    generated_tokens=7,
    reasoning_tokens=2,
    forced_tokens=0,
    steps=7,
    prompt_seconds=0.5,
    seconds=2.0,
    batch=1,
    experts=2,
    trained_experts=3,
    bits=4.0,
    activations="float32",
    ops="cpu",
    hit_rate=0.5,
    bytes_read=170,
    wait_seconds=0.1,
    peak_nbytes=1000,
)


def end(reason: str) -> End:
    return End(**(vars(END) | {"finish_reason": reason}))


def complete(*events, **options):
    completion = ChatCompletion("chatcmpl-1", 5, "toy", **options)
    chunks = [chunk for event in events for chunk in completion.chunks(event)]
    return completion, chunks


def joined(chunks: list[dict]) -> dict:
    """What a client puts together."""
    found = {"content": "", "reasoning_content": "", "calls": {}, "reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                found[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                known = found["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {k: call[k] for k in ("id", "type") if k in call}
                known |= {k: v for k, v in call["function"].items() if k == "name"}
                known["arguments"] += call["function"]["arguments"]
            found["reason"] = choice["finish_reason"] or found["reason"]
    return found


CALLS = (
    Reasoning("I "),
    Reasoning("add."),
    Text("Well"),
    ToolCallStart(0, "c0", "add"),
    ToolCallArguments(0, "c0", '{"a": '),
    ToolCallArguments(0, "c0", "1}"),
    ToolCall(0, "c0", "add", {"a": 1}, "text"),
    ToolCallStart(1, "c1", "now"),
    ToolCallArguments(1, "c1", "{}"),
    ToolCall(1, "c1", "now", {}, "text"),
    end("tool_calls"),
)


def test_stream_and_whole_differ():
    completion, chunks = complete(*CALLS)
    (choice,) = completion.to_dict()["choices"]
    message, found = choice["message"], joined(chunks)
    assert message["content"] == found["content"] == "Well"
    assert message["reasoning_content"] == found["reasoning_content"] == "I add."
    assert choice["finish_reason"] == found["reason"] == "tool_calls"
    whole = [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]
    ]
    assert whole == [("c0", "add", '{"a": 1}'), ("c1", "now", "{}")]
    assert [(c["id"], c["name"], c["arguments"]) for c in found["calls"].values()] == whole
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum("role" in c["choices"][0]["delta"] for c in chunks) == 1
    assert {c["id"] for c in chunks} == {"chatcmpl-1"}


def test_usage_is_wrong():
    expected = {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    completion, chunks = complete(Text("x"), END, include_usage=True)
    assert completion.to_dict()["usage"] == expected
    assert completion.to_dict()["flashmoe"]["hit_rate"] == 0.5
    *rest, last = chunks
    assert (last["choices"], last["usage"]) == ([], expected)
    assert all(chunk["usage"] is None for chunk in rest)
    assert rest[-1]["flashmoe"] == END.figures()
    assert all("usage" not in chunk for chunk in complete(Text("x"), END)[1])


def test_empty_answer_has_no_content():
    completion, chunks = complete(END)
    assert completion.to_dict()["choices"][0]["message"]["content"] == ""
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_bad_call_looks_good():
    """A call whose arguments could not be read is not one without arguments."""
    completion, chunks = complete(
        ToolCallStart(0, "c0", "add"), ToolCall(0, "c0", "add", None, "<x", "no"), end("tool_calls")
    )
    assert joined(chunks)["calls"][0]["arguments"] == "<x"
    whole = completion.to_dict()
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "<x"
    assert whole["flashmoe"]["invalid_tool_calls"][0]["error"] == "no"
    # Without a name it cannot be shown as a call.
    completion, chunks = complete(ToolCall(0, "c0", "", None, "<x", "no"), end("tool_calls"))
    assert joined(chunks)["reason"] == "stop"
    assert completion.to_dict()["choices"][0]["finish_reason"] == "stop"


def output_error(reason: str) -> errors.OutputError:
    error = errors.OutputError("not what was asked for")
    error.end = end(reason)
    return error


def test_answer_cut_short_is_an_error():
    completion, _ = complete(Text('{"a'))
    chunks = completion.error_chunks(output_error("length"))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert completion.to_dict()["choices"][0]["finish_reason"] == "length"
    with pytest.raises(errors.OutputError):
        completion.error_chunks(output_error("stop"))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.ContextError("long"), 400, "context_length_exceeded"),
        (errors.SettingError("experts=9 is out of range"), 400, "invalid_value"),
        (output_error("stop"), 422, "invalid_output"),
        (errors.TimedOut("late"), 504, "timeout"),
        (errors.ReadError("gone"), 500, "model_failed"),
        (ValueError("secret"), 500, None),
    ],
)
def test_error_has_another_status(error, status, code):
    found = to_api_error(error)
    assert (found.status, found.code) == (status, code)
    assert "secret" not in str(found)
    if status >= 500:
        assert found.headers["x-should-retry"] == "false"
    if "experts" in str(error):
        assert found.param == "experts"
