"""Test how values are typed by their schemas and checked against them."""

import http.server
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.chat.json_schema import (
    check_schema,
    loads,
    property_schema,
    validation_error,
    value_from_text,
)
from flashmoe.errors import SettingError

# Typing of raw text.

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


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e400", "", "{'a': 1}", '"\\ud800"', "1 2"])
def test_loads_refuses_text_that_is_not_json(text):
    with pytest.raises(ValueError, match="."):
        loads(text)


# Faults.


def test_fault_is_short_and_names_the_place():
    schema = {"properties": {"a": {"items": {"maxLength": 3}}}}
    wrong = validation_error({"a": ["abc", "x" * 10**5]}, schema)
    assert wrong.endswith("... (at ['a'][1], keyword 'maxLength')")
    assert len(wrong) < 400
    assert validation_error(3, {"type": "null"}).endswith("(at its top, keyword 'type')")
    dangling = {"$ref": "#/$defs/x", "description": "y" * 10**5}
    assert len(validation_error(3, dangling)) < 400


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (10**400, {"multipleOf": 0.5}),
        (1, {"allOf": [{"$ref": "#"}]}),
        ([[]] * 3, {"items": {"anyOf": [{"$ref": "#"}]}, "allOf": [{"$ref": "#"}]}),
    ],
)
def test_value_that_cannot_be_checked_is_reported_as_a_fault(value, schema):
    assert "cannot be validated against the schema" in validation_error(value, schema)


def test_remote_reference_is_not_fetched():
    requested_paths = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            requested_paths.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/schema.json"
        schema = {"properties": {"a": {"$ref": f"{url}#/x"}}}
        with pytest.raises(
            SettingError, match=f"it refers to '{url}#/x', and remote schemas are not fetched"
        ):
            check_schema(schema, "it")
        assert "cannot be followed: Unresolvable: http" in validation_error({"a": 1}, schema)
        value, wrong = value_from_text("1", property_schema(schema, "a"))
        assert value is None
        assert "cannot be followed: Unresolvable: http" in wrong
        named = {"$schema": url, "$id": url, "items": {"$id": f"{url}/2", "$ref": "3"}}
        check_schema(named, "it")
        assert "cannot be followed" in validation_error([1], named)
        server.shutdown()
    assert requested_paths == []
