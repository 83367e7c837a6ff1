"""Test how bodies of OpenAI's API become requests or are refused, without a server."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.server.openai_errors import ApiError
from flashmoe.server.openai_request import read_call
from flashmoe.server.request_fields import FIELDS
from flashmoe.server.served_model import ServedModel, ServedModels

SERVED = ServedModels([ServedModel(("toy", "t"), context=512, thinks=True, created=7)])
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
        (
            {"n": 1, "logprobs": False, "logit_bias": {}, "presence_penalty": 0.0},
            {"logprobs": None},
        ),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -1},
            {"presence_penalty": 1.5, "frequency_penalty": -1},
        ),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logit_bias": {"7": -100}}, {"logit_bias": {"7": -100}}),
        ({}, {"max_tokens": 512, "continue_last": True, "chat_template_kwargs": {}}),
        ({"max_tokens": -1, "top_k": -1, "seed": -1}, {"max_tokens": 512, "top_k": None}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "preserve_thinking": True}},
            {"think": False, "chat_template_kwargs": {"preserve_thinking": True}},
        ),
        ({"enable_thinking": False}, {"think": False}),
        ({"preserve_thinking": True}, {"chat_template_kwargs": {"preserve_thinking": True}}),
        ({"reasoning": {"effort": "none"}}, {"think": False}),
        ({"reasoning": {"enabled": True}}, {"think": True}),
        ({"continue_final_message": False}, {"continue_last": False}),
        ({"add_generation_prompt": True}, {"continue_last": False}),
        ({"add_generation_prompt": True, "continue_final_message": True}, {"continue_last": True}),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, {"continue_last": False}),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {"type": "object"}}},
            {"response_format": {"type": "json_schema", "schema": {"type": "object"}}},
        ),
        ({"keep_alive": "5m", "cache_prompt": True, "usage": {"include": True}}, {}),
        ({"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, {}),
        ({name: None for name in FIELDS if name not in ("model", "messages")}, {"think": None}),
    ],
)
def test_field_reaches_the_request(fields, expected):
    request = call(**fields).request
    assert {name: getattr(request, name) for name in expected} == expected
    assert request.messages == HELLO


def test_effort_is_ignored_by_a_model_without_reasoning():
    served = ServedModels([ServedModel(("toy",), 512, thinks=False, created=7)])
    assert call(served, reasoning_effort="high").request.think is None
    assert call(served, reasoning_effort="none").request.think is False


def test_half_a_surrogate_pair_is_replaced():
    """JavaScript clients that cut text inside an emoji send one."""
    body = b'{"model": "toy", "messages": [{"role": "user", "content": "cut \\ud83d"}]}'
    assert read_call(body, SERVED).request.messages[0]["content"] == "cut \ufffd"


def test_answers_of_one_request_are_unlike():
    assert [r.seed for r in call(n=3, seed=2**64 - 2).requests] == [2**64 - 2, 2**64 - 1, 0]
    assert call(n=2).requests == (call().request,) * 2


def test_default_length_is_the_option_of_the_server():
    served = ServedModels([ServedModel(("toy",), 512, thinks=True, created=7, max_tokens=99)])
    assert call(served).request.max_tokens == 99
    assert call(served, max_tokens=200).request.max_tokens == 200


def test_stream_options_are_read():
    chat_call = call(stream=True, stream_options={"include_usage": True})
    assert (chat_call.stream, chat_call.include_usage) == (True, True)
    assert (call().stream, call().include_usage) == (False, False)


def test_history_of_calls_reaches_the_request():
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
    history = call(messages=messages).request.messages
    assert history[1]["reasoning_content"] == "Hm."
    assert history[1]["tool_calls"][0]["function"] == inner
    assert history[2]["tool_call_id"] == "c"


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
        ({"temperature": -1}, "temperature", "between 0 and 100"),
        ({"temperature": 10**400}, "temperature", "out of range"),
        ({"top_p": 1.5}, "top_p", "between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"max_completion_tokens": -3}, "max_completion_tokens", "1 or more"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "the same option"),
        ({"seed": -2}, "seed", "out of range"),
        ({"stop": [3]}, "stop", "must be text"),
        ({"stop": ""}, "stop", "an empty string"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"n": 0}, "n", "between 1 and 16"),
        ({"n": 17}, "n", "between 1 and 16"),
        ({"n": True}, "n", "an integer"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"x": 2}}, "logit_bias", "the id of a token"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
        ({"presence_penalty": 2.5}, "presence_penalty", "between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "between -2 and 2"),
        ({"enable_thinking": "yes"}, "enable_thinking", "true or false"),
        ({"reasoning": {"effort": "much"}}, "reasoning", "one of none"),
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
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "leave it out"),
        ({"chat_template_kwargs": {"enable_thinking": 3}}, "chat_template_kwargs", "true or"),
        (
            {"response_format": {"type": "json_object", "shema": {}}},
            "response_format",
            "has 'shema', which the type json_object does not have",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "response_format",
            "has 'x'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "x": 1}},
            "response_format",
            "has 'x' beside its json_schema",
        ),
    ],
)
def test_invalid_field_is_refused(fields, param, words):
    error = refusal(**fields)
    assert error.status == 400
    assert error.param == param
    assert words in str(error)
    details = error.body()["error"]
    assert details["type"] == "invalid_request_error"
    assert details["message"] == str(error)


def outcome(body):
    """Return the call that is read, or the error."""
    try:
        return read_call((body if isinstance(body, str) else json.dumps(body)).encode(), SERVED)
    except ApiError as e:
        return e


def nested(text):
    """Return a list and an object that hold this JSON text 90 levels deep."""
    return "[" * 90 + text + "]" * 90, '{"a":' * 90 + text + "}" * 90


#: JSON texts of values of every kind and size.
JUNK = [
    *("null", "true", "false", "0", "-1", "1.5", "1e308", "1e-320", "-0.0", str(10**400)),
    *('""', '"x"', '"auto"', json.dumps("x" * 10**5), "[]", "{}", "[null]", "[[]]", "[{}]", "[1]"),
    *('["x"]', '{"type": []}', '{"type": {}}', '{"type": "json_schema", "json_schema": []}'),
    *('{"type": "json_schema", "json_schema": {"schema": [1]}}', '{"type": "regex", "pattern": 1}'),
    *('{"type": "regex", "pattern": "("}', '{"type": "lark", "grammar": "x"}'),
    *('{"type": "function", "function": {"name": []}}', '{"include_usage": []}', '[{"role": []}]'),
    *('[{"role": "user", "content": 1}]', '[{"role": "assistant", "tool_calls": 1}]'),
    *('[{"role": "assistant", "reasoning_content": {}}]', '[{"role": "tool", "content": {}}]'),
    *('[{"type": "function", "function": {"name": "a", "parameters": 1}}]', *nested("1")),
]


@pytest.mark.parametrize("field", FIELDS)
def test_any_value_of_a_field_is_read_or_refused_by_its_name(field):
    for value in JUNK:
        fields = {"model": '"toy"', "messages": json.dumps(HELLO)} | {field: value}
        body = "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
        result = outcome(body)
        if isinstance(result, ApiError):
            assert result.status in (400, 404), value
            assert result.param == field, (value, str(result))
            assert len(str(result)) < 400, value


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        # Parsing such bodies would hold up all other threads.
        (b'{"metadata": [' + b"[]," * 250_000 + b"1]}", None, "more than 200000 JSON values"),
        (b'{"metadata": {' + b'"a":1,' * 250_000 + b'"a":1}}', None, "200000 JSON values"),
        (b'{"' + b"x" * 10**6 + b'": 1}', "x" * 120, "is not a known field"),
        (json.dumps({"model": "toy", "messages": HELLO * 5000}), "messages", "5000 messages"),
    ],
)
def test_large_body_is_refused_early(body, param, words):
    with pytest.raises(ApiError, match=words) as caught:
        read_call(body if isinstance(body, bytes) else body.encode(), SERVED)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


def test_text_may_have_any_number_of_separators():
    text = '[{"a\\\\": ,' * 100_000
    messages = [{"role": "user", "content": text}]
    assert call(messages=messages).request.messages == messages


def test_unknown_model_is_refused():
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
        b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_body_that_is_not_a_json_object_is_refused(body):
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


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), _json, max_size=5), st.booleans())
def test_arbitrary_fields_are_read_or_refused(fields, whole):
    """Any fields give a request, or an error that can be sent as JSON."""
    result = outcome({"model": "toy", "messages": HELLO} | fields if whole else fields)
    if isinstance(result, ApiError):
        assert result.status in (400, 404)
        json.dumps(result.body())


@settings(max_examples=100, deadline=None)
@given(st.lists(_json, min_size=1, max_size=3), st.lists(_json, max_size=2), _json)
def test_arbitrary_messages_and_tools_are_read_or_refused(messages, tools, schema):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    fields = {"messages": messages, "tools": tools, "response_format": wanted}
    result = outcome({"model": "toy"} | fields)
    assert not isinstance(result, ApiError) or result.status == 400
