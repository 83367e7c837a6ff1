"""Test which calls and documents of a model count as passed."""

import json
from dataclasses import astuple

import pytest
from tool_call_texts import SPECIAL_TOKENS, TOKENIZER, coder, tokens_of
from toys import write_chat_toy

from flashmoe.chat import json_schema as schemas
from flashmoe.chat.output_parser import OutputParser
from flashmoe.chat.tools import read_tools
from flashmoe.engine import Engine
from flashmoe.events import ToolCall
from flashmoe.sweep import pass_rates
from flashmoe.sweep.pass_rates import (
    Rate,
    call_tasks,
    judge_call,
    judge_json,
    measure_rate,
    schema_tasks,
)

ADD = next(t for t in call_tasks() if t.tool == "add")
RIGHT = {"a": ADD.values["a"], "b": ADD.values["b"]}


def verdict_of(text: str) -> str:
    """Return the verdict about an answer that is parsed as the engine parses it."""
    reply = OutputParser(TOKENIZER, SPECIAL_TOKENS, read_tools(list(ADD.tools)), (), False)
    events = [e for t in tokens_of(text) for e in reply.feed(t)] + [*reply.finish("it ended")]
    return judge_call(ADD, [e for e in events if isinstance(e, ToolCall)])


def call(name: str, arguments: dict) -> str:
    return f"<tool_call>{coder(name, arguments)}</tool_call>"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (call("add", RIGHT), "right"),
        ("I will.\n" + call("add", RIGHT), "right"),
        (call("add", RIGHT | {"b": 5000}), "passed"),
        (call("add", {"a": 1}), "wrong"),
        (call("add", {"a": "one", "b": 2}), "wrong"),
        (call("get_weather", {"city": "Rome"}), "wrong"),
        (call("get_weather", {"city": "Rome", **RIGHT}), "wrong"),
        (call("subtract", RIGHT), "wrong"),
        (call("add", RIGHT) + call("get_weather", {"city": "Rome"}), "wrong"),
        (call("add", RIGHT)[:-30], "wrong"),
        ("It is 42.", "wrong"),
    ],
)
def test_calls_are_judged(text, verdict):
    assert verdict_of(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"name": "Rex", "age": 3}', "passed"),
        ('{"name": "Rex", "age": "3"}', "wrong"),
        ('{"name": "Rex"}', "wrong"),
        ('{"name": "Rex", "age": 3', "wrong"),
        ("A dog.", "wrong"),
        ("", "wrong"),
    ],
)
def test_documents_are_judged(text, verdict):
    assert judge_json(schema_tasks()[0], text) == verdict


def test_tasks_are_distinct_and_can_be_solved():
    tasks = call_tasks()
    assert len({t.messages[0]["content"] for t in tasks}) == len(tasks) == 120
    assert len({t.tool for t in tasks[:6]}) == 6
    assert len({json.dumps(t.tools) for t in tasks}) == 2
    for task in tasks:
        text = task.messages[0]["content"]
        assert all(str(value) in text for value in task.values.values())
        assert "{" not in text
        known = task.schema["properties"]
        for name, value in task.values.items():
            assert schemas.validation_error(value, known[name]) is None
    shapes = schema_tasks()
    assert len({t.messages[0]["content"] for t in shapes}) == len(shapes) == 40
    for task in tasks + shapes:
        schemas.check_schema(task.schema, "it")


def test_rate_counts_what_the_demo_passes(engine):
    """Greedy decoding gives the same answers each time."""
    progress = []
    tasks = call_tasks()[:2]
    constrained = measure_rate(engine, tasks, experts=10, constrain=True, advance=progress.append)
    assert progress == [1, 1]
    assert constrained == Rate(asked=2, passed=2, right=2, cut=0)
    free = measure_rate(engine, schema_tasks()[:1], experts=10, constrain=False)
    assert free == Rate(asked=1, passed=0, right=None, cut=0)


def test_random_model_passes_nothing_without_the_grammar(tmp_path, monkeypatch):
    """With the grammar, a model of random weights passes whatever it finishes."""
    monkeypatch.setattr(pass_rates, "MAX_TOKENS", 90)
    with Engine(write_chat_toy(tmp_path / "toy"), slots=7, prompt_store=0) as engine:
        tasks = schema_tasks()[:2]
        held = measure_rate(engine, tasks, experts=3, constrain=True)
        assert held.passed + held.cut == 2
        monkeypatch.setattr(pass_rates, "MAX_TOKENS", 20)
        free = measure_rate(engine, tasks, experts=3, constrain=False)
        assert astuple(free)[:3] == (2, 0, None)
        calls = measure_rate(engine, call_tasks()[:2], experts=3, constrain=False)
        assert (calls.passed, calls.right, calls.cut) == (0, 0, 2)
