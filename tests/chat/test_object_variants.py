"""Test how object schemas with alternatives at their top become plain ones."""

import pytest

from flashmoe.chat.json_schema import validation_error
from flashmoe.chat.object_variants import MAX_VARIANTS, object_variants

A = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
KIND = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}


def closed(schema):
    return {**schema, "additionalProperties": False}


def properties(schema):
    return [(sorted(v["properties"]), v.get("required", [])) for v in object_variants(schema)]


def test_each_alternative_is_a_variant():
    for union in ("oneOf", "anyOf"):
        assert properties({"type": "object", union: [A, B]}) == [(["a"], ["a"]), (["b"], ["b"])]
    whole = {**KIND, "oneOf": [A, B]}
    assert properties(whole) == [(["a", "kind"], ["a", "kind"]), (["b", "kind"], ["b", "kind"])]
    for variant, value in zip(
        object_variants(whole), [{"kind": "x", "a": 1}, {"kind": "x", "b": "y"}], strict=True
    ):
        assert validation_error(value, variant) is None
        assert validation_error(value, whole) is None


def test_all_of_is_one_variant():
    assert properties({"type": "object", "allOf": [A, B]}) == [(["a", "b"], ["a", "b"])]
    nested = {"type": "object", "allOf": [KIND, {"anyOf": [A, B]}]}
    assert properties(nested) == [(["a", "kind"], ["a", "kind"]), (["b", "kind"], ["b", "kind"])]


def test_alternatives_may_be_references():
    schema = {"type": "object", "oneOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}}
    first, second = object_variants(schema)
    assert first["properties"] == A["properties"]
    assert first["$defs"] == second["$defs"] == schema["$defs"]


def test_properties_on_both_sides_are_combined():
    tagged = {"properties": {"kind": {"const": "a", "description": "x"}}}
    [variant] = object_variants({**KIND, "anyOf": [tagged]})
    assert variant["properties"]["kind"] == {"type": "string", "const": "a", "description": "x"}


def test_closed_alternatives_take_no_other_properties():
    schema = {"type": "object", "properties": {"a": {}, "c": {}}, "oneOf": [closed(A), B]}
    first, second = object_variants(schema)
    assert sorted(first["properties"]) == ["a"]
    assert first["additionalProperties"] is False
    assert sorted(second["properties"]) == ["a", "b", "c"]
    # Nothing satisfies both.
    assert len(object_variants({**KIND, "oneOf": [closed(A), B]})) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "string"},
        {"properties": {"kind": {"type": "integer"}}},
        {"patternProperties": {"^x": {}}},
        {"additionalProperties": {"type": "string"}},
        {"not": {}},
        {"$ref": "#/properties/nowhere"},
        {"$ref": "#"},
        3,
    ],
)
def test_other_alternatives_are_left_out(part):
    assert object_variants({**KIND, "anyOf": [part, A]}) == [KIND]
    assert object_variants({**KIND, "anyOf": 3}) == [KIND]


def test_many_alternatives_are_left_out():
    parts = [{"properties": {f"p{i}": {}}} for i in range(MAX_VARIANTS + 1)]
    assert object_variants({**KIND, "anyOf": parts}) == [KIND]


def test_plain_schema_stays():
    assert object_variants(KIND) == [KIND]
