"""grammars.py and call_grammars.py: what llguidance lets through, token by token, and refuses."""

import json
import logging
import re
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from flashmoe import grammars, schemas
from flashmoe.call_grammars import _kinds, calls_rules
from flashmoe.catalog import DEMO, find
from flashmoe.constraint import Matchers
from flashmoe.control import Control
from flashmoe.errors import SettingError
from flashmoe.tool_formats import FORMATS, Malformed
from flashmoe.tools import read_tools
from test_tool_formats import coder, hermes, tokens_of, unwritable

TOKENIZER = load_tokenizer(find(DEMO))
CONTROL = Control.of(TOKENIZER)
MATCHERS = Matchers(TOKENIZER, CONTROL, len(TOKENIZER))
MARKERS = CONTROL.call_start, CONTROL.call_end
WRITERS = {"qwen3_coder": coder, "json_tools": hermes}


def accepts(lark, text, bytewise=False):
    """Whether a text is whole by a grammar."""
    matcher = MATCHERS.new(lark)
    taken = all(matcher.consume_token(t) for t in tokens_of(text, (), bytewise))
    return taken and matcher.is_accepting()


def document(kind, value):
    key = {"json_schema": "schema", "regex": "pattern", "lark": "grammar", "json_object": "x"}[kind]
    found = grammars.document({"type": kind, key: value})
    return f"start: document\n{found.rules}"


# Documents.


@pytest.mark.parametrize(
    ("kind", "wanted", "good", "bad"),
    [
        ("regex", "", [""], ["a"]),
        ("regex", "a/b", ["a/b"], ["a\\/b", "a"]),
        ("regex", r"a\/b", ["a/b"], [r"a\/b"]),
        ("regex", r"a\\/b", [r"a\/b"], ["a/b", r"a\\/b"]),
        ("regex", "a\nb", ["a\nb"], ["a\\nb"]),
        ("regex", "a\\\nb", ["a\nb"], ["a\\nb", "a\\\nb"]),
        ("regex", "a\\\\\nb", ["a\\\nb"], ["a\nb", "a\\nb"]),
        ("regex", "[^/\n]+", ["ab"], ["a/", "a\n"]),
        ("regex", "a/i", ["a/i"], ["A", "a"]),
        ("regex", "^(a|b)+$", ["ab"], ["abc", "xab"]),
        ("regex", "é+\u2028", ["éé\u2028"], ["é"]),
        ("regex", "a\"'b", ["a\"'b"], ["ab"]),
        ("lark", 'start: "a" // b }', ["a"], ["b"]),
        ("lark", 'start: "a}"', ["a}"], ["a"]),
        ("lark", 'start: document\ndocument: "x"', ["x"], ["document"]),
        ("lark", 'start: call "!"\ncall: /a+/', ["aa!"], ["aa"]),
        ("lark", 'start: %json {"type": "null"}', ["null"], ["1"]),
        ("json_object", None, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", '{"a":1}', "{ }"]),
        ("json_schema", True, ["1", '"a"', "[1, null]", '{"a": {}}'], ["", "a", "[1,2]", "nul"]),
        ("json_schema", {"type": "string"}, ['"a\\n\\u0007"', '"é"'], ["a", '"\n"', '"a']),
        ("json_schema", {"enum": ["a", 1]}, ['"a"', "1"], ["a", "2", '"1"']),
        ("json_schema", {"const": {"b": 1, "a": 2}}, ['{"b": 1, "a": 2}'], ['{"a": 2, "b": 1}']),
    ],
)
def test_document_lets_the_wrong_text_through(kind, wanted, good, bad):
    lark = document(kind, wanted)
    assert [t for t in good if not accepts(lark, t)] == []
    assert [t for t in bad if accepts(lark, t)] == []


def test_text_is_a_document():
    assert grammars.document({"type": "text"}) is None


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def test_object_rambles_or_its_order_is_free():
    lark = document("json_schema", {**PERSON, "required": ["name"]})
    assert accepts(lark, '{"name": "a", "age": 3}')
    assert accepts(lark, '{"name": "a"}')
    assert not accepts(lark, '{"age": 3}')
    assert not accepts(lark, '{"age": 3, "name": "a"}')
    assert not accepts(lark, '{"name": "a", "city": "b"}')
    lark = document("json_schema", {**PERSON, "additionalProperties": {"type": "null"}})
    assert accepts(lark, '{"name": "a", "city": null}')
    assert not accepts(lark, '{"name": "a", "city": 1}')


def test_closing_a_schema_makes_it_unsatisfiable():
    """Then it is enforced as it is."""
    schema = {"anyOf": [{"properties": {"a": {}}}], "propertyNames": {"const": "b"}}
    lark = document("json_schema", {"type": "object", **schema})
    assert accepts(lark, '{"b": 1}')
    both = [{**PERSON, "required": ["name"]}, {"properties": {"id": {}}, "required": ["id"]}]
    lark = document("json_schema", {"allOf": both})
    assert accepts(lark, '{"name": "a", "age": 3, "id": 1}')


def test_control_token_is_text_of_a_document():
    for lark in (document("json_schema", {"type": "string"}), document("regex", "(?s:.)*")):
        for token in TOKENIZER.get_added_vocab():
            assert not accepts(lark, f'"{token}"')
            matcher = MATCHERS.new(lark)
            spelt = tokens_of('"<', bytewise=True) + tokens_of(token[1:] + '"', bytewise=True)
            assert all(matcher.consume_token(t) for t in spelt)


@pytest.mark.parametrize(
    ("kind", "wanted", "wrong"),
    [
        ("regex", "a(?=b)", "the pattern 'a(?=b)' cannot be enforced: invalid regex"),
        ("regex", "(a", "the pattern '(a' cannot be enforced: invalid regex"),
        ("regex", "a\\", "the pattern 'a\\\\' cannot be enforced: "),
        ("regex", "(a)\\1", "the pattern '(a)\\\\1' cannot be enforced"),
        ("lark", "", "the Lark grammar cannot be enforced: no start rule found"),
        ("lark", "start: nope", 'the Lark grammar cannot be enforced: unknown name: "nope"'),
        ("lark", "}", "the Lark grammar cannot be enforced: expecting rule"),
        ("lark", "start: /(/", "the Lark grammar cannot be enforced: invalid regex"),
        ("lark", 'start: "a', "the Lark grammar cannot be enforced"),
        ("json_schema", False, "the schema is false: nothing satisfies it"),
        ("json_schema", {"type": "nope"}, "the schema of response_format is no valid JSON schema"),
        ("json_schema", {"enum": []}, "cannot be enforced: Unsatisfiable schema"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable schema"),
        ("json_schema", {"type": "array", "minItems": 3, "maxItems": 2}, "Unsatisfiable schema"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable schema"),
        (
            "json_schema",
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "Unsatisfiable schema: required property 'a'",
        ),
        ("json_schema", {"$ref": "http://a.b/c"}, "refers to 'http://a.b/c', which is not fetched"),
        ("json_schema", {"$ref": "#/$defs/x"}, "refers to '#/$defs/x', where there is no schema"),
    ],
)
def test_document_that_cannot_be_is_taken(kind, wanted, wrong):
    with pytest.raises(SettingError) as caught:
        document(kind, wanted)
    assert wrong in str(caught.value)
    # The place in the grammar that is made of it is no help.
    assert not re.search(r"\d+\(\d+\):|\d+ \| ", str(caught.value))


@pytest.mark.parametrize(
    ("schema", "named", "good", "bad"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "[1, 1]", "1"),
        ({"type": "string", "pattern": "^a(?=b)"}, "look-around", '"x"', "1"),
        ({"type": "string", "not": {"const": "x"}}, '"not"', '"x"', "1"),
        (
            {"type": "object", "properties": {"pattern": {"type": "string", "pattern": "a(?!b)"}}},
            "look-around",
            '{"pattern": "ab"}',
            '{"pattern": 1}',
        ),
    ],
)
def test_schema_that_is_enforced_in_part_is_refused_or_nobody_is_told(
    caplog, schema, named, good, bad
):
    schema = {**schema, "description": "a schema that no other test uses: results are kept"}
    with caplog.at_level(logging.WARNING, "flashmoe"):
        lark = document("json_schema", schema)
    assert "the grammar does not enforce the whole schema" in caplog.text
    assert named in caplog.text
    assert accepts(lark, good)
    assert not accepts(lark, bad)


# Random schemas with values of them.


class Shape:
    """A schema, and the strategy of its values; their keys are in the order of the schema."""

    def __init__(self, schema, values):
        self.schema, self.values = schema, values


NAMES = st.sampled_from(
    ["a", "b", "name", "a b", "a/b", "~", "%25", 'say "x"', "é", "default", "$ref"]
)
WORDS = ["", "a", "red", "two words", 'say "hi"', "été", "a\nb", "\\", "</parameter>", "日本", "3"]
NORMAL = st.text(max_size=8).filter(lambda s: unicodedata.is_normalized("NFC", s))
STRINGS = NORMAL | st.sampled_from(WORDS) | st.lists(st.sampled_from(WORDS)).map("\n".join)


KINDS = ["integer", "number", "string", "length", "pattern", "enum", "const", "boolean", "null"]


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(KINDS))
    low = draw(st.integers(-50, 50))
    high = low + draw(st.integers(0, 200))
    if kind == "integer":
        schema = {"type": "integer", "minimum": low, "maximum": high}
        return Shape(
            *draw(
                st.sampled_from(
                    [({"type": "integer"}, st.integers()), (schema, st.integers(low, high))]
                )
            )
        )
    if kind == "number":
        schema = {"type": "number", "minimum": low, "exclusiveMaximum": high + 1}
        return Shape(schema, st.integers(low * 4, high * 4).map(lambda n: n / 4) | st.just(low))
    if kind == "string":
        return Shape({"type": "string"}, STRINGS)
    if kind == "length":
        few = st.text(st.sampled_from("ab é\n"), min_size=1, max_size=5)
        return Shape({"type": "string", "minLength": 1, "maxLength": 5}, few)
    if kind == "pattern":
        values = draw(
            st.sampled_from(
                [("^[a-z]{2}$", ["ab", "zz"]), ("^\\d+|x", ["12", "1a", "ax b"]), ("/", ["a/b"])]
            )
        )
        return Shape({"type": "string", "pattern": values[0]}, st.sampled_from(values[1]))
    if kind in ("enum", "const"):
        some = draw(
            st.lists(st.sampled_from([*WORDS, 1, -2.5, True, None, [1]]), min_size=1, max_size=4)
        )
        schema = {"enum": some} if kind == "enum" else {"const": some[0]}
        return Shape(schema, st.sampled_from(some if kind == "enum" else some[:1]))
    values = {"boolean": st.booleans(), "null": st.none()}[kind]
    return Shape({"type": kind}, values)


@st.composite
def in_order(draw, shapes, required):
    return {k: draw(s.values) for k, s in shapes.items() if k in required or draw(st.booleans())}


@st.composite
def objects(draw, inner, size=3):
    shapes = draw(st.dictionaries(NAMES, inner, max_size=size))
    required = [k for k in shapes if draw(st.booleans())]
    schema = {"type": "object", "properties": {k: s.schema for k, s in shapes.items()}}
    if required or draw(st.booleans()):
        schema["required"] = required
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return Shape(schema, in_order(shapes, required))


@st.composite
def compound(draw, inner):
    kind = draw(st.sampled_from(["object", "array", "tuple", "union", "nullable", "all", "types"]))
    if kind == "object":
        return draw(objects(inner))
    if kind == "types":
        return Shape({"type": ["integer", "null"]}, st.integers() | st.none())
    one = draw(inner)
    if kind == "array":
        low, high = draw(st.sampled_from([(0, 3), (1, 1), (2, 3)]))
        schema = {"type": "array", "items": one.schema, "minItems": low, "maxItems": high}
        return Shape(schema, st.lists(one.values, min_size=low, max_size=high))
    if kind == "tuple":
        two = draw(inner)
        schema = {"type": "array", "prefixItems": [one.schema, two.schema], "items": False}
        return Shape({**schema, "minItems": 2}, st.tuples(one.values, two.values).map(list))
    if kind == "all":
        return Shape({"allOf": [one.schema], "title": "T"}, one.values)
    other = Shape({"type": "null"}, st.none()) if kind == "nullable" else draw(inner)
    return Shape({"anyOf": [one.schema, other.schema]}, one.values | other.values)


@st.composite
def rooted(draw):
    """An object schema whose parts may be references."""
    defined = draw(st.lists(st.recursive(leaves(), compound, max_leaves=3), min_size=1, max_size=2))
    names = ["A", "a/b~c %"]
    pointers = ["A", "a~1b~0c%20%25"]
    references = [
        Shape({"$ref": f"#/$defs/{p}"}, s.values) for p, s in zip(pointers, defined, strict=False)
    ]
    parts = st.recursive(leaves() | st.sampled_from(references), compound, max_leaves=5)
    root = draw(objects(parts))
    defs = {n: s.schema for n, s in zip(names, defined, strict=False)}
    return Shape({**root.schema, "$defs": defs}, root.values)


def written(value):
    return json.dumps(value, ensure_ascii=False)


@settings(max_examples=60, deadline=None)
@given(rooted(), st.data())
def test_grammar_refuses_a_value_of_the_schema(shape, data):
    value = data.draw(shape.values)
    assert schemas.fault(value, shape.schema) is None
    lark = document("json_schema", shape.schema)
    assert accepts(lark, written(value))
    assert accepts(lark, written(value), bytewise=True)


@st.composite
def spoilt(draw, value):
    """A value that differs in one place."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        at = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
        return type(value)(
            {**value, at: draw(spoilt(value[at]))}
            if isinstance(value, dict)
            else [*value[:at], draw(spoilt(value[at])), *value[at + 1 :]]
        )
    if isinstance(value, dict) and draw(st.booleans()):
        return {k: v for k, v in value.items() if draw(st.booleans())} or {"zz": 1}
    if isinstance(value, list) and draw(st.booleans()):
        return [*value, *value] or [1]
    return draw(st.sampled_from([None, True, 0, 2.5, -(10**6), 10**6, "zz", "", [], [None], {}]))


@settings(max_examples=60, deadline=None)
@given(rooted(), st.data())
def test_grammar_takes_a_value_that_the_schema_refuses(shape, data):
    value = data.draw(spoilt(data.draw(shape.values)))
    if schemas.fault(value, shape.schema) is not None:
        assert not accepts(document("json_schema", shape.schema), written(value))


# Calls.

STYLES = pytest.mark.parametrize("style", sorted(FORMATS))


def call_lark(tools, style):
    return f"start: body\n{calls_rules(tools, style, *MARKERS)}"


def one_tool(properties, required=None, **more):
    """A tool f; all of its parameters are required by default."""
    required = [*properties] if required is None else required
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return read_tools([{"name": "f", "parameters": parameters}])


def takes(tools, style, text):
    return accepts(call_lark(tools, style), f"{text}</tool_call>")


def ambiguous(value, schema):
    """Raw text that the schema lets be a string or something else is read as the latter."""
    if not isinstance(value, str) or schema.get("type") == "string":
        return False
    try:
        json.loads(value)
    except ValueError:
        return value.strip() in ("True", "False", "None")
    return True


@STYLES
@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(rooted(), min_size=1, max_size=2), data=st.data())
def test_call_by_the_grammar_reads_as_another_one(style, shapes, data):
    tools = read_tools(
        [{"name": f"tool-{i}é", "parameters": s.schema} for i, s in enumerate(shapes)]
    )
    at = data.draw(st.integers(0, len(shapes) - 1))
    arguments = data.draw(shapes[at].values)
    if style == "qwen3_coder":
        listed = shapes[at].schema["properties"]
        assume(not any(unwritable(v) or ambiguous(v, listed[k]) for k, v in arguments.items()))
    text = WRITERS[style](f"tool-{at}é", arguments)
    assert takes(tools, style, text)
    call = FORMATS[style](tools)
    pieces = [p for c in text for p in call.feed(c)]
    name, found, rest = call.finish()
    assert (name, written(found)) == (f"tool-{at}é", written(arguments))
    assert json.loads("".join([*pieces, rest])) == arguments


@STYLES
@settings(max_examples=60, deadline=None)
@given(shape=rooted(), data=st.data())
def test_grammar_of_a_call_takes_arguments_that_the_schema_refuses(style, shape, data):
    arguments = data.draw(shape.values)
    assume(arguments)
    key = data.draw(st.sampled_from([*arguments]))
    arguments[key] = data.draw(spoilt(arguments[key]))
    tools = read_tools([{"name": "f", "parameters": shape.schema}])
    if style == "qwen3_coder":
        # Where a value may be text or JSON, any text is let through.
        kinds = {kind for kind, _ in _kinds(schemas.parameter(shape.schema, key))}
        assume(not kinds >= {"text", "json"})
    text = WRITERS[style]("f", arguments)
    call = FORMATS[style](tools)
    try:
        list(call.feed(text))
        good = schemas.fault(call.finish()[1], shape.schema) is None
    except Malformed:
        good = False
    if not good:
        assert not takes(tools, style, text)


TEXT = {"type": "string"}
COLOUR = {"enum": ["red", "light blue"]}
DEFS = {"$defs": {"C": COLOUR, "N": {"type": "integer"}}}
MAYBE_COLOUR = {"anyOf": [{"$ref": "#/$defs/C"}, {"type": "null"}]}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            TEXT,
            ["", "a\nb\n", '"a"', "a </parameter> b", "</function>", "</parameter> ", "\\n"],
            [],
        ),
        (TEXT, ["`<parameter=x>` b", "<function", "\n\n", "a</parameter>", "日本"], []),
        (TEXT, [], ["</parameter>", "a\n</parameter>\nb", "</parameter>\n"]),
        (TEXT, [], ["a\n<parameter=x>\nb", "<function=f>", "a</parameter>\n<parameter=x>"]),
        (TEXT, [], ["a</parameter>\n\n</function>\n", "<think>", "<|im_end|>"]),
        ({**TEXT, "minLength": 3}, ["abc", "日本語"], ["ab", "a\n</parameter>\nbcdefgh"]),
        ({**TEXT, "minLength": 9999, "maxLength": 10**6}, ["a" * 9999], ["a" * 900]),
        ({**TEXT, "maxLength": 3}, ["", "abc"], ["abcd"]),
        (
            {**TEXT, "minLength": 2, "maxLength": 2, "pattern": "b"},
            ["ab", "b\n"],
            ["b", "aa", "abb"],
        ),
        ({**TEXT, "pattern": "^[a-c]+$"}, ["abc"], ["", "abd", "a\nb"]),
        ({**TEXT, "pattern": "b"}, ["b", "a\nb\nc"], ["a", "a\n</parameter>\nb"]),
        ({**TEXT, "pattern": "^a|b$"}, ["ax", "xb"], ["xax"]),
        ({**TEXT, "pattern": "a/b"}, ["a/b"], ["ab"]),
        ({**TEXT, "pattern": "^a(?=b)"}, ["ab"], []),
        ({"enum": ["a", 1, None, [1]]}, ["a", 1, None, [1]], ["b", 2, '"a"']),
        ({"const": "a b"}, ["a b"], ["a"]),
        ({"type": "boolean"}, [True, False], ["True", "", 1]),
        ({"type": "integer"}, [1, -3], ["1.5", '"1"', "one", ""]),
        ({"type": ["integer", "null"]}, [1, None], ["x", ""]),
        ({"type": ["string", "null"]}, ["a", None, ""], []),
        ({"type": "array", "items": TEXT}, [["a\n"], []], ["a", '["a"', "[1]"]),
        ({"type": "object"}, [{"a": "</parameter>\n"}], ["[]", "{'a': 1}"]),
        ({"$ref": "#/$defs/C"}, ["red"], ["blue", '"red"']),
        ({"$ref": "#/$defs/N"}, [3], ["three"]),
        (MAYBE_COLOUR, ["red", None], ["blue", "nul", ""]),
        ({"allOf": [{"$ref": "#/$defs/C"}], "default": "red"}, ["red"], ["blue"]),
        ({"anyOf": [{"$ref": "#/$defs/N"}, {"$ref": "#/$defs/C"}]}, ["red", 3], ["blue", "3.5"]),
        ({"anyOf": [{"$ref": "#/$defs/N"}, {**TEXT, "pattern": "/"}]}, [0, "1/2", "a/"], []),
        ({"anyOf": [CAT, {**TEXT, "minLength": 1}]}, [{"kind": "cat"}, "dog"], []),
        (
            {"anyOf": [CAT, {"enum": ["dog", "[x", None, 1]}]},
            [{"kind": "cat"}, "dog", "[x", 1],
            ["x"],
        ),
        ({"anyOf": [CAT, {"type": "null"}]}, [{"kind": "cat"}, None], ["cat", '{"kind": "dog"}']),
        (
            {"oneOf": [CAT], "discriminator": {"propertyName": "kind"}},
            [{"kind": "cat"}],
            ["cat", '{"kind": "dog"}'],
        ),
        ({}, ["a", 1, None, [1]], []),
        (True, ["a", 1, {"a": 1}], []),
    ],
)
def test_raw_value_is_held_to_another_schema(schema, good, bad):
    tools = one_tool({"x": schema}, **DEFS)
    for value in good:
        assert takes(tools, "qwen3_coder", coder("f", {"x": value})), value
        call = FORMATS["qwen3_coder"](tools)
        list(call.feed(coder("f", {"x": value})))
        assert call.finish()[1] == {"x": value}
    for value in bad:
        assert not takes(tools, "qwen3_coder", coder("f", {"x": value})), value


@STYLES
def test_parameters_come_in_any_order_or_are_all_required(style):
    tools = one_tool({"a": TEXT, "b": TEXT, "c": TEXT}, ["b"])
    write = WRITERS[style]
    for some in ("b", "ab", "bc", "abc"):
        assert takes(tools, style, write("f", dict.fromkeys(some, "x")))
    for some in ("", "a", "ac", "ba", "bd"):
        assert not takes(tools, style, write("f", dict.fromkeys(some, "x")))


@STYLES
def test_call_of_another_tool_or_of_none_is_taken(style):
    tools = read_tools([{"name": "f"}, {"name": "g", "parameters": {"properties": {"a": TEXT}}}])
    write = WRITERS[style]
    assert takes(tools, style, write("f", {}))
    assert takes(tools, style, write("g", {"a": "x"}))
    assert not takes(tools, style, write("f", {"a": "x"}))
    assert not takes(tools, style, write("h", {}))
    for text in ("", "hello", write("f", {}) * 2, write("f", {}) + "x", " " + write("f", {})):
        assert not takes(tools, style, text)
    # The end marker is a part of it.
    assert not accepts(call_lark(tools, style), write("f", {}))


@STYLES
def test_call_with_its_start_marker_is_another(style):
    tools = one_tool({"a": TEXT})
    lark = f'start: call ("\\n" call)*\n{calls_rules(tools, style, *MARKERS)}'
    call = f"<tool_call>{WRITERS[style]('f', {'a': 'x'})}</tool_call>"
    assert accepts(lark, call)
    assert accepts(lark, f"{call}\n{call}")
    assert not accepts(lark, f"{call}{call}")
    assert not accepts(lark, call.removeprefix("<tool_call>"))


def test_parameter_whose_schema_is_false_is_written():
    tools = one_tool({"a": False, "b": TEXT}, ["b"])
    assert takes(tools, "qwen3_coder", coder("f", {"b": "x"}))
    assert not takes(tools, "qwen3_coder", coder("f", {"a": "x", "b": "x"}))


def test_items_of_an_older_draft_are_enforced_as_of_the_newest():
    pair = {"type": "array", "items": [{"type": "integer"}, {"$ref": "#/definitions/s"}]}
    older = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"s": TEXT}}
    for schema in (pair, {"anyOf": [pair, {"type": "null"}]}):
        tools = one_tool({"p": schema}, **older)
        for style, write in WRITERS.items():
            assert takes(tools, style, write("f", {"p": [1, "a"]}))
            assert not takes(tools, style, write("f", {"p": ["a", 1]}))


@pytest.mark.parametrize(
    ("properties", "more", "style", "wrong"),
    [
        ({"a>b": TEXT}, {}, "qwen3_coder", "tool 'f': the parameter 'a>b' cannot be told from"),
        ({"a\nb": TEXT}, {}, "qwen3_coder", "the parameter 'a\\nb' cannot be told from the format"),
        ({" a": TEXT}, {}, "qwen3_coder", "the parameter ' a' cannot be told from the format"),
        ({"": TEXT}, {}, "qwen3_coder", "the parameter '' cannot be told from the format"),
        ({"a": False}, {}, "qwen3_coder", "the parameter 'a' is required, but its schema is false"),
        ({"a": False}, {}, "json_tools", "required property 'a' is unsatisfiable"),
        ({}, {"required": ["b"]}, "qwen3_coder", "required names {'b'}, which are no properties"),
        (
            {"a": {"type": "integer", "minimum": 2, "maximum": 1}},
            {},
            "qwen3_coder",
            "tool 'f': the",
        ),
        ({"a": {"type": "integer", "minimum": 2, "maximum": 1}}, {}, "json_tools", "tool 'f': the"),
        ({"a": {"anyOf": [{"$ref": "#/properties/a"}]}}, {}, "qwen3_coder", "tool 'f': "),
        (
            {"a": {**TEXT, "minLength": 3, "maxLength": 2}},
            {},
            "qwen3_coder",
            "Unsatisfiable schema",
        ),
        ({"a": {**TEXT, "minLength": 3, "maxLength": 2}}, {}, "json_tools", "Unsatisfiable schema"),
    ],
)
def test_tool_that_no_call_fits_is_taken(properties, more, style, wrong):
    with pytest.raises(SettingError) as caught:
        calls_rules(one_tool(properties, **more), style, *MARKERS)
    assert wrong in str(caught.value)


def test_odd_names_of_parameters_are_refused_in_json():
    tools = one_tool({"a>b": TEXT, " a": TEXT, "": TEXT})
    assert takes(tools, "json_tools", hermes("f", {"a>b": "x", " a": "x", "": "x"}))


@pytest.mark.parametrize(
    ("parameters", "any_text", "number"),
    [
        (None, False, False),
        ({"type": "object", "properties": {}}, False, False),
        ({"type": "object", "additionalProperties": False}, False, False),
        ({"type": "object"}, True, True),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, False, True),
    ],
)
def test_tool_without_listed_parameters_takes_none_or_any(parameters, any_text, number):
    definition = {"name": "f"} | ({} if parameters is None else {"parameters": parameters})
    rules = calls_rules(read_tools([definition]), "qwen3_coder", *MARKERS)
    for value, expected in (("some text", any_text), ("3", number)):
        parameter = f"<parameter=some name>\n{value}\n</parameter>\n"
        for body, taken in (("", True), (parameter, expected), (parameter * 2, expected)):
            text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
            assert accepts(f"start: call\n{rules}", text) == taken
