"""Test that tool calls and structured output of the demo model always fit their schemas.

The demo model is too weak to fill in schemas sensibly, so the values are not tested.
"""

from typing import Literal, Optional

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import HumanMessage, ToolMessage
from pydantic import BaseModel, Field
from toys import write_chat_toy

from flashmoe.catalog import DEMO
from flashmoe.chat.json_schema import loads, validation_error
from langchain_flashmoe import ChatFlashMoE, IncompleteOutput

#: `make test-all` runs these.
pytestmark = pytest.mark.slow


def model(**kwargs):
    return ChatFlashMoE(**{"model": DEMO, "temperature": 0, "max_tokens": 200} | kwargs)


class Address(BaseModel):
    street: str = Field(max_length=20)
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: Optional[int] = Field(ge=0, le=120)  # noqa: UP045
    kind: Literal["friend", "foe"]
    homes: list[Address] = Field(min_length=1, max_length=2)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def register(person: Person, note: Optional[str] = None) -> str:  # noqa: UP045
    """Register a person."""
    return person.name


METHODS = ["json_schema", "function_calling", "json_mode"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
async def test_answer_fits_the_class(method, seed):
    # A high temperature and few experts make the model write as much nonsense as possible.
    made = model(temperature=1.5, experts=2, seed=seed)
    chain = made.with_structured_output(Person, method=method)
    person = chain.invoke("Invent a person.")
    assert isinstance(person, Person)
    assert await chain.ainvoke("Invent a person.") == person
    *_, last = chain.stream("Invent a person.")
    assert last == person
    as_dict = made.with_structured_output(Person.model_json_schema(), method=method)
    result = as_dict.invoke("Invent a person.")
    assert validation_error(result, Person.model_json_schema()) is None
    if method != "function_calling":
        assert result == person.model_dump()


@pytest.mark.parametrize("method", METHODS)
def test_answer_cut_short_is_a_parsing_error(method):
    made = model(max_tokens=12)
    with pytest.raises(OutputParserException):
        made.with_structured_output(Person, method=method).invoke("Invent a person.")
    with pytest.raises(OutputParserException):
        list(made.with_structured_output(Person, method=method).stream("Invent a person."))
    chain = made.with_structured_output(Person, method=method, include_raw=True)
    result = chain.invoke("Invent a person.")
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException)
    assert "finish_reason: length" in str(result["parsing_error"])
    assert result["raw"].response_metadata["finish_reason"] == "length"
    assert result["raw"].usage_metadata["output_tokens"] == 12


@pytest.mark.parametrize("method", METHODS)
def test_raw_answer_is_included(method):
    chain = model().with_structured_output(Person, method=method, include_raw=True, strict=True)
    result = chain.invoke("Invent a person.")
    assert isinstance(result["parsed"], Person)
    assert result["parsing_error"] is None
    assert result["raw"].usage_metadata


def test_json_mode_works_without_a_schema():
    made = model(temperature=1, seed=4, max_tokens=150)
    chain = made.with_structured_output(None, method="json_mode", include_raw=True)
    result = chain.invoke('Say {"a": 1}')
    raw = result["raw"].text
    assert raw.startswith("{")
    # The demo model may write until max_tokens, and then nothing is parsed.
    whole = result["raw"].response_metadata["finish_reason"] == "stop"
    assert result["parsed"] == (loads(raw) if whole else None)


def test_tools_and_a_format_work_together():
    """The answer consists of calls or is a document; here one follows the other."""
    made = model().bind_tools([add], response_format=Person)
    question = HumanMessage("What is 17 plus 25? Use the tool.")
    called = made.invoke([question], tool_choice="any")
    assert called.tool_calls[0]["name"] == "add"
    result = ToolMessage("42", tool_call_id=called.tool_calls[0]["id"])
    answer = made.invoke([question, called, result], tool_choice="none")
    assert Person.model_validate_json(answer.text)
    free = made.invoke([question])
    assert free.tool_calls or Person.model_validate_json(free.text)


@pytest.mark.parametrize("choice", ["any", "add", True, {"function": {"name": "add"}}])
def test_choice_of_a_tool_is_obeyed(choice):
    message = model().bind_tools([register, add], tool_choice=choice).invoke("Add 3 and 4.")
    assert message.response_metadata["finish_reason"] == "tool_calls"
    if choice not in ("any", True):
        assert {c["name"] for c in message.tool_calls} == {"add"}


@pytest.mark.parametrize("choice", ["none", False])
def test_choice_of_no_tool_is_obeyed(choice):
    message = model().bind_tools([add], tool_choice=choice).invoke("What is 3 plus 4?")
    assert not message.tool_calls
    assert not message.invalid_tool_calls


def test_arguments_have_the_types_of_the_schema():
    message = model().bind_tools([register], tool_choice="any").invoke("Register Ann, 31.")
    (call,) = message.tool_calls
    assert validation_error(call["args"]["person"], Person.model_json_schema()) is None
    assert isinstance(call["args"]["person"]["homes"][0]["number"], int)


async def test_streamed_call_equals_the_whole_one():
    made = model().bind_tools([add], tool_choice="any")
    whole = made.invoke("What is 17 plus 25? Use the tool.")
    assert whole.tool_calls[0]["args"] == {"a": 17, "b": 25}
    first, *rest = made.stream("What is 17 plus 25? Use the tool.")
    streamed = first + rest
    assert len([c for c in rest if c.tool_call_chunks]) > 1
    assert [c["args"] for c in streamed.tool_calls] == [c["args"] for c in whole.tool_calls]
    first, *rest = [c async for c in made.astream("What is 17 plus 25? Use the tool.")]
    assert (first + rest).tool_calls[0]["args"] == whole.tool_calls[0]["args"]


def test_parallel_calls_have_their_own_ids_and_can_be_disabled(tmp_path):
    """A model with random weights calls several times for some seeds; the demo never does."""
    path = write_chat_toy(tmp_path / "toy", num_experts=12)
    made = ChatFlashMoE(model=str(path), temperature=1, max_tokens=400)
    made = made.bind_tools([add], tool_choice="required")
    many = [made.invoke("Add.", seed=seed).tool_calls for seed in range(6)]
    assert max(map(len, many)) > 1, "no answer has several calls: the test needs other seeds"
    ids = [call["id"] for calls in many for call in calls]
    assert len(set(ids)) == len(ids)
    single = made.bind(parallel_tool_calls=False)
    for seed in range(6):
        assert len(single.invoke("Add.", seed=seed).tool_calls) == 1


def test_call_cut_short_is_an_invalid_call():
    made = model(max_tokens=14).bind_tools([add], tool_choice="any")
    message = made.invoke("What is 17 plus 25? Use the tool.")
    assert not message.tool_calls
    (broken,) = message.invalid_tool_calls
    assert broken["name"] == "add"
    assert "max_tokens=14 was reached" in broken["error"]
    first, *rest = made.stream("What is 17 plus 25? Use the tool.")
    streamed = first + rest
    assert not streamed.tool_calls
    assert len(streamed.invalid_tool_calls) == 1


def test_required_call_that_never_began_raises():
    with pytest.raises(IncompleteOutput):
        model(max_tokens=1, reasoning=True).bind_tools([add], tool_choice="any").invoke("Add")


def test_result_of_a_failed_tool_is_marked():
    made = model(max_tokens=2).bind_tools([add])
    question = HumanMessage("What is 17 plus 25? Use the tool.")
    called = model().bind_tools([add], tool_choice="any").invoke([question])
    id = called.tool_calls[0]["id"]
    counts = [
        made.get_num_tokens_from_messages(
            [question, called, ToolMessage("boom", tool_call_id=id, status=status)], tools=[add]
        )
        for status in ("success", "error")
    ]
    assert counts[1] > counts[0]  # "Error: "
