"""Test which values raw texts stand for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.chat.raw_values import value_from_text

OPTIONAL_INT = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
COLOUR = {"$ref": "#/$defs/c", "$defs": {"c": {"enum": ["red", "3"]}}}
COUNT = {"$ref": "#/$defs/c", "$defs": {"c": {"type": "integer"}}}
NULLABLE = {"type": ["string", "null"]}
BIG = 12345678901234567890123


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", OPTIONAL_INT, 3),
        ("null", OPTIONAL_INT, None),
        ("None", OPTIONAL_INT, None),
        ("true", {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        ("True", {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        ("a", {"enum": ["a", 1, None]}, "a"),
        ("1", {"enum": ["a", 1, None]}, 1),
        ("null", {"enum": ["a", 1, None]}, None),
        ("1", {"enum": ["1"]}, "1"),
        ('"a"', {"enum": ["a"]}, "a"),
        ("red", COLOUR, "red"),
        ("3", COLOUR, "3"),
        ("3", COUNT, 3),
        ("1.0", COUNT, 1),
        ("null", {"type": "string"}, "null"),
        ("null", NULLABLE, None),
        ("nul", NULLABLE, "nul"),
        ("None", {"type": "string"}, "None"),
        ("True", {"type": "string"}, "True"),
        ("3", {"type": "string"}, "3"),
        ("", {"type": "string"}, ""),
        ("", True, ""),
        (" a\n", {"type": "string"}, " a\n"),
        ('"a"', {"type": "string"}, '"a"'),
        ('"a"', {}, '"a"'),
        ('"a"', NULLABLE, '"a"'),
        ('"a" b', {}, '"a" b'),
        ("{}", {"type": "string"}, "{}"),
        (str(BIG), {"type": "integer"}, BIG),
        (f"-{BIG}", {}, -BIG),
        (str(BIG), {"type": "number"}, BIG),
        (f'{{"a": [{BIG}]}}', {"type": "object"}, {"a": [BIG]}),
        ("1.0", {"type": "integer"}, 1),
        ("1e3", {"type": "integer"}, 1000),
        ("1.0", {"type": "number"}, 1.0),
        ("1", {"type": "number"}, 1),
        ("1.0", {}, 1.0),
        (" 3 ", {"type": "integer"}, 3),
        ("3", {}, 3),
        ("three", {}, "three"),
        ("false", {}, False),
        ("False", True, False),
        ("None", {}, None),
        ("true", {"type": "boolean"}, True),
        (" True", {"type": "boolean"}, True),
        ('{"a": "b"}', {"type": "object"}, {"a": "b"}),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("[True]", {}, "[True]"),
        ("NaN", {}, "NaN"),
        ("-Infinity", {}, "-Infinity"),
        ("1e999", {}, "1e999"),
        ("[" * 10**5, {}, "[" * 10**5),
        ("9" * 5000, {}, "9" * 5000),
        ('["\\ud83d\\ude00"]', {}, ["\U0001f600"]),
        ('["\\ud83d"]', {}, '["\\ud83d"]'),
    ],
)
def test_raw_text_is_typed_by_its_schema(text, schema, value):
    typed_value, wrong = value_from_text(text, schema)
    assert wrong is None
    assert repr(typed_value) == repr(value)  # because 1, 1.0 and True are equal


@pytest.mark.parametrize(
    ("text", "schema", "wrong"),
    [
        ("three", {"type": "integer"}, "'three' is not of type 'integer'"),
        ("1.5", {"type": "integer"}, "1.5 is not of type 'integer'"),
        ("3", {"type": "boolean"}, "3 is not of type 'boolean'"),
        ("yes", {"type": "boolean"}, "'yes' is not of type 'boolean'"),
        ("1", {"type": "boolean"}, "1 is not of type 'boolean'"),
        ("True", {"type": "integer"}, "True is not of type 'integer'"),
        ("blue", COLOUR, "'blue' is not one of ['red', '3']"),
        ("NaN", {"type": "number"}, "'NaN' is not of type 'number'"),
        ("1e999", {"type": "number"}, "'1e999' is not of type 'number'"),
        ("{'a': 1}", {"type": "object"}, "is not of type 'object'"),
        (
            '{"a": "x"}',
            {"properties": {"a": {"type": "integer"}}, "type": "object"},
            "'x' is not of type 'integer' (at ['a'], keyword 'type')",
        ),
        ("[1, ", {"type": "array"}, "'[1, ' is not of type 'array'"),
        ("ab", {"type": "string", "maxLength": 1}, "'ab' is too long"),
        ("1", False, "False schema does not allow"),
        ("1", {"$ref": "#/$defs/x"}, "a reference that cannot be followed"),
    ],
)
def test_raw_text_that_does_not_fit_its_schema_is_a_fault(text, schema, wrong):
    value, fault = value_from_text(text, schema)
    assert value is None
    assert wrong in fault


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | st.text()) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON)
def test_value_written_as_json_is_read_back(value):
    for ascii_only in (False, True):
        assert value_from_text(json.dumps(value, ensure_ascii=ascii_only), {}) == (value, None)


@given(st.text())
def test_text_of_type_string_is_returned_unchanged(text):
    assert value_from_text(text, {"type": "string"}) == (text, None)
