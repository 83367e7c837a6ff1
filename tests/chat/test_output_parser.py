"""reply.py: generated tokens as events, however they come."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_call_texts import CONTROL, TOKENIZER, TOOLS, coder, hermes, tokens_of

from flashmoe.chat.output_parser import Reply
from flashmoe.chat.tools import read_tools
from flashmoe.events import Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart


def reply_to(tokens, stop=(), in_thought=False, why="it ended", tools=TOOLS, control=CONTROL):
    """(what came, in order, and the reply): texts joined, a call as (name, arguments, error)."""
    reply = Reply(TOKENIZER, control, tools, stop, in_thought)
    events = [e for t in tokens for e in reply.feed(t)] + [*reply.finish(why)]
    came, calls = [], {}
    for event in events:
        if isinstance(event, Text | Reasoning):
            kind = "text" if isinstance(event, Text) else "thought"
            assert event.text
            if came and came[-1][0] == kind:
                came[-1] = (kind, came[-1][1] + event.text)
            else:
                came.append((kind, event.text))
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
            came.append((event.name, event.arguments, event.error))
            if event.error is None:
                assert pieces[1] == event.name
                assert json.loads("".join(pieces[2:])) == event.arguments
    assert [*calls] == list(range(reply.calls))
    assert len({pieces[0] for pieces in calls.values()}) == len(calls)
    assert reply.answer == "".join(text for kind, text, *_ in came if kind == "text")
    return came, reply


CALL = f"<tool_call>{coder('words', {'a': 'x'})}</tool_call>"
GOOD = ("words", {"a": "x"}, None)


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("text", "came"),
    [
        ("Hello.", [("text", "Hello.")]),
        ("Hello.\n", [("text", "Hello.\n")]),
        ("\n\nHello.", [("text", "Hello.")]),
        ("\n", []),
        ("", []),
        ("<think>\nHm.\n</think>\n\nHello.", [("thought", "Hm."), ("text", "Hello.")]),
        ("<think>\n\n</think>\n\nHello.", [("text", "Hello.")]),
        ("One.<think>Hm.</think>Two.", [("text", "One."), ("thought", "Hm."), ("text", "\nTwo.")]),
        (f"\n\n{CALL}", [GOOD]),
        (f"Look:\n\n{CALL}", [("text", "Look:"), GOOD]),
        (f"Look:\n{CALL}\nDone.\n", [("text", "Look:"), GOOD, ("text", "\nDone.\n")]),
        (f"Look:{CALL}Done.", [("text", "Look:"), GOOD, ("text", "\nDone.")]),
        (f"{CALL}\nDone.", [GOOD, ("text", "Done.")]),
        (f"{CALL}\n{CALL}", [GOOD, GOOD]),
        (f"a{CALL}\n{CALL}b", [("text", "a"), GOOD, GOOD, ("text", "\nb")]),
        (f"<think>Hm.\n{CALL}", [("thought", "Hm."), GOOD]),
        (f"<think>Hm.</think>{CALL}", [("thought", "Hm."), GOOD]),
        ("a</tool_call>b<tool_response>c<|im_start|>d", [("text", "abcd")]),
        ("a\U0001f600b\u00e9\n日本", [("text", "a\U0001f600b\u00e9\n日本")]),
    ],
)
def test_reply_comes_as_other_events(text, came, bytewise):
    assert reply_to(tokens_of(text, bytewise=bytewise))[0] == came


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("text", "came"),
    [
        ("Hm.\n</think>\n\nHello.", [("thought", "Hm."), ("text", "Hello.")]),
        ("\nHm.\n\nSo\n</think>\n\n", [("thought", "Hm.\n\nSo")]),
        ("</think>\n\nHello.", [("text", "Hello.")]),
        ("Hm.\n", [("thought", "Hm.")]),
        ("a<think>b</think>c", [("thought", "ab"), ("text", "c")]),
        (f"Hm.{CALL}", [("thought", "Hm."), GOOD]),
    ],
)
def test_thought_that_the_prompt_opened_comes_as_an_answer(text, came, bytewise):
    assert reply_to(tokens_of(text, bytewise=bytewise), in_thought=True)[0] == came


def test_kind_of_the_next_token_is_another():
    reply = Reply(TOKENIZER, CONTROL, TOOLS, in_thought=True)
    kinds = []
    for token in tokens_of(f"Hm.</think>a{CALL}"):
        kinds.append(reply.kind)
        list(reply.feed(token))
    inside = len(tokens_of(coder("words", {"a": "x"})))
    before = ["thought"] * len(tokens_of("Hm.</think>")) + ["answer"] * len(tokens_of("a<think>"))
    assert kinds == [*before, *["call"] * (inside + 1)]
    assert reply.kind == "answer"


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("body", "name", "error"),
    [
        (coder("other", {"a": 1}), "other", "there is no tool 'other'; the tools are: words,"),
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
def test_bad_call_is_reported_as_a_good_one(body, name, error, bytewise):
    tokens = tokens_of(f"a<tool_call>{body}</tool_call>b", bytewise=bytewise)
    (first, (called, arguments, wrong), last), reply = reply_to(tokens)
    assert (first, last) == (("text", "a"), ("text", "\nb"))
    assert called == name
    assert reply.calls == 1
    if error is None:
        assert (arguments, wrong) == ({"a": "1", "d": 2}, None)
    else:
        assert arguments is None
        assert error in wrong


@pytest.mark.parametrize("bytewise", [False, True])
def test_reply_reads_one_format_as_the_other(bytewise):
    control = replace(CONTROL, style="json_tools")
    bodies = [hermes("words", {"a": "é\n"}), hermes("other", {}), coder("words", {"a": "x"}), ""]
    tokens = tokens_of("".join(f"<tool_call>{b}</tool_call>" for b in bodies), (), bytewise)
    (good, unknown, other, empty), _ = reply_to(tokens, control=control)
    assert good == ("words", {"a": "é\n"}, None)
    assert unknown[2].startswith("there is no tool 'other'")
    assert other[:2] == empty[:2] == ("", None)
    assert "the call cannot be read: it is not JSON" in other[2]


def test_control_token_inside_a_call_is_lost():
    """Without a grammar a model may write it in the middle of a value."""
    value = "a <think> b <|im_start|> c"
    tokens = tokens_of(f"<tool_call>{coder('words', {'a': value})}</tool_call>")
    assert reply_to(tokens)[0] == [("words", {"a": value}, None)]


def test_arguments_against_the_schema_are_reported_as_good():
    tools = read_tools(
        [{"name": "f", "parameters": {"properties": {"a": {}}, "required": ["a", "b"]}}]
    )
    [(name, arguments, error)], _ = reply_to(
        tokens_of(f"<tool_call>{coder('f', {'a': 1})}</tool_call>"), tools=tools
    )
    assert (name, arguments) == ("f", None)
    assert error.startswith("the arguments of f do not fit its schema: 'b' is a required property")


def test_call_cut_short_is_lost_or_reported_as_a_good_one():
    tokens = tokens_of(f"a{CALL}")
    for end in range(2, len(tokens)):
        (first, (name, arguments, error)), reply = reply_to(tokens[:end], why="max_tokens=9")
        assert first == ("text", "a")
        assert name in ("", "words")
        assert arguments is None
        assert error == "the answer ended inside the call (max_tokens=9)"
        assert reply.calls == 1


def test_text_of_a_call_is_not_what_the_model_wrote():
    reply = Reply(TOKENIZER, CONTROL, TOOLS)
    body = coder("typed", {"count": "three", "text": "a  b"})
    events = [e for t in tokens_of(f"<tool_call>{body}</tool_call>") for e in reply.feed(t)]
    assert events[-1].text == body.strip("\n")


def test_reply_cut_inside_a_character_raises():
    tokens = tokens_of("a\U0001f600", bytewise=True)
    for end in range(2, len(tokens)):
        ((kind, text),), _ = reply_to(tokens[:end])
        assert kind == "text"
        assert text.rstrip("\ufffd") == "a"


# Stop strings.

SEGMENTS = st.lists(
    st.tuples(
        st.sampled_from(["text", "text", "thought", "call"]),
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
    """What comes of texts, thoughts and calls in turn, by going over the whole text."""
    came, answer = [], ""
    for place, (kind, text) in enumerate(segments):
        if kind == "call":
            came.append(GOOD)
            continue
        text = text.lstrip("\n")
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        if kind == "text" and ends:
            text = text[: min(ends)[1]]
        elif kind == "thought" or place + 1 < len(segments):
            text = text.rstrip("\n")
        if kind == "text" and text and answer:
            text = "\n" + text
        if text and came and came[-1][0] == kind:
            came[-1] = (kind, came[-1][1] + text)
        elif text:
            came.append((kind, text))
        if kind == "text":
            answer += text
            if ends:
                return came, True
    return came, False


@settings(max_examples=300, deadline=None)
@given(SEGMENTS, STOPS, st.lists(st.integers(0, 60), max_size=12), st.booleans())
def test_events_depend_on_how_the_text_was_cut_into_tokens(segments, stop, places, bytewise):
    merged = []
    for kind, text in segments:
        if merged and kind == "text" and merged[-1][0] == "text":
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    marked = {"text": "{}", "thought": "<think>{}</think>", "call": CALL}
    text = "".join(marked[kind].format(text) for kind, text in merged)
    tokens = tokens_of(text, places, bytewise)
    came, reply = reply_to(tokens, tuple(stop))
    assert (came, reply.stopped) == expected(merged, stop)
    if reply.stopped:
        assert [*reply.feed(tokens[0])] == []
        assert [*reply.finish("x")] == []
