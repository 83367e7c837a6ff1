"""tool_formats.py, tools.py and reply.py: what models write, well or badly, as calls and events."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashmoe import tools as tools_module
from flashmoe.catalog import DEMO, find
from flashmoe.control import Control
from flashmoe.errors import SettingError
from flashmoe.events import Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from flashmoe.reply import Reply
from flashmoe.tool_formats import CoderCall, HermesCall, Malformed
from flashmoe.tools import check_choice, read_tools

TOKENIZER = load_tokenizer(find(DEMO))
CONTROL = Control.of(TOKENIZER)

WORDS = {n: {"type": "string"} for n in "abc"}
TYPED = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "many": {"type": "array", "items": {"type": "string"}},
    "thing": {"type": "object"},
}
TOOLS = read_tools(
    [
        {"name": "words", "parameters": {"type": "object", "properties": WORDS}},
        {"name": "typed", "parameters": {"type": "object", "properties": TYPED}},
        {"name": "none"},
    ]
)


def coder(name, arguments):
    """A call as the template of Qwen3.5 writes it, from after its start marker."""
    body = ""
    for key, value in arguments.items():
        raw = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        body += f"<parameter={key}>\n{raw}\n</parameter>\n"
    return f"\n<function={name}>\n{body}</function>\n"


def hermes(name, arguments):
    """The same as the template of Qwen3."""
    call = {"name": name, "arguments": arguments}
    return f"\n{json.dumps(call, ensure_ascii=False)}\n"


WRITERS = {CoderCall: coder, HermesCall: hermes}
BOTH = pytest.mark.parametrize("kind", [CoderCall, HermesCall], ids=["coder", "hermes"])


def read(kind, pieces, tools=TOOLS):
    """(name, arguments) of a call that comes in pieces; its pieces of JSON are checked."""
    call = kind(tools)
    given = [piece for text in pieces for piece in call.feed(text)]
    name, arguments, rest = call.finish()
    assert call.name == name
    assert json.loads("".join([*given, rest])) == arguments
    return name, arguments


def cut(text, places):
    ends = sorted({min(p, len(text)) for p in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


CUTS = st.lists(st.integers(0, 200), max_size=8)
FRAGMENTS = ["</parameter>", "</function>", "<tool_call>", "\n", "a", " ", "<", '"', "\\", "{", "}"]
STRINGS = st.text(max_size=8) | st.lists(
    st.sampled_from([*FRAGMENTS, "é", "\U0001f600"]), max_size=6
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=4,
)
VALUES = {
    "text": STRINGS,
    "count": st.integers(),
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "maybe": st.none() | st.integers(),
    "many": st.lists(STRINGS, max_size=3),
    "thing": st.dictionaries(STRINGS, JSON, max_size=3),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)


def unwritable(value):
    """The Coder format has no escapes: a string that holds the end of a value cannot be written."""
    return isinstance(value, str) and bool(
        re.search(r"(^|\n)</parameter>(\n|$)|</parameter>\s*</function>", value)
    )


# Calls as they should be.


@BOTH
@settings(max_examples=200, deadline=None)
@given(arguments=ARGUMENTS, places=CUTS)
def test_call_reads_as_another_one_or_by_the_cuts(kind, arguments, places):
    if kind is CoderCall:
        assume(not any(unwritable(v) for v in arguments.values()))
    text = WRITERS[kind]("typed", arguments)
    name, found = read(kind, cut(text, places))
    assert (name, json.dumps(found)) == ("typed", json.dumps(arguments))


@BOTH
def test_call_comes_whole_instead_of_piece_by_piece(kind):
    arguments = {"a": "one", "b": "two"}
    call, given = kind(TOOLS), []
    for c in WRITERS[kind]("words", arguments):
        given += call.feed(c)
    expected = {
        CoderCall: ['{"a": "one"', ', "b": "two"'],
        HermesCall: list(json.dumps(arguments)),
    }
    assert given == expected[kind]
    assert call.finish()[2] == {CoderCall: "}", HermesCall: ""}[kind]


@BOTH
def test_call_without_parameters_is_malformed(kind):
    assert read(kind, [WRITERS[kind]("none", {})]) == ("none", {})


@BOTH
def test_big_integer_loses_digits(kind):
    arguments = {"count": 12345678901234567890123}
    assert read(kind, [WRITERS[kind]("typed", arguments)]) == ("typed", arguments)


@BOTH
def test_call_of_an_unknown_tool_is_malformed(kind):
    assert read(kind, [WRITERS[kind]("other", {"a": 3})]) == ("other", {"a": 3})


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=words><parameter=a>x</parameter></function>", {"a": "x"}),
        ("<function=words>\n<parameter=a>x\n</parameter></function>", {"a": "x"}),
        ("<function=words>\n<parameter=a>\nx</parameter>\n</function>", {"a": "x"}),
        ("<function=words>\n<parameter=a>\n\n</parameter>\n</function>", {"a": ""}),
        ("<function=words>\n<parameter=a>\n</parameter>\n</function>", {"a": ""}),
        ("<function=words>\n<parameter=a></parameter>\n</function>", {"a": ""}),
        ("<function=words>\n\n  <parameter=a>\n x \n</parameter>\n\n</function>", {"a": " x "}),
        (
            "<function=words><parameter=a>1</parameter><parameter=b>2</parameter></function>",
            {"a": "1", "b": "2"},
        ),
        (
            "<function=words>\n<parameter=a>\n</function> and </parameter> in a line\n"
            "</parameter>\n<parameter=b>\n`<parameter=c>` in one\n</parameter>\n</function>",
            {"a": "</function> and </parameter> in a line", "b": "`<parameter=c>` in one"},
        ),
        ("<function= words >\n<parameter= a >\nx\n</parameter>\n</function>", {"a": "x"}),
    ],
)
def test_coder_call_with_other_white_space_is_malformed(text, arguments):
    assert read(CoderCall, [text]) == ("words", arguments)
    assert read(CoderCall, list(text)) == ("words", arguments)


@pytest.mark.parametrize(
    "text",
    [
        '{"name":"words","arguments":{"a":"x"}}',
        ' {\n "name" : "words" ,\n "arguments" : { "a" : "x" }\n}\n',
        '{"arguments": {"a": "x"}, "name": "words"}',
        '{"name": "words", "arguments": {"a": "x"}, "id": "1"}',
        '{"id": "1", "name": "words", "arguments": {"a": "x"}}',
        '{"name": "w\\u006frds", "arguments": {"a": "\\u0078"}}',
        '{"name": "words", "arguments": {"a": "y", "a": "x"}}',
    ],
)
def test_hermes_call_written_otherwise_is_malformed(text):
    assert read(HermesCall, [text]) == ("words", {"a": "x"})
    assert read(HermesCall, list(text)) == ("words", {"a": "x"})


def test_hermes_call_without_arguments_is_malformed():
    assert read(HermesCall, ['{"name": "none"}']) == ("none", {})


# Calls as they should not be.


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "it has no <function=NAME> at its start"),
        ("hello", "it has no <function=NAME> at its start"),
        ("hello <function=words>\n</function>", "it has no <function=NAME> at its start"),
        ("<function=>\n</function>", "it has no <function=NAME> at its start"),
        ("<function>\n</function>", "it has no <function=NAME> at its start"),
        ("<parameter=a>\nx\n</parameter>\n</function>", "it has no <function=NAME>"),
        ("<function=words>", "after 0 parameters comes '', not </function>"),
        ("<function=words>\n<parameter=a>\nx\n</parameter>\n", "after 1 parameters comes ''"),
        ("<function=words>\nx\n</function>", "after 0 parameters comes 'x\\n</function>'"),
        ("<function=words>\n<parameter=a>\nx\n</function>\n", "comes '<parameter=a>\\nx"),
        (
            "<function=words>\n<parameter=a>\nx\n<parameter=b>\ny\n</parameter>\n</function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>x<parameter=b>y</parameter></function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>x<parameter=b>\ny\n</parameter>\n</function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>x</parameter>\n<parameter=b>\ny\n</parameter>\n"
            "</function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>\nx\n</function>\n<function=words>\n<parameter=b>\ny\n"
            "</parameter>\n</function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>\nx\n</parameter> </function>\n<parameter=b>\ny\n"
            "</parameter>\n</function>",
            "the parameter 'a' is not closed before the next tag",
        ),
        (
            "<function=words>\n<parameter=a>\nx\n</parameter>\n</function>\n"
            "<function=words>\n<parameter=b>\ny\n</parameter>\n</function>\n",
            "after 1 parameters comes '</function>\\n<function=words>",
        ),
        (
            "<function=words>\n</function>\n<function=words>\n</function>",
            "after 0 parameters comes '</function>\\n<function=words>",
        ),
        ("<function=words>\n</function>\nDone.", "comes '</function>\\nDone.', not </function>"),
        ("<function=words>\n<parameter=>\nx\n</parameter>\n</function>", "comes '<parameter=>"),
        (
            "<function=words>\n<parameter=a>\nx\n</parameter>\n<parameter=a>\ny\n</parameter>\n"
            "</function>",
            "the parameter 'a' is given twice",
        ),
        (
            "<function=typed>\n<parameter=count>\nthree\n</parameter>\n</function>",
            "the parameter 'count' is 'three': 'three' is not of type 'integer'",
        ),
        (
            "<function=typed>\n<parameter=thing>\n{'a': 1}\n</parameter>\n</function>",
            "the parameter 'thing' is \"{'a': 1}\"",
        ),
        (
            "<function=typed>\n<parameter=count>\n1e999\n</parameter>\n</function>",
            "the parameter 'count' is '1e999'",
        ),
        ('{"name": "words", "arguments": {}}', "it has no <function=NAME> at its start"),
    ],
)
def test_malformed_coder_call_is_read(text, wrong):
    for pieces in ([text], list(text)):
        with pytest.raises(Malformed) as caught:
            read(CoderCall, pieces)
        assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "it is not JSON"),
        ("hello", "it is not JSON"),
        ("{}", 'it is no object with a "name"'),
        ("[]", 'it is no object with a "name"'),
        ('{"name": 3, "arguments": {}}', 'it is no object with a "name"'),
        ('{"arguments": {}}', 'it is no object with a "name"'),
        ('{"name": "words", "arguments": []}', 'its "arguments" are [], not an object'),
        ('{"name": "words", "arguments": null}', 'its "arguments" are None, not an object'),
        ('{"name": "words", "arguments": "{}"}', "its \"arguments\" are '{}', not an object"),
        ('{"name": "words", "arguments": {"a": "x"}} Done.', "it is not JSON: Extra data"),
        ('{"name": "words", "arguments": {}}\n{"name": "words", "arguments": {}}', "Extra data"),
        ('{"name": "words", "arguments": {"a": [}}', "it is not JSON"),
        ('{"name": "words", "arguments": {"a": ]}}', "it is not JSON"),
        ('{"name": "words", "arguments": {"a": "x"}', "it is not JSON"),
        ('{"name": "words", "arguments": {"a": x}}', "it is not JSON"),
        ('{"name": "words", "arguments": {"a": NaN}}', "it is not JSON: NaN"),
        ('{"name": "words", "arguments": {"a": 1e999}}', "it is not JSON: 1e999"),
        ('{"name": "words", "arguments": {"a": "\\ud83d"}}', "it is not JSON"),
        ('{"name": "w\\q", "arguments": {"a": "x"}}', "it is not JSON"),
        ('{"name": "words", "arguments": {"a": "x\ny"}}', "it is not JSON: Invalid control"),
        ('{"name": "words", "arguments": {}, "arguments": {"a": "x"}}', "twice"),
        ('{"name": "words", "arguments": {"a": 1}, "arguments": {"a": true}}', "twice"),
        ('{"name": "words", "arguments": {}, "name": "none"}', "twice"),
        ('{"name": "words", "arguments": ' + '{"a": [' * 10**5, "it is not JSON"),
        ("<function=words>\n</function>", "it is not JSON"),
    ],
)
def test_malformed_hermes_call_is_read(text, wrong):
    for pieces in ([text], cut(text, range(1, 99))):
        with pytest.raises(Malformed) as caught:
            read(HermesCall, pieces)
        assert wrong in str(caught.value)


@BOTH
def test_call_that_was_cut_short_is_read(kind):
    arguments = {"text": "a\n</parameter> b", "many": ["x"], "thing": {"a": {}}, "count": 12}
    text = WRITERS[kind]("typed", arguments)
    for end in range(len(text.rstrip())):
        with pytest.raises(Malformed):
            read(kind, [text[:end]])
    assert read(kind, [text.rstrip()]) == ("typed", arguments)


TAGS = ["<function=words>", "<parameter=a>", "<parameter=b>", "</parameter>", "</function>"]
FUNCTION, A, B, CLOSE, END = TAGS
CODER_CALL = [FUNCTION, "\n", A, "\n", "x", "\n", CLOSE, "\n"]
CODER_CALL += [B, "\n", "y", "\n", CLOSE, "\n", END]
HERMES_CALL = ["{", '"name"', ": ", '"words"', ", ", '"arguments"', ": ", "{"]
HERMES_CALL += ['"a"', ": ", '"x"', ", ", '"b"', ": ", '"x"', "}", "}"]
HERMES_PARTS = [*set(HERMES_CALL), '"', "[", "]", "x", "\\", "1", "\n", "é"]


def damaged(call, parts):
    """Texts that differ from a call in a few places."""
    place = st.integers(0, len(call) - 1)
    some = st.lists(st.sampled_from(sorted(parts)), max_size=2)

    def change(replaced, added, again):
        found = [[part] for part in call]
        for at, new in replaced.items():
            found[at] = new
        for at, new in added.items():
            found[at] = found[at] + new
        if again is not None:
            start, end = sorted(again)
            found[end:end] = found[start:end]
        return "".join(part for some in found for part in some)

    few = st.dictionaries(place, some, max_size=2)
    return st.builds(change, few, few, st.none() | st.tuples(place, place))


def outcome(kind, pieces):
    try:
        return read(kind, pieces)
    except Malformed as e:
        return str(e)


@settings(max_examples=400, deadline=None)
@given(damaged(CODER_CALL, [*TAGS, "\n", " ", "x", "y"]), CUTS)
def test_damaged_coder_call_reads_as_what_is_not_there(text, places):
    found = outcome(CoderCall, [text])
    assert outcome(CoderCall, cut(text, places)) == found
    if isinstance(found, str):
        return
    # All of the text is what was read and the tags around it.
    keys = "".join(
        rf"\s*<parameter={key}>\n?{re.escape(value)}\n?</parameter>"
        for key, value in found[1].items()
    )
    assert re.fullmatch(rf"\s*<function=words>{keys}\s*</function>\s*", text)
    assert not any(re.search(r"<(parameter|function)=\w+>$", v, re.M) for v in found[1].values())


@settings(max_examples=400, deadline=None)
@given(damaged(HERMES_CALL, HERMES_PARTS), CUTS)
def test_damaged_hermes_call_reads_as_what_is_not_there(text, places):
    found = outcome(HermesCall, [text])
    assert outcome(HermesCall, cut(text, places)) == found
    if not isinstance(found, str):
        call = json.loads(text)
        assert found == (call["name"], call.get("arguments", {}))


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text(), places=CUTS)
def test_any_text_raises_something_else(kind, text, places):
    assert isinstance(outcome(kind, cut(text, places)), str)


# The tools of a request.


@pytest.mark.parametrize(
    ("definition", "wrong"),
    [
        (3, "a tool has the name None: names are up to 128 characters"),
        ({}, "a tool has the name None"),
        ({"function": None}, "a tool has the name None"),
        ({"function": {"name": 3}}, "a tool has the name 3"),
        ({"name": ""}, "a tool has the name ''"),
        ({"name": "two words"}, "a tool has the name 'two words'"),
        ({"name": "a\n"}, "a tool has the name 'a\\n'"),
        ({"name": "<|im_end|>"}, "a tool has the name '<|im_end|>'"),
        ({"name": 'a"b'}, "a tool has the name 'a\"b'"),
        ({"name": "x" * 129}, "a tool has the name 'xxx"),
        ({"name": "words"}, "two tools are named 'words': rename one"),
        ({"name": "f", "parameters": "x"}, "the parameters of tool 'f' is no JSON schema"),
        ({"name": "f", "parameters": [1]}, "the parameters of tool 'f' is no JSON schema"),
        ({"name": "f", "parameters": True}, "the parameters of tool 'f' are of type True: they"),
        ({"name": "f", "parameters": {"type": "array"}}, "are of type 'array': they must be an"),
        ({"name": "f", "parameters": {"type": ["object"]}}, "are of type ['object']: they must"),
        ({"name": "f", "parameters": {"type": "objekt"}}, "tool 'f' is no valid JSON schema"),
        ({"name": "f", "parameters": {"$ref": "#/x", "x": {"type": "null"}}}, "are of type 'null'"),
        ({"name": "f", "parameters": {"$ref": "#/x"}}, "refers to '#/x', where there is no schema"),
        ({"name": "f", "parameters": {"$ref": "#"}}, "are '#', which cannot be followed: write"),
        ({"name": "f", "parameters": {"$ref": "#a"}}, "are '#a', which cannot be followed: write"),
    ],
)
def test_tool_that_cannot_be_used_is_taken(definition, wrong):
    with pytest.raises(SettingError) as caught:
        read_tools([{"name": "words"}, definition])
    assert wrong in str(caught.value)


def test_definition_of_a_tool_is_not_what_the_template_wants():
    inner = {"name": "f", "description": "d", "strict": True}
    empty = {"type": "object", "properties": {}}
    for definition in (inner, {"type": "function", "function": inner}):
        tool = read_tools([definition])["f"]
        assert tool.definition == {"type": "function", "function": {**inner, "parameters": empty}}
        assert tool.parameters == empty


def test_parameters_behind_a_reference_are_empty():
    defs = {"Args": {"properties": {"a": {"$ref": "#/$defs/A"}}}, "A": {"type": "integer"}}
    tools = read_tools([{"name": "f", "parameters": {"$ref": "#/$defs/Args", "$defs": defs}}])
    assert tools["f"].parameters["properties"] == {"a": {"$ref": "#/$defs/A"}}
    assert read(CoderCall, [coder("f", {"a": 3})], tools) == ("f", {"a": 3})
    assert tools_module.fault("f", {"a": 3}, tools) is None
    assert "'x' is not of type 'integer' (at ['a']" in tools_module.fault("f", {"a": "x"}, tools)


@pytest.mark.parametrize(
    ("choice", "tools", "wrong"),
    [
        ("required", {}, "tool_choice='required' needs tools, and the request has none"),
        ("words", {}, "tool_choice='words' needs tools"),
        ("other", TOOLS, "'other' is neither auto, none, required nor a tool: the tools are words"),
    ],
)
def test_choice_of_no_tool_passes(choice, tools, wrong):
    with pytest.raises(SettingError) as caught:
        check_choice(choice, tools)
    assert wrong in str(caught.value)
    for good in ("auto", "none"):
        check_choice(good, tools)
    for good in ("required", "words"):
        check_choice(good, TOOLS)


# Replies, token by token.

LETTERS = bytes_to_unicode()


ADDED = TOKENIZER.get_added_vocab()
MARKERS = re.compile(f"({'|'.join(map(re.escape, ADDED))})")


def tokens_of(text, places=(), bytewise=False):
    """Tokens of the parts that a text is cut into, or one for each byte; markers stay whole."""
    tokens = []
    for part in MARKERS.split(text):
        if part in ADDED:
            tokens.append(ADDED[part])
        elif bytewise:
            tokens += TOKENIZER.convert_tokens_to_ids([LETTERS[b] for b in part.encode()])
        else:
            for piece in cut(part, places):
                tokens += TOKENIZER.encode(piece, add_special_tokens=False)
    return tokens


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
