"""Test that what a request demands is read within limits, whatever its schemas are."""

from contextlib import suppress

import pytest

from flashmoe.chat.special_tokens import SpecialTokens
from flashmoe.errors import SettingError
from flashmoe.grammar.rules import (
    OutputRules,
    check_response_format,
    checked_tools,
    output_rules,
)
from flashmoe.requests import Request

NO_MARKERS = SpecialTokens(None, None, None, None, frozenset(), frozenset(), None)


def doubling(count, step=lambda reference: {"anyOf": [reference, reference]}):
    """Return definitions of which each one has the one before twice."""
    definitions = {"a0": {"const": 2}}
    for i in range(1, count):
        definitions[f"a{i}"] = step({"$ref": f"#/$defs/a{i - 1}"})
    return {"$ref": f"#/$defs/a{count - 1}", "$defs": definitions}


LARGE = {
    "many values": {"enum": [f"value {i}" for i in range(200_000)]},
    "many required properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(20_000)},
        "required": [f"p{i}" for i in range(20_000)],
    },
    "alternatives of alternatives": doubling(40),
    "products": doubling(40, lambda r: {"type": "object", "properties": {"a": r, "b": r}}),
    "all of all": doubling(40, lambda r: {"allOf": [r, r]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("place", ["format", "tool", "parameter"])
def test_large_schema_is_read_or_refused_within_limits(name, place):
    """Without limits some of these take minutes, or all memory."""
    schema = LARGE[name]
    with suppress(SettingError):
        if place == "format":
            check_response_format({"type": "json_schema", "schema": schema})
        elif place == "tool":
            checked_tools([{"name": "f", "parameters": schema}])
        else:
            # A reference does not leave the schema of its tool.
            definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
            value = {k: v for k, v in schema.items() if k != "$defs"}
            parameters = {"type": "object", "properties": {"x": value}, **definitions}
            checked_tools([{"name": "f", "parameters": parameters}])


@pytest.mark.parametrize(
    ("wanted", "wrong"),
    [
        ({"type": "json_schema", "schema": {"type": 3}}, "is not a valid JSON schema: at type"),
        ({"type": "regex", "pattern": "("}, "cannot be enforced"),
        ({"type": "lark", "grammar": "start: nothing"}, "cannot be enforced"),
        ({"type": "lark", "grammar": 'start: "a"' + "?" * 5}, "cannot be enforced"),
    ],
)
def test_format_that_cannot_be_enforced_is_refused(wanted, wrong):
    with pytest.raises(SettingError, match=wrong):
        check_response_format(wanted)


def test_request_without_demands_has_no_rules():
    assert output_rules(Request([]), NO_MARKERS) == OutputRules()
    with pytest.raises(SettingError, match="needs tools"):
        output_rules(Request([], tool_choice="required"), NO_MARKERS)


def test_tools_come_back_as_they_were_read():
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {}}}
    (tool,) = checked_tools([{"name": "f", "parameters": parameters}]).values()
    assert (tool.name, tool.parameters) == ("f", parameters)
    assert tool.definition["function"]["parameters"] == parameters
    assert tool.json_parameters == {"n"}
