"""Test how events become message chunks, and that a broken call does not look like a whole one."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessageChunk

from flashmoe.errors import OutputError, ReadError, SettingError
from flashmoe.events import (
    End,
    Logprobs,
    Progress,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)
from langchain_flashmoe import IncompleteOutput, InvalidRequest, ModelFailed
from langchain_flashmoe.chunks import Translator

END = End(
    finish_reason="tool_calls",
    batch=1,
    prompt_tokens=20,
    cached_tokens=12,
    generated_tokens=9,
    reasoning_tokens=4,
    forced_tokens=2,
    steps=7,
    prompt_seconds=0.5,
    seconds=2.0,
    experts=4,
    trained_experts=10,
    bits=4,
    activations="float32",
    ops="cpu",
    hit_rate=0.75,
    bytes_read=1700,
    wait_seconds=0.1,
    peak_nbytes=10**9,
)


def translated(*events):
    """Return the sum of the chunks, and the whole message."""
    translate = Translator("m")
    chunks = [chunk.message for chunk in map(translate, events) if chunk is not None]
    first, *rest = chunks
    return first + rest if rest else first, translate.message


def call(index, arguments, pieces=None, error=None, text="raw"):
    id = f"c{index}"
    pieces = [json.dumps(arguments)] if pieces is None else pieces
    yield ToolCallStart(index, id, "add")
    for piece in pieces:
        yield ToolCallArguments(index, id, piece)
    yield ToolCall(index, id, "add", None if error else arguments, text, error)


def test_message_has_every_part_of_the_answer():
    events = [
        Progress(1, 2, 3, 4),
        Reasoning("hm"),
        Reasoning("!"),
        Text("so "),
        Text("it is"),
        *call(0, {"a": 1, "b": "x"}, ['{"a": 1', ', "b": "x"', "}"]),
        *call(1, {}),
        END,
    ]
    for message in translated(*events):
        assert message.text == "so it is"
        assert message.additional_kwargs == {"reasoning_content": "hm!"}
        assert [b["type"] for b in message.content_blocks] == [
            "reasoning",
            "text",
            "tool_call",
            "tool_call",
        ]
        assert [(c["id"], c["args"]) for c in message.tool_calls] == [
            ("c0", {"a": 1, "b": "x"}),
            ("c1", {}),
        ]
        assert message.invalid_tool_calls == []
        assert message.usage_metadata == {
            "input_tokens": 20,
            "output_tokens": 9,
            "total_tokens": 29,
            "input_token_details": {"cache_read": 12},
            "output_token_details": {"reasoning": 4},
        }
        metadata = message.response_metadata
        assert metadata["model_name"] == "m"
        assert metadata["model_provider"] == "flashmoe"
        assert metadata["finish_reason"] == "tool_calls"
        assert metadata["tokens_per_second"] == 4.0
        assert metadata["experts"] == 4
        assert metadata["bits"] == 4
        assert metadata["hit_rate"] == 0.75


def test_only_the_last_chunk_has_usage_and_is_marked():
    translate = Translator("m")
    chunks = [translate(e).message for e in (Text("a"), *call(0, {"a": 1})) if translate(e)]
    assert not any(c.usage_metadata or c.response_metadata or c.chunk_position for c in chunks)
    assert translate(END).message.chunk_position == "last"


def test_only_the_first_chunk_of_a_call_has_its_name_and_id():
    translate = Translator("m")
    pieces = [translate(e) for e in call(0, {"a": 1}, ['{"a"', ": 1}"])]
    pieces = [p.message.tool_call_chunks[0] for p in pieces if p is not None]
    assert [p["name"] for p in pieces] == ["add", None, None]
    assert [p["id"] for p in pieces] == ["c0", None, None]
    assert [p["args"] for p in pieces] == ["", '{"a"', ": 1}"]
    assert {p["index"] for p in pieces} == {0}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists)),
    st.integers(0, 200),
    st.booleans(),
)
def test_broken_call_is_an_invalid_call(arguments, length, ascii):
    """LangChain completes JSON that is cut short, so half a call could look like a whole one."""
    cut = json.dumps(arguments, ensure_ascii=ascii)[:length]
    events = [*call(0, {"a": 1}), *call(1, None, [cut], error="cut", text="<function"), END]
    streamed, whole = translated(*events)
    for message in (streamed, whole):
        assert [c["id"] for c in message.tool_calls] == ["c0"]
        assert [c["id"] for c in message.invalid_tool_calls] == ["c1"]
    assert whole.invalid_tool_calls[0]["error"] == "cut"
    assert whole.invalid_tool_calls[0]["args"] == "<function"


@pytest.mark.parametrize("text", ["<function=", "", '{"name": "add"', '{"name": "add"}', "3"])
def test_call_that_could_not_be_parsed_keeps_its_text(text):
    streamed, whole = translated(ToolCall(0, "c0", "", None, text, "no name"), END)
    for message in (streamed, whole):
        assert message.tool_calls == []
        assert len(message.invalid_tool_calls) == 1
    assert whole.invalid_tool_calls[0]["args"] == text


def test_answer_cut_short_raises_or_is_returned_on_request():
    translate = Translator("m")
    translate(Text('{"a": '))
    error = OutputError("it is cut short")
    error.end = END
    with pytest.raises(IncompleteOutput, match="it is cut short") as raised:
        translate.finish_failed(error, keep=False)
    assert raised.value.llm_output == '{"a": '
    assert raised.value.raw_message.usage_metadata["output_tokens"] == 9
    last = translate.finish_failed(error, keep=True).message
    assert isinstance(last, AIMessageChunk)
    assert last.chunk_position == "last"


@pytest.mark.parametrize(
    ("error", "expected"), [(SettingError("x"), InvalidRequest), (ReadError("x"), ModelFailed)]
)
def test_other_errors_are_raised_in_any_case(error, expected):
    with pytest.raises(expected, match="x"):
        Translator("m").finish_failed(error, keep=True)


def test_empty_answer_is_an_empty_message():
    assert translated(END)[1].content == ""
    assert Translator("m").message.content == ""


@pytest.mark.parametrize(
    ("reason", "normalized"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "tool_call"), ("cancelled", None)],
)
def test_reason_of_the_end_has_the_name_that_langchain_has_for_it(reason, normalized):
    total, message = translated(Text("x"), replace(END, finish_reason=reason))
    for metadata in (total.response_metadata, message.response_metadata):
        assert metadata["finish_reason"] == reason
        assert metadata.get("normalized_finish_reason") == normalized


def test_added_chunks_have_the_errors_of_invalid_calls():
    events = [*call(0, {"a": 1}), *call(1, None, ['{"a": '], error="cut")]
    total, message = translated(*events, END)
    invalid = [{"id": "c1", "name": "add", "error": "cut"}]
    assert total.response_metadata["invalid_tool_calls"] == invalid
    assert message.response_metadata["invalid_tool_calls"] == invalid
    assert [c["error"] for c in message.invalid_tool_calls] == ["cut"]
    assert "invalid_tool_calls" not in translated(Text("x"), END)[0].response_metadata


def test_probabilities_add_up_in_the_metadata():
    a, b = (TokenLogprob(t, t.encode(), -0.5) for t in "ab")
    total, message = translated(Logprobs(a, (a, b)), Text("a"), Logprobs(b), Text("b"), END)
    entry, other = ({"token": t, "logprob": -0.5, "bytes": [ord(t)]} for t in "ab")
    content = [entry | {"top_logprobs": [entry, other]}, other | {"top_logprobs": []}]
    assert total.response_metadata["logprobs"] == {"content": content}
    assert message.response_metadata["logprobs"] == {"content": content}
    assert message.text == "ab"
