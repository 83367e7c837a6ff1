"""Test how generated tokens become text, reasoning and tool call events."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_call_texts import SPECIAL_TOKENS, TOKENIZER, TOOLS, coder, hermes, tokens_of

from flashmoe.chat.output_parser import OutputParser
from flashmoe.chat.tools import read_tools
from flashmoe.events import Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart


def parse(tokens, stop=(), in_reasoning=False, why="it ended", tools=TOOLS, special=SPECIAL_TOKENS):
    """Return a summary of the events and the parser.

    The summary lists joined texts as (kind, text) and calls as (name, arguments, error), in order.
    """
    parser = OutputParser(TOKENIZER, special, tools, stop, in_reasoning)
    events = [e for t in tokens for e in parser.feed(t)] + [*parser.finish(why)]
    summary, calls = [], {}
    for event in events:
        if isinstance(event, Text | Reasoning):
            kind = "text" if isinstance(event, Text) else "reasoning"
            assert event.text
            if summary and summary[-1][0] == kind:
                summary[-1] = (kind, summary[-1][1] + event.text)
            else:
                summary.append((kind, event.text))
            continue
        pieces = calls.setdefault(event.index, [event.id])
        assert pieces[0] == event.id
        if isinstance(event, ToolCallStart):
            assert len(pieces) == 1
            pieces.append(event.name)
        elif isinstance(event, ToolCallArguments):
            assert len(pieces) > 1
            pieces.append(event.text)
        else:
            assert isinstance(event, ToolCall)
            summary.append((event.name, event.arguments, event.error))
            if event.error is None:
                assert pieces[1] == event.name
                assert json.loads("".join(pieces[2:])) == event.arguments
            else:
                # Clients make a call whose pieces are JSON.
                with pytest.raises(json.JSONDecodeError):
                    json.loads("".join(pieces[2:]))
    errors = [end[2] for end in summary if len(end) == 3]
    assert parser.calls_are_good == (bool(errors) and errors == [None] * len(errors))
    assert [*calls] == list(range(parser.calls))
    assert len({pieces[0] for pieces in calls.values()}) == len(calls)
    assert parser.answer == "".join(text for kind, text, *_ in summary if kind == "text")
    return summary, parser


CALL = f"<tool_call>{coder('words', {'a': 'x'})}</tool_call>"
GOOD = ("words", {"a": "x"}, None)


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("Hello.", [("text", "Hello.")]),
        ("Hello.\n", [("text", "Hello.\n")]),
        ("\n\nHello.", [("text", "Hello.")]),
        ("\n", []),
        ("", []),
        ("<think>\nHm.\n</think>\n\nHello.", [("reasoning", "Hm."), ("text", "Hello.")]),
        ("<think>\n\n</think>\n\nHello.", [("text", "Hello.")]),
        (
            "One.<think>Hm.</think>Two.",
            [("text", "One."), ("reasoning", "Hm."), ("text", "\nTwo.")],
        ),
        (f"\n\n{CALL}", [GOOD]),
        (f"Look:\n\n{CALL}", [("text", "Look:"), GOOD]),
        (f"Look:\n{CALL}\nDone.\n", [("text", "Look:"), GOOD, ("text", "\nDone.\n")]),
        (f"Look:{CALL}Done.", [("text", "Look:"), GOOD, ("text", "\nDone.")]),
        (f"{CALL}\nDone.", [GOOD, ("text", "Done.")]),
        (f"{CALL}\n{CALL}", [GOOD, GOOD]),
        (f"a{CALL}\n{CALL}b", [("text", "a"), GOOD, GOOD, ("text", "\nb")]),
        (f"<think>Hm.\n{CALL}", [("reasoning", "Hm."), GOOD]),
        (f"<think>Hm.</think>{CALL}", [("reasoning", "Hm."), GOOD]),
        ("a</tool_call>b<tool_response>c<|im_start|>d", [("text", "abcd")]),
        ("a\U0001f600b\u00e9\n日本", [("text", "a\U0001f600b\u00e9\n日本")]),
    ],
)
def test_answer_is_split_into_text_reasoning_and_calls(text, summary, bytewise):
    assert parse(tokens_of(text, bytewise=bytewise))[0] == summary


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("Hm.\n</think>\n\nHello.", [("reasoning", "Hm."), ("text", "Hello.")]),
        ("\nHm.\n\nSo\n</think>\n\n", [("reasoning", "Hm.\n\nSo")]),
        ("</think>\n\nHello.", [("text", "Hello.")]),
        ("Hm.\n", [("reasoning", "Hm.")]),
        ("a<think>b</think>c", [("reasoning", "ab"), ("text", "c")]),
        (f"Hm.{CALL}", [("reasoning", "Hm."), GOOD]),
    ],
)
def test_reasoning_opened_by_the_prompt_is_reported_as_reasoning(text, summary, bytewise):
    assert parse(tokens_of(text, bytewise=bytewise), in_reasoning=True)[0] == summary


def test_kind_of_the_next_token_follows_the_answer():
    parser = OutputParser(TOKENIZER, SPECIAL_TOKENS, TOOLS, in_reasoning=True)
    kinds = []
    for token in tokens_of(f"Hm.</think>a{CALL}"):
        kinds.append(parser.kind)
        list(parser.feed(token))
    inside = len(tokens_of(coder("words", {"a": "x"})))
    before = ["reasoning"] * len(tokens_of("Hm.</think>")) + ["answer"] * len(tokens_of("a<think>"))
    assert kinds == [*before, *["call"] * (inside + 1)]
    assert parser.kind == "answer"


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        (coder("other", {"a": 1}), "other", "there is no tool 'other': the tools are words,"),
        (coder("words", {"a": 1, "d": 2}), "words", None),
        (coder("typed", {"count": "x"}), "typed", "cannot be read: the parameter 'count' is 'x'"),
        (coder("typed", {"x": 1}).replace("=x", "=count>\n3\n"), "typed", "cannot be read"),
        ("hello", "", "the call cannot be read: it has no <function=NAME> at its start"),
        ("", "", "the call cannot be read"),
        ("<function=words>\n<think>\n</function>", "words", "comes '<think>"),
        ("<function=words>\n<tool_call>\n</function>", "words", "comes '<tool_call>"),
        (
            "<function=words>\n</function>\n<function=words>\n</function>",
            "words",
            "not </function>",
        ),
    ],
)
def test_bad_call_is_reported_with_its_error(body, name, error, bytewise):
    tokens = tokens_of(f"a<tool_call>{body}</tool_call>b", bytewise=bytewise)
    (first, (called, arguments, wrong), last), parser = parse(tokens)
    assert (first, last) == (("text", "a"), ("text", "\nb"))
    assert called == name
    assert parser.calls == 1
    if error is None:
        assert (arguments, wrong) == ({"a": "1", "d": 2}, None)
    else:
        assert arguments is None
        assert error in wrong


@pytest.mark.parametrize("bytewise", [False, True])
def test_calls_in_the_json_format_are_parsed(bytewise):
    special = replace(SPECIAL_TOKENS, tool_parser="json_tools")
    bodies = [hermes("words", {"a": "é\n"}), hermes("other", {}), coder("words", {"a": "x"}), ""]
    tokens = tokens_of("".join(f"<tool_call>{b}</tool_call>" for b in bodies), (), bytewise)
    (good, unknown, other, empty), _ = parse(tokens, special=special)
    assert good == ("words", {"a": "é\n"}, None)
    assert unknown[2].startswith("there is no tool 'other'")
    assert other[:2] == empty[:2] == ("", None)
    assert "the call cannot be read: it is not JSON" in other[2]


def test_control_token_inside_a_call_is_kept_as_text():
    """Without a grammar a model may write it in the middle of a value."""
    value = "a <think> b <|im_start|> c"
    tokens = tokens_of(f"<tool_call>{coder('words', {'a': value})}</tool_call>")
    assert parse(tokens)[0] == [("words", {"a": value}, None)]


def test_arguments_against_the_schema_are_an_error():
    tools = read_tools(
        [{"name": "f", "parameters": {"properties": {"a": {}}, "required": ["a", "b"]}}]
    )
    [(name, arguments, error)], _ = parse(
        tokens_of(f"<tool_call>{coder('f', {'a': 1})}</tool_call>"), tools=tools
    )
    assert (name, arguments) == ("f", None)
    assert error.startswith("the arguments of f do not fit its schema: 'b' is a required property")


def test_call_cut_short_is_reported_with_its_error():
    tokens = tokens_of(f"a{CALL}")
    for end in range(2, len(tokens)):
        (first, (name, arguments, error)), parser = parse(tokens[:end], why="max_tokens=9")
        assert first == ("text", "a")
        assert name in ("", "words")
        assert arguments is None
        assert error == "the answer ended inside the call (max_tokens=9)"
        assert parser.calls == 1


def test_text_of_a_call_is_what_the_model_wrote():
    parser = OutputParser(TOKENIZER, SPECIAL_TOKENS, TOOLS)
    body = coder("typed", {"count": "three", "text": "a  b"})
    events = [e for t in tokens_of(f"<tool_call>{body}</tool_call>") for e in parser.feed(t)]
    assert events[-1].text == body.strip("\n")


def test_answer_cut_inside_a_character_keeps_the_text_before_it():
    tokens = tokens_of("a\U0001f600", bytewise=True)
    for end in range(2, len(tokens)):
        ((kind, text),), _ = parse(tokens[:end])
        assert kind == "text"
        assert text.rstrip("\ufffd") == "a"


# Stop strings.

SEGMENTS = st.lists(
    st.tuples(
        st.sampled_from(["text", "text", "reasoning", "call"]),
        st.lists(
            st.sampled_from(["STOP", "ST", "S", "OP", "a", "a b", "\n", "é", "日", "\U0001f600"]),
            max_size=6,
        ).map("".join),
    ),
    max_size=5,
)
STOPS = st.lists(
    st.sampled_from(["STOP", "TO", "a", "\n", "\n\n", "P\n", "é日", "S", "b\nS"]), max_size=3
)


def expected(segments, stop):
    """Return the summary that the segments must give, worked out from the whole text at once."""
    summary, answer = [], ""
    for place, (kind, text) in enumerate(segments):
        if kind == "call":
            summary.append(GOOD)
            continue
        text = text.lstrip("\n")
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        if kind == "text" and ends:
            text = text[: min(ends)[1]]
        elif kind == "reasoning" or place + 1 < len(segments):
            text = text.rstrip("\n")
        if kind == "text" and text and answer:
            text = "\n" + text
        if text and summary and summary[-1][0] == kind:
            summary[-1] = (kind, summary[-1][1] + text)
        elif text:
            summary.append((kind, text))
        if kind == "text":
            answer += text
            if ends:
                return summary, True
    return summary, False


@settings(max_examples=300, deadline=None)
@given(SEGMENTS, STOPS, st.lists(st.integers(0, 60), max_size=12), st.booleans())
def test_events_do_not_depend_on_how_the_text_is_cut_into_tokens(segments, stop, places, bytewise):
    merged = []
    for kind, text in segments:
        if merged and kind == "text" and merged[-1][0] == "text":
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    marked = {"text": "{}", "reasoning": "<think>{}</think>", "call": CALL}
    text = "".join(marked[kind].format(text) for kind, text in merged)
    tokens = tokens_of(text, places, bytewise)
    summary, parser = parse(tokens, tuple(stop))
    assert (summary, parser.stopped) == expected(merged, stop)
    if parser.stopped:
        assert [*parser.feed(tokens[0])] == []
        assert [*parser.finish("x")] == []
