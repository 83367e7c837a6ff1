"""Test which tool calls the grammar accepts, in both formats of calls."""

import json

import pytest
from grammar_matching import CALL_MARKERS, accepts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_schemas import altered, object_schemas, to_json
from tool_call_texts import coder, hermes, unwritable

from flashmoe.chat import json_schema as schemas
from flashmoe.chat.raw_values import value_kinds
from flashmoe.chat.tool_parsers import TOOL_PARSERS, MalformedCall
from flashmoe.chat.tools import read_tools
from flashmoe.errors import SettingError
from flashmoe.grammar.tool_calls import tool_call_rules

STYLE_WRITERS = {"qwen3_coder": coder, "json_tools": hermes}
STYLES = pytest.mark.parametrize("style", sorted(TOOL_PARSERS))


def call_lark(tools, style):
    return f"start: body\n{tool_call_rules(tools, style, *CALL_MARKERS)}"


def one_tool(properties, required=None, **more):
    """Return the tools of a request: one tool f, with all of its parameters required by default."""
    required = [*properties] if required is None else required
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return read_tools([{"name": "f", "parameters": parameters}])


def accepts_call(tools, style, text):
    return accepts(call_lark(tools, style), f"{text}</tool_call>")


def has_writable_values(tools, style):
    """Whether every parameter has a value that the format can write."""
    try:
        tool_call_rules(tools, style, *CALL_MARKERS)
    except SettingError as e:
        return "cannot be told from the format around" not in str(e)
    return True


def ambiguous(value, schema):
    """Whether raw text would be read as JSON although the value is a string.

    Where the schema allows a string and something else, text that is JSON is read as JSON.
    """
    if not isinstance(value, str) or schema.get("type") == "string":
        return False
    try:
        json.loads(value)
    except ValueError:
        return value.strip() in ("True", "False", "None")
    return True


def out_of_reach(value, schema):
    """Whether the grammar leaves the value out.

    Next to a constrained string it leaves out numbers, and strings that start like JSON.
    """
    kinds = {kind for kind, _ in value_kinds(schema)}
    if not {"text", "json"} <= kinds:
        return False
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or (isinstance(value, str) and value.startswith(("[", "{")))


@STYLES
@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(object_schemas(), min_size=1, max_size=2), data=st.data())
def test_grammar_accepts_calls_and_the_parser_reads_them_back(style, shapes, data):
    tools = read_tools(
        [{"name": f"tool-{i}é", "parameters": s.schema} for i, s in enumerate(shapes)]
    )
    at = data.draw(st.integers(0, len(shapes) - 1))
    arguments = data.draw(shapes[at].values)
    if style == "qwen3_coder":
        listed = shapes[at].schema["properties"]
        assume(not any(unwritable(v) or ambiguous(v, listed[k]) for k, v in arguments.items()))
        whole = shapes[at].schema
        assume(
            not any(
                out_of_reach(v, schemas.property_schema(whole, k)) for k, v in arguments.items()
            )
        )
    assume(has_writable_values(tools, style))
    text = STYLE_WRITERS[style](f"tool-{at}é", arguments)
    assert accepts_call(tools, style, text)
    call = TOOL_PARSERS[style](tools)
    pieces = [p for c in text for p in call.feed(c)]
    name, parsed, rest = call.finish()
    assert (name, to_json(parsed)) == (f"tool-{at}é", to_json(arguments))
    assert json.loads("".join([*pieces, rest])) == arguments


@STYLES
@settings(max_examples=60, deadline=None)
@given(shape=object_schemas(), data=st.data())
def test_grammar_refuses_arguments_that_the_schema_refuses(style, shape, data):
    arguments = data.draw(shape.values)
    assume(arguments)
    key = data.draw(st.sampled_from([*arguments]))
    arguments[key] = data.draw(altered(arguments[key]))
    tools = read_tools([{"name": "f", "parameters": shape.schema}])
    if style == "qwen3_coder":
        # Where a value may be text or JSON, the grammar accepts any text.
        kinds = {kind for kind, _ in value_kinds(schemas.property_schema(shape.schema, key))}
        assume(not kinds >= {"text", "json"})
    assume(has_writable_values(tools, style))
    text = STYLE_WRITERS[style]("f", arguments)
    call = TOOL_PARSERS[style](tools)
    try:
        list(call.feed(text))
        good = schemas.validation_error(call.finish()[1], shape.schema) is None
    except MalformedCall:
        good = False
    if not good:
        assert not accepts_call(tools, style, text)


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
        ({"enum": ["", "</parameter>"]}, [""], ["</parameter>"]),
        ({"enum": [None, "a\n</parameter>\n"]}, [None], ["a\n</parameter>\n", ""]),
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
        # A number may be the start of such a text, so the grammar treats it as text.
        ({"anyOf": [{"$ref": "#/$defs/N"}, {**TEXT, "pattern": "/"}]}, ["1/2", "a/"], [0, "a"]),
        (
            {"anyOf": [{"type": "number"}, {**TEXT, "pattern": "^[a-z]+$"}]},
            [1.5, "ab"],
            ["A", "a1"],
        ),
        (
            {"anyOf": [{"type": "integer"}, {"enum": [[1], {}]}, {**TEXT, "maxLength": 4}]},
            [[1], {}, "abcd"],
            ["[2]", "abcde"],
        ),
        (
            {"anyOf": [{"type": "integer"}, {"type": "null"}, {**TEXT, "pattern": "x"}]},
            [None, "x"],
            ["nul", "y"],
        ),
        (
            {"anyOf": [{"type": "array", "items": {}}, {"type": "null"}, {**TEXT, "maxLength": 4}]},
            [[1, 22, 333], [], None, "abcd"],
            ["abcde", "[1"],
        ),
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
def test_raw_value_is_constrained_by_the_schema_of_its_parameter(schema, good, bad):
    tools = one_tool({"x": schema}, **DEFS)
    for value in good:
        assert accepts_call(tools, "qwen3_coder", coder("f", {"x": value})), value
        call = TOOL_PARSERS["qwen3_coder"](tools)
        list(call.feed(coder("f", {"x": value})))
        assert call.finish()[1] == {"x": value}
    for value in bad:
        assert not accepts_call(tools, "qwen3_coder", coder("f", {"x": value})), value


@STYLES
def test_parameters_keep_their_order_and_optional_ones_may_be_left_out(style):
    tools = one_tool({"a": TEXT, "b": TEXT, "c": TEXT}, ["b"])
    write = STYLE_WRITERS[style]
    for some in ("b", "ab", "bc", "abc"):
        assert accepts_call(tools, style, write("f", dict.fromkeys(some, "x")))
    for some in ("", "a", "ac", "ba", "bd"):
        assert not accepts_call(tools, style, write("f", dict.fromkeys(some, "x")))


@STYLES
def test_grammar_accepts_one_call_of_a_listed_tool_only(style):
    tools = read_tools([{"name": "f"}, {"name": "g", "parameters": {"properties": {"a": TEXT}}}])
    write = STYLE_WRITERS[style]
    assert accepts_call(tools, style, write("f", {}))
    assert accepts_call(tools, style, write("g", {"a": "x"}))
    assert not accepts_call(tools, style, write("f", {"a": "x"}))
    assert not accepts_call(tools, style, write("h", {}))
    for text in ("", "hello", write("f", {}) * 2, write("f", {}) + "x", " " + write("f", {})):
        assert not accepts_call(tools, style, text)
    # The end marker is a part of the call.
    assert not accepts(call_lark(tools, style), write("f", {}))


@STYLES
def test_call_rule_includes_the_start_marker(style):
    tools = one_tool({"a": TEXT})
    lark = f'start: call ("\\n" call)*\n{tool_call_rules(tools, style, *CALL_MARKERS)}'
    call = f"<tool_call>{STYLE_WRITERS[style]('f', {'a': 'x'})}</tool_call>"
    assert accepts(lark, call)
    assert accepts(lark, f"{call}\n{call}")
    assert not accepts(lark, f"{call}{call}")
    assert not accepts(lark, call.removeprefix("<tool_call>"))


def test_parameter_with_a_false_schema_is_left_out():
    tools = one_tool({"a": False, "b": TEXT}, ["b"])
    assert accepts_call(tools, "qwen3_coder", coder("f", {"b": "x"}))
    assert not accepts_call(tools, "qwen3_coder", coder("f", {"a": "x", "b": "x"}))


def test_tuple_items_of_draft_7_are_enforced():
    pair = {"type": "array", "items": [{"type": "integer"}, {"$ref": "#/definitions/s"}]}
    older = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"s": TEXT}}
    for schema in (pair, {"anyOf": [pair, {"type": "null"}]}):
        tools = one_tool({"p": schema}, **older)
        for style, write in STYLE_WRITERS.items():
            assert accepts_call(tools, style, write("f", {"p": [1, "a"]}))
            assert not accepts_call(tools, style, write("f", {"p": ["a", 1]}))


@pytest.mark.parametrize(
    ("properties", "more", "style", "wrong"),
    [
        ({"a>b": TEXT}, {}, "qwen3_coder", "tool 'f': the parameter 'a>b' cannot be told from"),
        ({"a\nb": TEXT}, {}, "qwen3_coder", "the parameter 'a\\nb' cannot be told from the format"),
        ({" a": TEXT}, {}, "qwen3_coder", "the parameter ' a' cannot be told from the format"),
        ({"": TEXT}, {}, "qwen3_coder", "the parameter '' cannot be told from the format"),
        (
            {"a": {"const": "</parameter>"}},
            {},
            "qwen3_coder",
            "the values ['</parameter>'] cannot be",
        ),
        ({"a": False}, {}, "qwen3_coder", "the parameter 'a' is required, but its schema is false"),
        ({"a": False}, {}, "json_tools", "required property 'a' is unsatisfiable"),
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
def test_tool_without_a_valid_call_raises_setting_error(properties, more, style, wrong):
    with pytest.raises(SettingError) as caught:
        tool_call_rules(one_tool(properties, **more), style, *CALL_MARKERS)
    assert wrong in str(caught.value)


def test_json_format_allows_any_parameter_name():
    tools = one_tool({"a>b": TEXT, " a": TEXT, "": TEXT})
    assert accepts_call(tools, "json_tools", hermes("f", {"a>b": "x", " a": "x", "": "x"}))


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
def test_tool_without_listed_parameters_follows_additional_properties(parameters, any_text, number):
    definition = {"name": "f"} | ({} if parameters is None else {"parameters": parameters})
    rules = tool_call_rules(read_tools([definition]), "qwen3_coder", *CALL_MARKERS)
    for value, expected in (("some text", any_text), ("3", number)):
        parameter = f"<parameter=some name>\n{value}\n</parameter>\n"
        for body, accepted in (("", True), (parameter, expected), (parameter * 2, expected)):
            text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
            assert accepts(f"start: call\n{rules}", text) == accepted


@pytest.mark.parametrize("name", ["date", "time", "duration", "uuid", "email", "ipv6"])
def test_format_of_a_raw_value_is_enforced(name):
    tools = one_tool({"a": {"type": "string", "format": name}})
    good = {
        "date": "2024-02-29",
        "time": "12:00:00Z",
        "duration": "P3D",
        "uuid": "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "email": "a@b.example",
        "ipv6": "::1",
    }[name]
    assert accepts_call(tools, "qwen3_coder", coder("f", {"a": good}))
    assert not accepts_call(tools, "qwen3_coder", coder("f", {"a": "found"}))


def test_unknown_format_is_left_out_with_a_warning(caplog):
    tools = one_tool({"a": {"type": "string", "format": "colour"}})
    assert accepts_call(tools, "qwen3_coder", coder("f", {"a": "found"}))
    assert "the grammar cannot enforce the format 'colour'" in caplog.text


def test_pattern_of_javascript_is_enforced():
    tools = one_tool({"a": {"type": "string", "pattern": r"^\p{L}+$"}})
    for style, write in STYLE_WRITERS.items():
        assert accepts_call(tools, style, write("f", {"a": "été"}))
        assert not accepts_call(tools, style, write("f", {"a": "a1"}))


ONE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
TWO = {"type": "object", "properties": {"b": {"const": 2}, "c": TEXT}, "required": ["b"]}


@pytest.mark.parametrize("union", ["oneOf", "anyOf", "allOf"])
def test_alternatives_at_the_top_are_enforced(union):
    tools = one_tool({"k": TEXT}, **{union: [ONE, TWO]})
    whole = {"k": "x", "a": 1, "b": 2}
    for arguments in ({"a": 1}, {"b": 2}, {"b": 2, "c": "y"}):
        good = union != "allOf"
        assert accepts_call(tools, "qwen3_coder", coder("f", {"k": "x", **arguments})) == good
    assert accepts_call(tools, "qwen3_coder", coder("f", whole)) == (union == "allOf")
    for arguments in ({"k": "x"}, {"k": "x", "a": 2}, {"a": 1}, {"k": "x", "ba": "college"}):
        assert not accepts_call(tools, "qwen3_coder", coder("f", arguments))


def test_parser_knows_the_types_of_alternatives():
    tools = one_tool(
        {}, oneOf=[{"properties": {"a": TEXT}}, {"properties": {"b": {"type": "integer"}}}]
    )
    for arguments in ({"a": "12"}, {"b": 12}):
        call = TOOL_PARSERS["qwen3_coder"](tools)
        [*call.feed(coder("f", arguments))]
        assert call.finish()[1] == arguments
    assert tools["f"].json_parameters == {"b"}


def test_parameter_that_is_required_and_not_listed_takes_any_value():
    tools = one_tool({"a": TEXT}, required=["a", "b"])
    for style, write in STYLE_WRITERS.items():
        assert accepts_call(tools, style, write("f", {"a": "x", "b": "y"}))
        assert not accepts_call(tools, style, write("f", {"a": "x"}))


@STYLES
def test_odd_tool_does_not_stop_the_others(style, caplog):
    odd = [
        {"a": {**TEXT, "minLength": 3, "maxLength": 2}},
        {"a": {"type": "integer", "minimum": 2, "maximum": 1}},
        {"a": {**TEXT, "pattern": "("}},
        {"a": {"items": [TEXT], "type": "array"}, "b": None},
    ]
    tools = [
        {"name": f"odd{i}", "parameters": {"type": "object", "properties": p, "required": [*p]}}
        for i, p in enumerate(odd)
    ]
    more = {"type": "object", "properties": None, "required": None}
    closed = {"type": "object", "properties": {}, "required": ["x"], "additionalProperties": False}
    tools += [{"name": "null", "parameters": more}, {"name": "closed", "parameters": closed}]
    tools.append({"name": "f", "parameters": ONE})
    del tools[3]["parameters"]["properties"]["b"]
    tools[3]["parameters"]["required"] = ["a"]
    tools = read_tools(tools)
    write = STYLE_WRITERS[style]
    assert accepts_call(tools, style, write("f", {"a": 1}))
    assert not accepts_call(tools, style, write("f", {"a": 2}))
    assert accepts_call(tools, style, write("null", {}))
    assert accepts_call(tools, style, write("closed", {}))
    assert accepts_call(tools, style, write("odd2", {"a": "x"}))
    assert accepts_call(tools, style, write("odd3", {"a": ["x"]}))
    assert "odd2" in caplog.text
    assert "the grammar cannot enforce the schema of tool 'odd0'" in caplog.text
