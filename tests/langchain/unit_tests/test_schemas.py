"""Test every form of a schema, and how answers are parsed by them."""

import json
from typing import Annotated, Optional

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as OldBaseModel
from pydantic.v1 import Field as OldField
from typing_extensions import TypedDict

from flashmoe.catalog import DEMO
from langchain_flashmoe import ChatFlashMoE, InvalidRequest
from langchain_flashmoe.schemas import AnswerSchema
from langchain_flashmoe.structured import SchemaParser


class New(BaseModel):
    """A person."""

    name: str = Field(min_length=1)
    age: Optional[int] = None  # noqa: UP045


class Old(OldBaseModel):
    """A person."""

    name: str = OldField(min_length=1)
    age: Optional[int] = None  # noqa: UP045


class Dict(TypedDict):
    """A person."""

    name: Annotated[str, ..., "the name"]
    age: Annotated[Optional[int], None, "years"]  # noqa: UP045


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


FUNCTION = {
    "name": "Fn",
    "description": "A person.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("given", "name", "makes"),
    [
        (New, "New", New),
        (Old, "Old", Old),
        (Dict, "Dict", dict),
        (New.model_json_schema(), "New", dict),
        (FUNCTION, "Fn", dict),
        ({"type": "function", "function": FUNCTION}, "Fn", dict),
    ],
)
def test_every_form_of_a_schema_is_accepted(given, name, makes):
    schema = AnswerSchema.from_any(given)
    assert schema.name == name
    assert schema.description == "A person."
    assert schema.json_schema["properties"]["name"]["type"] == "string"
    assert isinstance(schema.build({"name": "Ann"}), makes)
    assert schema.tool["function"]["name"] == name


def test_constraints_of_a_class_are_kept():
    assert AnswerSchema.from_any(New).json_schema["properties"]["name"]["minLength"] == 1
    assert AnswerSchema.from_any(Old).json_schema["properties"]["name"]["minLength"] == 1


def test_recursive_class_is_accepted():
    assert AnswerSchema.from_any(Tree).json_schema["$ref"].startswith("#/$defs")
    made = AnswerSchema.from_any(Tree).build({"value": 1, "children": [{"value": 2}]})
    assert made.children[0].value == 2


def test_schema_without_a_title_gets_a_name():
    assert AnswerSchema.from_any({"type": "object"}).name == "answer"
    assert AnswerSchema.from_any({"title": "My schema: one"}).name == "My_schema__one"


@pytest.mark.parametrize("given", [3, "text", [1]])
def test_value_that_is_not_a_schema_is_refused(given):
    with pytest.raises(InvalidRequest, match="is not a schema"):
        ChatFlashMoE(model=DEMO).with_structured_output(given)


def test_bad_arguments_are_refused_at_once():
    model = ChatFlashMoE(model=DEMO)
    with pytest.raises(InvalidRequest, match="method='magic' is not"):
        model.with_structured_output(New, method="magic")
    with pytest.raises(InvalidRequest, match="'json_schema' needs a schema"):
        model.with_structured_output(None)
    with pytest.raises(InvalidRequest, match="'max_tokns' is not a known option"):
        model.with_structured_output(New, max_tokns=3)


def answer(text="", **kwargs):
    return [ChatGeneration(message=AIMessage(text, **kwargs))]


def parser(from_call=False, schema=New):
    return SchemaParser(
        schema_=AnswerSchema.from_any(schema) if schema else None, from_call=from_call
    )


def test_answer_is_parsed():
    assert parser().parse_result(answer('{"name": "Ann", "age": 3}')) == New(name="Ann", age=3)
    assert parser().parse('{"name": "Ann"}') == New(name="Ann")
    call = {"name": "New", "args": {"name": "Ann"}, "id": "c"}
    assert parser(True).parse_result(answer(tool_calls=[call])) == New(name="Ann")
    assert parser(schema=None).parse_result(answer('{"any": [1]}')) == {"any": [1]}


@pytest.mark.parametrize(
    "text", ['{"name": "An', '{"name": "Ann"', "", "Ann", '{"name": ""}', '{"age": 3}', "NaN"]
)
def test_invalid_answer_is_refused(text):
    whole = AIMessageChunk(
        text, chunk_position="last", response_metadata={"finish_reason": "length"}
    )
    for partial in (False, True):
        with pytest.raises(OutputParserException, match="no valid answer .finish_reason: length"):
            parser().parse_result([ChatGeneration(message=whole)], partial=partial)


def test_broken_or_missing_call_is_refused():
    broken = {"name": "New", "args": "<", "id": "c", "error": "it was cut"}
    with pytest.raises(OutputParserException, match="it was cut"):
        parser(True).parse_result(answer(invalid_tool_calls=[broken]))
    with pytest.raises(OutputParserException, match="there is no tool call, but 'I am sorry'"):
        parser(True).parse_result(answer("I am sorry"))


def test_stream_is_parsed_while_it_grows():
    text = json.dumps({"name": "Ann", "age": 31})
    chunks = [AIMessageChunk(letter) for letter in text]
    chunks[-1].chunk_position = "last"
    results = list(parser(schema=New.model_json_schema()).transform(iter(chunks)))
    assert results[0] == {}
    assert {"name": "A"} in results
    assert results[-1] == {"name": "Ann", "age": 31}
    assert list(parser().transform(iter(chunks)))[-1] == New(name="Ann", age=31)


def test_stream_that_ends_early_is_refused():
    chunks = [AIMessageChunk('{"name": "Ann", "age": 3'), AIMessageChunk("", chunk_position="last")]
    results = parser(schema=New.model_json_schema()).transform(iter(chunks))
    with pytest.raises(OutputParserException, match="no valid answer"):
        list(results)
