"""Test how events and errors become chat completions, their chunks, and error responses."""

import pytest

from flashmoe import errors
from flashmoe.events import (
    End,
    Logprobs,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)
from flashmoe.server.openai_response import ChatCompletion, to_api_error

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
    """Return what a client makes of the chunks."""
    answer = {"content": "", "reasoning_content": "", "calls": {}, "reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                answer[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                known = answer["calls"].setdefault(call["index"], {"arguments": ""})
                known |= {k: call[k] for k in ("id", "type") if k in call}
                known |= {k: v for k, v in call["function"].items() if k == "name"}
                known["arguments"] += call["function"]["arguments"]
            answer["reason"] = choice["finish_reason"] or answer["reason"]
    return answer


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


def test_chunks_add_up_to_the_whole_completion():
    completion, chunks = complete(*CALLS)
    (choice,) = completion.to_dict()["choices"]
    message, answer = choice["message"], joined(chunks)
    assert message["content"] == answer["content"] == "Well"
    assert message["reasoning_content"] == answer["reasoning_content"] == "I add."
    assert choice["finish_reason"] == answer["reason"] == "tool_calls"
    whole = [
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]
    ]
    assert whole == [("c0", "add", '{"a": 1}'), ("c1", "now", "{}")]
    assert [(c["id"], c["name"], c["arguments"]) for c in answer["calls"].values()] == whole
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum("role" in c["choices"][0]["delta"] for c in chunks) == 1
    assert {c["id"] for c in chunks} == {"chatcmpl-1"}


def test_usage_and_figures_are_reported():
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


def test_empty_answer_has_empty_content():
    completion, chunks = complete(END)
    assert completion.to_dict()["choices"][0]["message"]["content"] == ""
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_invalid_call_is_reported_as_such():
    """Its arguments are no JSON, and what the model wrote is beside its error."""
    completion, chunks = complete(
        ToolCallStart(0, "c0", "add"), ToolCall(0, "c0", "add", None, "<x", "no"), end("stop")
    )
    assert joined(chunks)["calls"][0]["arguments"] == "{"
    whole = completion.to_dict()
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{"
    assert whole["choices"][0]["finish_reason"] == "stop"
    invalid = {"index": 0, "id": "c0", "name": "add", "error": "no", "text": "<x"}
    assert whole["flashmoe"]["invalid_tool_calls"] == [invalid]
    # Without a name it cannot be shown as a call.
    completion, chunks = complete(ToolCall(0, "c0", "", None, "<x", "no"), end("stop"))
    assert joined(chunks)["reason"] == "stop"
    assert "tool_calls" not in completion.to_dict()["choices"][0]["message"]


def test_answers_of_one_completion_are_told_apart():
    completion = ChatCompletion("chatcmpl-1", 5, "toy", include_usage=True, n=2)
    events = [(1, Text("b")), (0, Text("a")), (1, END), (0, end("length"))]
    chunks = [chunk for index, event in events for chunk in completion.chunks(event, index)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [(c["index"], c["delta"].get("content")) for c in choices] == [
        *((1, "b"), (0, "a")),
        *((1, None), (0, None)),
    ]
    assert all(c["delta"]["role"] == "assistant" for c in choices[:2])
    whole = completion.to_dict()
    assert [c["message"]["content"] for c in whole["choices"]] == ["a", "b"]
    assert [c["finish_reason"] for c in whole["choices"]] == ["length", "stop"]
    # The prompt is counted once.
    assert whole["usage"]["prompt_tokens"] == 10
    assert whole["usage"]["completion_tokens"] == 14
    assert chunks[-1]["usage"] == whole["usage"]
    assert [c["usage"] for c in chunks[:-1]] == [None] * 4
    assert len(whole["flashmoe"]["choices"]) == 2


def test_probabilities_come_with_the_text_that_they_belong_to():
    a, b = (TokenLogprob(t, t.encode(), -0.5) for t in "ab")
    completion, chunks = complete(
        Reasoning("hm"), Logprobs(a, (a, b)), Logprobs(b), Text("ab"), Logprobs(b), END
    )
    entry = {"token": "a", "logprob": -0.5, "bytes": [97]}
    other = {"token": "b", "logprob": -0.5, "bytes": [98]}
    first = {**entry, "top_logprobs": [entry, other]}
    second = {**other, "top_logprobs": []}
    sent = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sent[0] is None
    assert [logprobs["content"] for logprobs in sent[1:]] == [[first, second], [second]]
    whole = completion.to_dict()["choices"][0]["logprobs"]
    assert whole == {"content": [first, second, second], "refusal": None}
    assert complete(Text("x"), END)[0].to_dict()["choices"][0]["logprobs"] is None


def output_error(reason: str) -> errors.OutputError:
    error = errors.OutputError("not what was asked for")
    error.end = end(reason)
    return error


def test_answer_cut_short_finishes_with_length():
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
        (errors.LimitError("takes too long"), 400, "limit_exceeded"),
        (output_error("stop"), 422, "invalid_output"),
        (errors.TimedOut("late"), 504, "timeout"),
        (errors.ReadError("gone"), 500, "model_failed"),
        (ValueError("secret"), 500, None),
    ],
)
def test_error_has_its_status_and_code(error, status, code):
    api_error = to_api_error(error)
    assert (api_error.status, api_error.code) == (status, code)
    assert "secret" not in str(api_error)
    if status >= 500:
        assert api_error.headers["x-should-retry"] == "false"
    if "experts" in str(error):
        assert api_error.param == "experts"
