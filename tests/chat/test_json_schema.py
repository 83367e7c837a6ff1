"""Test, against jsonschema, which values closed schemas and schemas of parameters accept."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from flashmoe.chat.json_schema import (
    check_schema,
    close_objects,
    drop_patterns,
    property_schema,
    resolve_reference,
    validation_error,
)
from flashmoe.errors import SettingError

DRAFT7 = "http://json-schema.org/draft-07/schema#"
A = {"properties": {"a": {"type": "integer"}}}
B = {"properties": {"b": {"type": "integer"}}}
NEEDS_A, NEEDS_B = {**A, "required": ["a"]}, {**B, "required": ["b"]}
SHUT = {"additionalProperties": False}

# Random schemas over few names, so that their parts meet in the same values.

NAMES = st.sampled_from(["a", "b"])
FLAT = [1, "x", None, {}, {"a": 1}, {"b": 1}, {"c": 1}, {"a": 1, "b": 1}, {"a": 1, "c": 1}]
VALUES = [*FLAT, {"a": "x"}, {"a": "x", "b": 1}, *({"a": v} for v in FLAT), *([v] for v in FLAT)]
VALUES += [[], [{"a": 1}, {"b": 1}], [{"a": 1}, {"a": 1, "b": 1}], {"b": {"a": 1}}]
OBJECTS = [A, B, NEEDS_A, NEEDS_B, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
LEAVES = st.sampled_from([*OBJECTS, True, {"type": "integer"}, {"$ref": "#"}, {"const": {}}])


def compound(inner):
    """Schemas of one to three keywords."""
    some = st.lists(st.sampled_from(OBJECTS) | inner, min_size=1, max_size=2)
    one = st.sampled_from(OBJECTS) | inner
    keywords = {k: some for k in ("anyOf", "oneOf", "allOf", "prefixItems")}
    keywords |= {k: one for k in ("items", "additionalProperties", "not", "if", "then", "contains")}
    keywords |= {k: st.dictionaries(NAMES, one) for k in ("properties", "dependentSchemas")}
    keywords |= {"patternProperties": st.dictionaries(st.just("^[ab]"), one)}
    keywords |= {"required": st.lists(NAMES, unique=True, max_size=2)}
    keywords |= {k: st.integers(0, 1) for k in ("minProperties", "maxContains")}
    # An unknown keyword, whose value looks like a schema but means nothing.
    keywords |= {"x": st.just({"required": True, "oneOf": 3, "allOf": 3, "properties": [{}]})}
    usual = ["oneOf", "anyOf", "allOf", "not", "contains", "properties", "required"]
    names = st.sets(st.sampled_from([*usual, *keywords]), min_size=1, max_size=3)
    return names.flatmap(lambda some: st.fixed_dictionaries({k: keywords[k] for k in some}))


PARTS = compound(LEAVES) | LEAVES
# Without schemas that refer to themselves for ever: jsonschema takes long to fail on each.
DEFINED = PARTS.filter(lambda part: not any(r in str(part) for r in ("'#'", "#/$defs/a")))
DEFINITIONS = st.fixed_dictionaries({"a": DEFINED, "b": st.just(NEEDS_B)})
SCHEMAS = st.builds(lambda root, defs: {**root, "$defs": defs}, compound(PARTS), DEFINITIONS)


def accepts(schema, value):
    """Return what jsonschema says, or None if the schema refers to itself for ever."""
    try:
        return validator_for(schema, Draft202012Validator)(schema).is_valid(value)
    except RecursionError:
        return None


# Closing.


@settings(max_examples=300, deadline=None)
@given(SCHEMAS)
def test_closed_schema_accepts_only_what_the_schema_accepts(schema):
    shut = close_objects(schema)
    for value in VALUES if shut != schema else ():
        if accepts(shut, value):
            assert accepts(schema, value), value


REF_A = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"oneOf": [A, B]}, {"a": 1}),
        ({"items": {"oneOf": [REF_A, B]}}, [{"a": 1}]),
        ({"not": REF_A}, {"b": 1}),
        ({"if": REF_A, "then": False}, {"b": 1}),
        ({"contains": REF_A, "maxContains": 1}, [{}, {"b": 1}]),
        ({"properties": {"not": {"not": REF_A}}}, {"not": {"b": 1}}),
        ({"properties": {"default": {"not": REF_A}}}, {"default": {"b": 1}}),
    ],
)
def test_closing_alternatives_and_conditions_admits_no_value(schema, value):
    schema = {**schema, "$defs": {"a": A}}
    assert not accepts(schema, value)
    assert not accepts(close_objects(schema), value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"allOf": [A, B]}, {"a": 1, "b": 1}),
        ({**A, "anyOf": [NEEDS_B, NEEDS_A]}, {"b": 1}),
        ({"anyOf": [A], "oneOf": [NEEDS_B]}, {"b": 1}),
        ({"anyOf": [A], "allOf": [NEEDS_B]}, {"b": 1}),
        ({"required": ["b"], "anyOf": [A]}, {"b": 1}),
        ({"minProperties": 2, "anyOf": [A]}, {"a": 1, "b": 1}),
        ({"enum": [{"b": 1}], "anyOf": [A]}, {"b": 1}),
        ({"required": ["b"], **REF_A}, {"b": 1}),
        ({**REF_A, "anyOf": [NEEDS_B]}, {"b": 1}),
        ({**A, "required": ["b"]}, {"b": 1}),
        ({**A, "patternProperties": {"b": {}}}, {"b": 1}),
        ({**A, "additionalProperties": {"type": "integer"}}, {"b": 1}),
        ({**A, "additionalProperties": True}, {"b": 1}),
        ({**A, "minProperties": 2}, {"a": 1, "b": 1}),
        ({**A, "unevaluatedProperties": {"type": "integer"}}, {"b": 1}),
        ({**A, "dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 1}),
        ({**A, "dependentSchemas": {"a": NEEDS_B}}, {"a": 1, "b": 1}),
        ({"type": "object"}, {"b": 1}),
    ],
)
def test_closing_keeps_what_other_keywords_allow(schema, value):
    schema = {**schema, "$defs": {"a": A}}
    assert accepts(schema, value)
    assert accepts(close_objects(schema), value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (A, {"b": 1}),
        ({"type": "object", **NEEDS_A}, {"a": 1, "b": 1}),
        ({"properties": {}}, {"b": 1}),
        ({"properties": {"x": A}}, {"x": {"b": 1}}),
        ({"items": A}, [{"b": 1}]),
        ({"prefixItems": [A]}, [{"b": 1}]),
        ({"anyOf": [A, {"type": "null"}]}, {"b": 1}),
        ({"oneOf": [A, {"type": "null"}]}, {"b": 1}),
        ({"oneOf": [A, {"type": ["null", "string"]}]}, {"b": 1}),
        ({"allOf": [A]}, {"b": 1}),
        (REF_A, {"b": 1}),
        ({"anyOf": [REF_A, B], "description": "x"}, {"c": 1}),
        ({"additionalProperties": A}, {"x": {"b": 1}}),
        ({"patternProperties": {"x": A}}, {"x": {"b": 1}}),
        ({"properties": {"properties": A, "required": {}, "anyOf": {}}}, {"b": 1}),
        ({"properties": {"not": A, "if": {}, "enum": {}, "$ref": {}}}, {"not": {"b": 1}}),
        ({"properties": {"default": A}, "default": {"not": 3}}, {"default": {"b": 1}}),
    ],
)
def test_object_that_lists_its_properties_is_closed(schema, value):
    schema = {**schema, "$defs": {"a": A}}
    assert accepts(schema, value)
    assert not accepts(close_objects(schema), value)


def test_discriminated_alternatives_are_closed():
    """Pydantic writes such alternatives; no value can satisfy two of them, closed or open."""
    kinds = {
        k: {"properties": {"kind": {"const": k}, k: {}}, "required": ["kind"]}
        for k in ("cat", "dog")
    }
    schema = {"oneOf": [{"$ref": f"#/$defs/{k}"} for k in kinds], "$defs": kinds}
    schema["discriminator"] = {"propertyName": "kind", "mapping": {}}
    assert accepts(close_objects(schema), {"kind": "cat", "cat": 1})
    assert not accepts(close_objects(schema), {"kind": "cat", "dog": 1})


def test_data_that_looks_like_a_schema_is_not_closed():
    schema = {k: A for k in ("default", "const")} | {"enum": [A], "examples": [A]}
    assert close_objects(schema) == schema


# Schemas of single parameters.

ODD_NAMES = st.sampled_from(["a", "a/b", "~", "~1", "%", "%25", "a b", "é", "#", '"', "$ref", ""])
ODD_NAMES |= st.sampled_from(["enum", "default", "const", "examples", "properties", "0"])
DIALECTS = st.sampled_from([{}, {"$schema": DRAFT7}, {"$schema": DRAFT7, "$id": "http://x.y/z"}])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(ODD_NAMES, PARTS, min_size=1, max_size=3), DEFINITIONS, DIALECTS, st.data())
def test_parameter_accepts_the_same_values_as_the_property(properties, defined, dialect, data):
    name = data.draw(st.sampled_from(sorted(properties)))
    # The name of this definition is escaped where a reference names it.
    text = json.dumps([properties, defined]).replace("#/$defs/a", "#/$defs/~1%25 a")
    properties, defined = json.loads(text)
    schema = {"properties": properties, "$defs": {**defined, "/% a": defined["a"]}, **dialect}
    cut = property_schema(schema, name)
    for value in VALUES:
        expected = accepts(schema, {name: value})
        assert accepts(cut, value) == expected, value
        # Draft 7 ignores keywords beside a reference.
        if not dialect:
            assert accepts(resolve_reference(cut), value) == expected, value


@pytest.mark.parametrize("name", ["default", "enum", "const", "examples", "not", "if", "$ref"])
def test_reference_below_a_property_named_like_a_keyword_resolves(name):
    """The keyword `default` holds data, but a property of that name holds a schema."""
    inner = {"properties": {name: REF_A}}
    schema = {"properties": {name: inner}, "$defs": {"a": A}}
    cut = property_schema(schema, name)
    assert validation_error({name: {"a": 1}}, cut) is None
    assert "'x' is not of type 'integer'" in validation_error({name: {"a": "x"}}, cut)


def test_parameter_keeps_the_draft_of_its_schema():
    pair = {"type": "array", "items": [{"type": "integer"}, {"$ref": "#/definitions/s"}]}
    plain = {"type": "array", "items": [{"type": "integer"}]}
    schema = {"$schema": DRAFT7, "properties": {"a": pair, "b": plain}}
    schema["definitions"] = {"s": {"type": "string"}}
    for name in "ab":
        cut = property_schema(schema, name)
        assert validation_error([1, "x"], cut) is None
        assert "is not of type 'integer'" in validation_error(["x"], cut)


def test_parameter_keeps_anchors_and_references_by_id():
    schema = {
        "$id": "http://x.y/z",
        "properties": {"a": {"$ref": "#here"}, "b": {"$ref": "http://x.y/z#/$defs/a"}},
        "$defs": {"a": {"type": "integer", "$anchor": "here"}},
    }
    for name in "ab":
        assert validation_error(1, property_schema(schema, name)) is None
        assert "is not of type 'integer'" in validation_error("x", property_schema(schema, name))


TREE = {"properties": {"kids": {"items": {"$ref": "#/$defs/t"}}}, "required": ["v"]}


def test_recursive_parameter_is_checked_at_every_level():
    schema = {"properties": {"t": {"$ref": "#/$defs/t"}}, "$defs": {"t": TREE}}
    cut = property_schema(schema, "t")
    assert validation_error({"v": 1, "kids": [{"v": 2, "kids": []}]}, cut) is None
    assert "'v' is a required property (at ['kids'][0]['kids'][0]" in validation_error(
        {"v": 1, "kids": [{"v": 2, "kids": [{}]}]}, cut
    )


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/a"}, A),
        ({"$ref": "#/$defs/list/1"}, A),
        ({"$ref": "#/$defs/a~1b%20c"}, A),
        ({"$ref": "#/$defs/via", "description": "x"}, A),
        ({"$ref": "#/$defs/a", "title": "x"}, {**A, "title": "x"}),
        ({"$ref": "#/$defs/yes"}, True),
    ],
)
def test_reference_is_resolved(schema, expected):
    defs = {"a": A, "list": [True, A], "a/b c": A, "via": {"$ref": "#/$defs/a"}, "yes": True}
    # The definitions stay, because references inside the schema may name them.
    expected = expected if expected is True else {**expected, "$defs": defs}
    assert resolve_reference({**schema, "$defs": defs}) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}},
        {"$ref": "#/$defs/x"},
        {"$ref": "#/$defs/x", "$defs": {"x": 3}},
        {"$ref": "#/$defs/9", "$defs": [{}]},
        {"$ref": "#anchor"},
        {"$ref": "http://example.com/x"},
        {"$ref": "#/$defs/x", "required": ["b"], "$defs": {"x": NEEDS_A}},
        {"$ref": "#/$defs/x", "type": "object", "$defs": {"x": True}},
        {"$ref": 3},
    ],
)
def test_reference_that_cannot_be_resolved_is_left_unchanged(schema):
    assert resolve_reference(schema) == schema


def test_without_patterns_removes_the_keyword_but_not_a_property_of_that_name():
    schema = {"properties": {"pattern": {"pattern": "a"}, "b": {"pattern": "b"}}, "enum": ["x"]}
    schema |= {"default": {"pattern": "a"}, "items": [{"pattern": "a"}], "x": {"pattern": 3}}
    left = drop_patterns(schema, lambda pattern: pattern == "a")
    assert left == schema | {"items": [{}]} | {"properties": {"pattern": {}, "b": {"pattern": "b"}}}


# Invalid schemas.


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        (3, "it is not a JSON schema: a schema is a dict"),
        (None, "it is not a JSON schema"),
        ("object", "it is not a JSON schema"),
        ([], "it is not a JSON schema"),
        ({1: {}}, "it is not a JSON schema: a schema is a dict whose keys are strings"),
        ({"required": ("a",)}, "it is not a JSON schema"),
        ({"enum": [{1, 2}]}, "it cannot be written as JSON: Object of type set"),
        ({"const": math.nan}, "it cannot be written as JSON: Out of range float"),
        ({"const": json}, "it cannot be written as JSON"),
        ({"type": "text"}, "at type: 'text' is not valid under any of the given schemas"),
        ({"properties": {"a": {"type": 1}}}, "at properties/a/type: 1 is not valid"),
        ({"properties": []}, "at properties: [] is not of type 'object'"),
        ({"required": True}, "at required: True is not of type 'array'"),
        ({"minLength": -1}, "at minLength: -1 is less than the minimum of 0"),
        ({"pattern": "("}, "is not a valid JSON schema: '(' is not a regular expression"),
        ({"patternProperties": {"(": {}}}, "'(' is not a regular expression"),
        ({"anyOf": []}, "at anyOf: [] should be non-empty"),
        ({"$schema": ["x"]}, "$schema must be a string"),
        ({"items": {"$schema": 3}}, "$schema must be a string"),
        ({"$id": 3}, "$id must be a string"),
        ({"x": {"$ref": 3}}, "$ref must be a string"),
        ({"$schema": DRAFT7, "minimum": 3, "exclusiveMinimum": True}, "at exclusiveMinimum: True"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "it is written for draft 3"),
        ({"$ref": "#/$defs/x"}, "it refers to '#/$defs/x', but there is no schema"),
        ({"$ref": "#/title", "title": "x"}, "it refers to '#/title', but there is no schema"),
        ({"$ref": "#/anyOf/x", "anyOf": [{}]}, "it refers to '#/anyOf/x', but there is"),
        (
            {"items": {"$ref": "other.json"}},
            "it refers to 'other.json', and remote schemas are not fetched",
        ),
        ({"$ref": "http://[bad"}, "it refers to 'http://[bad', and remote schemas are not fetched"),
    ],
)
def test_invalid_schema_is_refused(schema, wrong):
    with pytest.raises(SettingError) as caught:
        check_schema(schema, "it")
    assert wrong in str(caught.value)


@pytest.mark.parametrize("depth", [400, 900, 10**5])
def test_schema_nested_too_deeply_raises_setting_error(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(SettingError, match="nested too deeply|maximum recursion depth"):
        check_schema(schema, "it")


@pytest.mark.parametrize(
    "schema",
    [
        *(True, False, {}, {"$schema": "http://example.com/own"}, {"$ref": "#"}, {"$ref": ""}),
        {"$schema": DRAFT7, "items": [{"$ref": "#/definitions/a"}], "definitions": {"a": True}},
        {"$ref": "#a", "$defs": {"x": {"$anchor": "a"}}},
        {"$ref": "#/x/y~1z/0", "x": {"y/z": [{"type": "null"}]}},
        {"$id": "http://a.b/c", "$ref": "http://a.b/c#/$defs/x", "$defs": {"x": {}}},
        {"properties": {"$ref": {}, "$schema": {}, "$id": {}}, "default": {"$ref": 3}},
        {"x-form": {"required": "yes", "properties": []}},
    ],
)
def test_valid_schema_is_accepted(schema):
    check_schema(schema, "it")
    close_objects(schema)
    drop_patterns(schema, lambda pattern: True)
    property_schema({"properties": {"a": schema}}, "a")


@settings(max_examples=100, deadline=None)
@given(SCHEMAS.filter(lambda schema: "'#'" not in str(schema)), st.sampled_from(VALUES))
def test_hostile_schema_is_refused_or_can_be_used(schema, value):
    """Every schema that passes `check_schema` can be closed, resolved and checked against."""
    text = json.dumps(schema)
    for old, new in (("#/$defs/b", "#/$defs/b/required"), ('"type"', '"$ref"'), ("1", "{}")):
        hostile = json.loads(text.replace(old, new))
        try:
            check_schema(hostile, "it")
        except SettingError:
            continue
        for usable in (hostile, close_objects(hostile), resolve_reference(hostile)):
            validation_error(value, usable)


@pytest.mark.parametrize("dialect", [None, DRAFT7, "https://json-schema.org/draft/2020-12/schema"])
def test_search_for_an_exponential_pattern_is_given_up(dialect):
    """With `re` this search would take 2 ** 60 steps, during which no other thread runs."""
    slow = {"type": "string", "pattern": "^(?=a)(a|a)*b$"}
    slow |= {"$schema": dialect} if dialect else {}
    for schema, value in (
        (slow, "a" * 60),
        ({"properties": {"x": slow}}, {"x": "a" * 60}),
        ({"$defs": {"s": slow}, "items": {"$ref": "#/$defs/s"}}, ["a" * 60]),
    ):
        assert "does not" in validation_error(value, schema) or "too long" in validation_error(
            value, schema
        )
        assert validation_error("ab" if value == "a" * 60 else [], schema) is None


def test_invalid_pattern_is_reported_as_a_fault():
    assert "not a regular expression" in validation_error(
        "x", {"type": "string", "pattern": "(?P<"}
    )
