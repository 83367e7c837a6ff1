"""Test tools, tool choices and response formats in every form of LangChain and OpenAI."""

from typing import Annotated

import pytest
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from flashmoe.catalog import DEMO
from langchain_flashmoe import ChatFlashMoE, InvalidRequest
from langchain_flashmoe.tools import engine_response_format, engine_tool_choice, openai_tools


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


class Add(BaseModel):
    """Add two numbers."""

    a: int = Field(description="the first")
    b: int = 2


class AddDict(TypedDict):
    """Add two numbers."""

    a: Annotated[int, ..., "the first"]
    b: int


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
DEFINITION = {"name": "add", "description": "Add two numbers.", "parameters": SCHEMA}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (add, "add"),
        (tool(add), "add"),
        (Add, "Add"),
        (AddDict, "AddDict"),
        (DEFINITION, "add"),
        ({"type": "function", "function": DEFINITION}, "add"),
        ({"name": "add", "description": "Add two numbers.", "input_schema": SCHEMA}, "add"),
        ({"title": "add", "description": "Add two numbers.", **SCHEMA}, "add"),
    ],
)
@pytest.mark.parametrize("strict", [None, False, True])
def test_every_form_of_a_tool_is_accepted(given, name, strict):
    (definition,) = openai_tools([given], strict)
    assert definition["type"] == "function"
    function = definition["function"]
    assert function["name"] == name
    assert function["description"].startswith("Add two numbers.")
    assert function["parameters"]["properties"]["a"]["type"] == "integer"
    assert function.keys() == {"name", "description", "parameters"}
    assert openai_tools([definition]) == [definition]


def test_tool_of_a_server_is_refused():
    with pytest.raises(InvalidRequest, match="'web_search' runs on a server"):
        openai_tools([{"type": "web_search"}])
    with pytest.raises(InvalidRequest, match="cannot be used as a tool"):
        openai_tools([{"type": "object", "properties": {}}])


TOOLS = openai_tools([add, Add, {"name": "any", "parameters": SCHEMA}])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        (False, "none"),
        ("required", "required"),
        (True, "required"),
        ("Add", "Add"),
        ("any", "any"),  # a tool has that name here
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
        ({"name": "add"}, "add"),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
    ],
)
def test_tool_choice_is_translated(choice, expected):
    assert engine_tool_choice(choice, TOOLS) == expected


def test_any_means_required():
    assert engine_tool_choice("any", TOOLS[:2]) == "required"


@pytest.mark.parametrize(
    "choice", ["sub", {"type": "function", "function": {"name": "sub"}}, 3, {}]
)
def test_unknown_choice_is_refused(choice):
    with pytest.raises(InvalidRequest, match="the tools are add, Add"):
        ChatFlashMoE(model=DEMO).bind_tools([add, Add], tool_choice=choice)
    with pytest.raises(ValueError, match="the tools are none"):
        ChatFlashMoE(model=DEMO).bind_tools([], tool_choice=choice)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        ({"type": "regex", "pattern": "a+"}, {"type": "regex", "pattern": "a+"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            {"type": "json_schema", "schema": SCHEMA},
        ),
        ({"type": "json_schema", "schema": SCHEMA}, {"type": "json_schema", "schema": SCHEMA}),
        (SCHEMA, {"type": "json_schema", "schema": SCHEMA}),
        (Add, {"type": "json_schema", "schema": Add.model_json_schema()}),
    ],
)
def test_response_format_is_translated(given, expected):
    assert engine_response_format(given) == expected


@pytest.mark.parametrize(
    "given", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": 3}]
)
def test_response_format_without_a_schema_is_refused(given):
    with pytest.raises(InvalidRequest, match="has no schema"):
        engine_response_format(given)
