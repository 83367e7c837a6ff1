"""Test how well-formed and malformed text of models is parsed into tool calls."""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tool_call_texts import ARGUMENTS, BOTH, CUTS, TOOLS, WRITERS, cut, read, unwritable

from flashmoe.chat.tool_parsers import CoderCallParser, HermesCallParser, MalformedCall

# Well-formed calls.


@BOTH
@settings(max_examples=200, deadline=None)
@given(arguments=ARGUMENTS, places=CUTS)
def test_call_is_read_back_however_it_is_cut(kind, arguments, places):
    if kind is CoderCallParser:
        assume(not any(unwritable(v) for v in arguments.values()))
    text = WRITERS[kind]("typed", arguments)
    name, parsed = read(kind, cut(text, places))
    assert (name, json.dumps(parsed)) == ("typed", json.dumps(arguments))


@BOTH
def test_arguments_are_streamed_piece_by_piece(kind):
    arguments = {"a": "one", "b": "two"}
    call, pieces = kind(TOOLS), []
    for c in WRITERS[kind]("words", arguments):
        pieces += call.feed(c)
    expected = {
        CoderCallParser: ['{"a": "one"', ', "b": "two"'],
        HermesCallParser: list(json.dumps(arguments))[:-1],
    }
    assert pieces == expected[kind]
    assert call.finish()[2] == "}"


@BOTH
def test_call_without_parameters_is_read(kind):
    assert read(kind, [WRITERS[kind]("none", {})]) == ("none", {})


@BOTH
def test_big_integer_keeps_all_digits(kind):
    arguments = {"count": 12345678901234567890123}
    assert read(kind, [WRITERS[kind]("typed", arguments)]) == ("typed", arguments)


@BOTH
def test_call_of_an_unknown_tool_is_read(kind):
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
def test_coder_call_with_other_white_space_is_read(text, arguments):
    assert read(CoderCallParser, [text]) == ("words", arguments)
    assert read(CoderCallParser, list(text)) == ("words", arguments)


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
def test_hermes_call_in_another_json_layout_is_read(text):
    assert read(HermesCallParser, [text]) == ("words", {"a": "x"})
    assert read(HermesCallParser, list(text)) == ("words", {"a": "x"})


def test_hermes_call_without_arguments_is_read():
    assert read(HermesCallParser, ['{"name": "none"}']) == ("none", {})


# MalformedCall calls.


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
def test_malformed_coder_call_is_refused(text, wrong):
    for pieces in ([text], list(text)):
        with pytest.raises(MalformedCall) as caught:
            read(CoderCallParser, pieces)
        assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "it is not JSON"),
        ("hello", "it is not JSON"),
        ("{}", 'it is not an object with a "name"'),
        ("[]", 'it is not an object with a "name"'),
        ('{"name": 3, "arguments": {}}', 'it is not an object with a "name"'),
        ('{"arguments": {}}', 'it is not an object with a "name"'),
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
def test_malformed_hermes_call_is_refused(text, wrong):
    for pieces in ([text], cut(text, range(1, 99))):
        with pytest.raises(MalformedCall) as caught:
            read(HermesCallParser, pieces)
        assert wrong in str(caught.value)


@BOTH
def test_call_cut_short_is_refused(kind):
    arguments = {"text": "a\n</parameter> b", "many": ["x"], "thing": {"a": {}}, "count": 12}
    text = WRITERS[kind]("typed", arguments)
    for end in range(len(text.rstrip())):
        with pytest.raises(MalformedCall):
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
    """Generate texts that differ from a call in a few places."""
    place = st.integers(0, len(call) - 1)
    some = st.lists(st.sampled_from(sorted(parts)), max_size=2)

    def change(replaced, added, again):
        changed = [[part] for part in call]
        for at, new in replaced.items():
            changed[at] = new
        for at, new in added.items():
            changed[at] = changed[at] + new
        if again is not None:
            start, end = sorted(again)
            changed[end:end] = changed[start:end]
        return "".join(part for parts in changed for part in parts)

    few = st.dictionaries(place, some, max_size=2)
    return st.builds(change, few, few, st.none() | st.tuples(place, place))


def outcome(kind, pieces):
    """Return the (name, arguments) that are read, or the error text."""
    try:
        return read(kind, pieces)
    except MalformedCall as e:
        return str(e)


@settings(max_examples=400, deadline=None)
@given(damaged(CODER_CALL, [*TAGS, "\n", " ", "x", "y"]), CUTS)
def test_damaged_coder_call_is_refused_or_read_as_written(text, places):
    result = outcome(CoderCallParser, [text])
    assert outcome(CoderCallParser, cut(text, places)) == result
    if isinstance(result, str):
        return
    # The text consists of what was read and the tags around it, and of nothing else.
    keys = "".join(
        rf"\s*<parameter={key}>\n?{re.escape(value)}\n?</parameter>"
        for key, value in result[1].items()
    )
    assert re.fullmatch(rf"\s*<function=words>{keys}\s*</function>\s*", text)
    assert not any(re.search(r"<(parameter|function)=\w+>$", v, re.M) for v in result[1].values())


@settings(max_examples=400, deadline=None)
@given(damaged(HERMES_CALL, HERMES_PARTS), CUTS)
def test_damaged_hermes_call_is_refused_or_read_as_written(text, places):
    result = outcome(HermesCallParser, [text])
    assert outcome(HermesCallParser, cut(text, places)) == result
    if not isinstance(result, str):
        call = json.loads(text)
        assert result == (call["name"], call.get("arguments", {}))


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text(), places=CUTS)
def test_arbitrary_text_is_refused_as_malformed(kind, text, places):
    assert isinstance(outcome(kind, cut(text, places)), str)
