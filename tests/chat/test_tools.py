"""Test how the tools and the tool choice of a request are checked before any work."""

import pytest
from tool_call_texts import TOOLS, coder, read

from flashmoe.chat.tool_parsers import CoderCallParser
from flashmoe.chat.tools import call_error, check_tool_choice, read_tools
from flashmoe.errors import SettingError


@pytest.mark.parametrize(
    ("definition", "wrong"),
    [
        (3, "a tool has the name None: use a name of 1 to 128 characters"),
        ({}, "a tool has the name None"),
        ({"function": None}, "a tool has the name None"),
        ({"function": {"name": 3}}, "a tool has the name 3"),
        ({"name": ""}, "a tool has the name ''"),
        ({"name": "two words"}, "a tool has the name 'two words'"),
        ({"name": "a\n"}, "a tool has the name 'a\\n'"),
        ({"name": "<|im_end|>"}, "a tool has the name '<|im_end|>'"),
        ({"name": 'a"b'}, "a tool has the name 'a\"b'"),
        ({"name": "x" * 129}, "a tool has the name 'xxx"),
        ({"name": "words"}, "two tools are named 'words': rename one"),
        ({"name": "f", "parameters": "x"}, "the parameter schema of tool 'f' is not a JSON schema"),
        ({"name": "f", "parameters": [1]}, "the parameter schema of tool 'f' is not a JSON schema"),
        ({"name": "f", "parameters": True}, "the parameters of tool 'f' have the type True: their"),
        (
            {"name": "f", "parameters": {"type": "array"}},
            "have the type 'array': their schema must be",
        ),
        (
            {"name": "f", "parameters": {"type": ["object"]}},
            "have the type ['object']: their schema must",
        ),
        ({"name": "f", "parameters": {"type": "objekt"}}, "tool 'f' is not a valid JSON schema"),
        (
            {"name": "f", "parameters": {"$ref": "#/x", "x": {"type": "null"}}},
            "have the type 'null'",
        ),
        ({"name": "f", "parameters": {"$ref": "#/x"}}, "refers to '#/x', but there is no schema"),
        (
            {"name": "f", "parameters": {"$ref": "#"}},
            "are '#', a reference that cannot be followed",
        ),
        (
            {"name": "f", "parameters": {"$ref": "#a"}},
            "are '#a', a reference that cannot be followed",
        ),
    ],
)
def test_unusable_tool_is_refused(definition, wrong):
    with pytest.raises(SettingError) as caught:
        read_tools([{"name": "words"}, definition])
    assert wrong in str(caught.value)


def test_tool_definition_has_the_form_that_templates_expect():
    inner = {"name": "f", "description": "d", "strict": True}
    empty = {"type": "object", "properties": {}}
    for definition in (inner, {"type": "function", "function": inner}):
        tool = read_tools([definition])["f"]
        assert tool.definition == {"type": "function", "function": {**inner, "parameters": empty}}
        assert tool.parameters == empty


def test_parameters_behind_a_reference_are_resolved():
    defs = {"Args": {"properties": {"a": {"$ref": "#/$defs/A"}}}, "A": {"type": "integer"}}
    tools = read_tools([{"name": "f", "parameters": {"$ref": "#/$defs/Args", "$defs": defs}}])
    assert tools["f"].parameters["properties"] == {"a": {"$ref": "#/$defs/A"}}
    assert read(CoderCallParser, [coder("f", {"a": 3})], tools) == ("f", {"a": 3})
    assert call_error("f", {"a": 3}, tools) is None
    assert "'x' is not of type 'integer' (at ['a']" in call_error("f", {"a": "x"}, tools)


@pytest.mark.parametrize(
    ("choice", "tools", "wrong"),
    [
        ("required", {}, "tool_choice='required' needs tools, and the request has none"),
        ("words", {}, "tool_choice='words' needs tools"),
        (
            "other",
            TOOLS,
            "'other' is neither auto, none, required nor the name of a tool: the tools",
        ),
    ],
)
def test_choice_of_an_unknown_tool_is_refused(choice, tools, wrong):
    with pytest.raises(SettingError) as caught:
        check_tool_choice(choice, tools)
    assert wrong in str(caught.value)
    for good in ("auto", "none"):
        check_tool_choice(good, tools)
    for good in ("required", "words"):
        check_tool_choice(good, TOOLS)
