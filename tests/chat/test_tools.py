"""Test how the tools and the tool choice of a request are checked before any work."""

import pytest
from tool_call_texts import TOOLS, coder, read

from flashmoe.chat import tools as tools_module
from flashmoe.chat.tool_parsers import CoderCall
from flashmoe.chat.tools import check_choice, read_tools
from flashmoe.errors import SettingError


@pytest.mark.parametrize(
    ("definition", "wrong"),
    [
        (3, "a tool has the name None: names are up to 128 characters"),
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
        ({"name": "f", "parameters": "x"}, "the parameters of tool 'f' is no JSON schema"),
        ({"name": "f", "parameters": [1]}, "the parameters of tool 'f' is no JSON schema"),
        ({"name": "f", "parameters": True}, "the parameters of tool 'f' are of type True: they"),
        ({"name": "f", "parameters": {"type": "array"}}, "are of type 'array': they must be an"),
        ({"name": "f", "parameters": {"type": ["object"]}}, "are of type ['object']: they must"),
        ({"name": "f", "parameters": {"type": "objekt"}}, "tool 'f' is no valid JSON schema"),
        ({"name": "f", "parameters": {"$ref": "#/x", "x": {"type": "null"}}}, "are of type 'null'"),
        ({"name": "f", "parameters": {"$ref": "#/x"}}, "refers to '#/x', where there is no schema"),
        ({"name": "f", "parameters": {"$ref": "#"}}, "are '#', which cannot be followed: write"),
        ({"name": "f", "parameters": {"$ref": "#a"}}, "are '#a', which cannot be followed: write"),
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
    assert read(CoderCall, [coder("f", {"a": 3})], tools) == ("f", {"a": 3})
    assert tools_module.fault("f", {"a": 3}, tools) is None
    assert "'x' is not of type 'integer' (at ['a']" in tools_module.fault("f", {"a": "x"}, tools)


@pytest.mark.parametrize(
    ("choice", "tools", "wrong"),
    [
        ("required", {}, "tool_choice='required' needs tools, and the request has none"),
        ("words", {}, "tool_choice='words' needs tools"),
        ("other", TOOLS, "'other' is neither auto, none, required nor a tool: the tools are words"),
    ],
)
def test_choice_of_an_unknown_tool_is_refused(choice, tools, wrong):
    with pytest.raises(SettingError) as caught:
        check_choice(choice, tools)
    assert wrong in str(caught.value)
    for good in ("auto", "none"):
        check_choice(good, tools)
    for good in ("required", "words"):
        check_choice(good, TOOLS)
