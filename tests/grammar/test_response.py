"""Test which documents the grammar of a response format accepts."""

import logging
import re

import pytest
from grammar_matching import MATCHER_FACTORY, accepts, document
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schemas import altered, object_schemas, to_json
from tool_call_texts import TOKENIZER, tokens_of

from flashmoe.chat import json_schema as schemas
from flashmoe.errors import SettingError
from flashmoe.grammar import response as grammars


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
def test_grammar_accepts_exactly_the_documents_of_a_format(kind, wanted, good, bad):
    lark = document(kind, wanted)
    assert [t for t in good if not accepts(lark, t)] == []
    assert [t for t in bad if accepts(lark, t)] == []


def test_text_format_has_no_grammar():
    assert grammars.read_response_format({"type": "text"}) is None


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


def test_object_keys_come_in_the_order_of_the_schema():
    lark = document("json_schema", {**PERSON, "required": ["name"]})
    assert accepts(lark, '{"name": "a", "age": 3}')
    assert accepts(lark, '{"name": "a"}')
    assert not accepts(lark, '{"age": 3}')
    assert not accepts(lark, '{"age": 3, "name": "a"}')
    assert not accepts(lark, '{"name": "a", "city": "b"}')
    lark = document("json_schema", {**PERSON, "additionalProperties": {"type": "null"}})
    assert accepts(lark, '{"name": "a", "city": null}')
    assert not accepts(lark, '{"name": "a", "city": 1}')


def test_schema_that_closing_would_contradict_stays_open():
    """If the closed schema has no values, the schema is enforced as it was given."""
    schema = {"anyOf": [{"properties": {"a": {}}}], "propertyNames": {"const": "b"}}
    lark = document("json_schema", {"type": "object", **schema})
    assert accepts(lark, '{"b": 1}')
    both = [{**PERSON, "required": ["name"]}, {"properties": {"id": {}}, "required": ["id"]}]
    lark = document("json_schema", {"allOf": both})
    assert accepts(lark, '{"name": "a", "age": 3, "id": 1}')


def test_control_token_is_refused_in_a_document():
    for lark in (document("json_schema", {"type": "string"}), document("regex", "(?s:.)*")):
        for token in TOKENIZER.get_added_vocab():
            assert not accepts(lark, f'"{token}"')
            matcher = MATCHER_FACTORY.create(lark)
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
        ("json_schema", False, "the schema is false, so no value satisfies it"),
        (
            "json_schema",
            {"type": "nope"},
            "the schema of response_format is not a valid JSON schema",
        ),
        ("json_schema", {"enum": []}, "cannot be enforced: Unsatisfiable schema"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable schema"),
        ("json_schema", {"type": "array", "minItems": 3, "maxItems": 2}, "Unsatisfiable schema"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable schema"),
        (
            "json_schema",
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "Unsatisfiable schema: required property 'a'",
        ),
        (
            "json_schema",
            {"$ref": "http://a.b/c"},
            "refers to 'http://a.b/c', and remote schemas are not fetched",
        ),
        ("json_schema", {"$ref": "#/$defs/x"}, "refers to '#/$defs/x', but there is no schema"),
    ],
)
def test_document_that_cannot_be_enforced_raises_setting_error(kind, wanted, wrong):
    with pytest.raises(SettingError) as caught:
        document(kind, wanted)
    assert wrong in str(caught.value)
    # A line number would point into the generated grammar, which the caller has never seen.
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
def test_partly_enforced_schema_is_accepted_with_a_warning(caplog, schema, named, good, bad):
    schema = {**schema, "description": "a schema that no other test uses: results are kept"}
    with caplog.at_level(logging.WARNING, "flashmoe"):
        lark = document("json_schema", schema)
    assert "the grammar cannot enforce the complete schema" in caplog.text
    assert named in caplog.text
    assert accepts(lark, good)
    assert not accepts(lark, bad)


@settings(max_examples=60, deadline=None)
@given(object_schemas(), st.data())
def test_grammar_accepts_values_of_the_schema(shape, data):
    value = data.draw(shape.values)
    assert schemas.validation_error(value, shape.schema) is None
    lark = document("json_schema", shape.schema)
    assert accepts(lark, to_json(value))
    assert accepts(lark, to_json(value), bytewise=True)


@settings(max_examples=60, deadline=None)
@given(object_schemas(), st.data())
def test_grammar_refuses_values_that_the_schema_refuses(shape, data):
    value = data.draw(altered(data.draw(shape.values)))
    if schemas.validation_error(value, shape.schema) is not None:
        assert not accepts(document("json_schema", shape.schema), to_json(value))
