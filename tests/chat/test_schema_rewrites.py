"""Test how schemas are brought to the current draft, and to what a grammar enforces."""

import pytest

from flashmoe.chat.json_schema import check_schema, python_pattern, validation_error
from flashmoe.chat.schema_rewrites import enforceable, modern

DRAFT7 = "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": None, "required": None, "type": "object"}, {"type": "object"}),
        ({"const": None, "default": None}, {"const": None, "default": None}),
        ({"minimum": 0, "exclusiveMinimum": True}, {"exclusiveMinimum": 0}),
        ({"maximum": 9, "exclusiveMaximum": False}, {"maximum": 9}),
        ({"exclusiveMinimum": True}, {}),
        (
            {"items": [{"type": "string"}], "additionalItems": False},
            {"prefixItems": [{"type": "string"}], "items": False},
        ),
        ({"properties": {"required": {"required": True}}}, {"properties": {"required": {}}}),
        (
            {"properties": {"items": {"items": [{}]}}},
            {"properties": {"items": {"prefixItems": [{}]}}},
        ),
        # A schema that names its draft is read by that draft.
        ({"$schema": DRAFT7, "items": [{}]}, {"$schema": DRAFT7, "items": [{}]}),
        (True, True),
        ([1], [1]),
    ],
)
def test_old_drafts_become_the_current_one(schema, expected):
    assert modern(schema) == expected
    if isinstance(expected, dict):
        check_schema(expected, "it")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "format": "date"}, "2024-01-01", "found"),
        (
            {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {}},
            {"a": 1, "b": 2},
            {"c": 1},
        ),
        ({"type": "object", "propertyNames": {"const": "a"}}, {"a": 1}, {"b": 1}),
        ({"type": "object", "propertyNames": {"pattern": "^x"}}, {"xa": 1}, {"y": 1}),
    ],
)
def test_rewritten_schema_has_the_same_values(schema, good, bad):
    rewritten = enforceable(schema)
    assert rewritten != schema
    assert not {"format", "propertyNames"} & rewritten.keys()
    for one in (schema, rewritten):
        assert validation_error(good, one) is None
        assert validation_error(bad, one) is not None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "date", "pattern": "^2"},
        {"type": "string", "format": "color"},
        {"propertyNames": {"enum": ["a"]}, "additionalProperties": False, "properties": {"b": {}}},
        {"propertyNames": {"maxLength": 3}},
    ],
)
def test_schema_that_cannot_be_rewritten_stays(schema):
    assert enforceable(schema) == schema


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\p{L}+$", "été", "a1"),
        (r"^\u{1F600}$", "\U0001f600", "x"),
        (r"^a$", "a", "a\n"),
        (r"^[$]\$$", "$$", "$"),
        (r"^[^]$", "\n", ""),
        (r"^(?<year>\d{4})$", "2024", "24"),
        (r"[]", None, "x"),
        (r"^\/[\]$]+$", "/]$", "/x"),
    ],
)
def test_patterns_are_those_of_javascript(pattern, good, bad):
    schema = {"type": "string", "pattern": pattern}
    check_schema(schema, "it")
    if good is not None:
        assert validation_error(good, schema) is None
    assert "does not match" in validation_error(bad, schema)
    assert python_pattern(python_pattern("a[$]b")) == "a[$]b"
