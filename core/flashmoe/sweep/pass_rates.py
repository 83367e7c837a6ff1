"""Measures how many tool calls and JSON answers are correct, with and without the grammar.

The questions are data (pass_rates.json): tools with two ways to ask for each, and JSON schemas.
Answers are greedy, so that a version of a model always gives the same answer. All requests of a
group begin with the same tools, which are prefilled only once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat import json_schema as schemas
from ..engine import Engine
from ..errors import OutputError
from ..events import End, Text, ToolCall
from ..requests import Request

MAX_TOKENS = 200


@dataclass(frozen=True)
class Task:
    """A question and what counts as a correct answer.

    Attributes:
        messages: the conversation that asks.
        schema: JSON schema of the arguments of the call, or of the answer.
        tools: tools of the request.
        tool: name of the tool to call; None: the answer is to be JSON.
        values: arguments that the question asks for, which a right call must have.
    """

    messages: list[dict]
    schema: dict
    tools: tuple[dict, ...] = ()
    tool: str | None = None
    values: dict | None = None


@dataclass(frozen=True)
class Rate:
    """Numbers of answers.

    Attributes:
        asked: all answers.
        passed: answers that satisfy their schema.
        right: calls that also have the values of the question; None for JSON.
        cut: answers that were cut short at MAX_TOKENS.
    """

    asked: int
    passed: int
    right: int | None
    cut: int


def call_tasks() -> list[Task]:
    """Return all tasks that ask for a tool call. Any first part of them treats all tools alike."""
    data = _data()
    tools = [(group, tool) for group in data["groups"] for tool in group]
    tasks = []
    for number in range(len(data["values"]["city"])):
        for way in (0, 1):
            for group, tool in tools:
                given = {
                    name: data["values"][name][(number + way) % len(data["values"][name])]
                    for name in tool["parameters"]["properties"]
                    if f"{{{name}}}" in tool["asks"][way]
                }
                ask = tool["asks"][way].format(**given)
                definitions = tuple(
                    {k: t[k] for k in ("name", "description", "parameters")} for t in group
                )
                tasks.append(Task(_user(ask), tool["parameters"], definitions, tool["name"], given))
    return tasks


def schema_tasks() -> list[Task]:
    """Return all tasks that ask for JSON. Any first part of them treats all schemas alike."""
    data = _data()
    return [
        Task(
            _user(f"Invent a {thing}. Answer with JSON only, of this schema: {json.dumps(shape)}"),
            shape,
        )
        for thing in data["things"]
        for shape in data["shapes"]
    ]


def measure_rate(
    engine: Engine,
    tasks: list[Task],
    *,
    experts: int,
    constrain: bool,
    advance: Callable[[int], None] = lambda answers: None,
) -> Rate:
    """Ask an engine all tasks and count the correct answers.

    Args:
        experts: K of the requests.
        constrain: whether the grammar is enforced.
        advance: called with 1 after each answer.
    """
    outcomes = []
    for task in tasks:
        outcomes.append(_outcome(engine, task, experts, constrain=constrain))
        advance(1)
    calls = any(task.tool for task in tasks)
    return Rate(
        asked=len(tasks),
        passed=sum(o in ("passed", "right") for o in outcomes),
        right=outcomes.count("right") if calls else None,
        cut=outcomes.count("cut"),
    )


def _outcome(engine: Engine, task: Task, experts: int, *, constrain: bool) -> str:
    request = Request(
        task.messages,
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        think=False,
        experts=experts,
        tools=list(task.tools),
        response_format=None if task.tool else {"type": "json_schema", "schema": task.schema},
        constrain=constrain,
    )
    try:
        *events, end = engine.stream(request)
    except OutputError as e:
        # JSON without a grammar ends here too: the engine validates it against its schema.
        return "cut" if e.end is not None and e.end.generated_tokens >= MAX_TOKENS else "wrong"
    assert isinstance(end, End), "the last event of every answer"
    if end.finish_reason == "length":
        return "cut"
    if task.tool:
        return judge_call(task, [e for e in events if isinstance(e, ToolCall)])
    return judge_json(task, "".join(e.text for e in events if isinstance(e, Text)))


def judge_call(task: Task, calls: list[ToolCall]) -> str:
    """Judge the calls of an answer.

    Returns:
        "wrong", "passed" if there is at least one call and all are of the right tool and satisfy
        its schema, or "right" if the first one also has the values of the question.
    """
    good = calls and all(
        c.name == task.tool
        and c.error is None
        and schemas.validation_error(c.arguments, task.schema) is None
        for c in calls
    )
    if not good:
        return "wrong"
    arguments, values = calls[0].arguments or {}, task.values or {}
    given = {name: _plain(arguments.get(name)) for name in values}
    same = given == {name: _plain(value) for name, value in values.items()}
    return "right" if same else "passed"


def judge_json(task: Task, text: str) -> str:
    """Return "passed" if a text is JSON that satisfies the schema, else "wrong"."""
    try:
        value = schemas.loads(text)
    except (ValueError, RecursionError):
        return "wrong"
    return "passed" if schemas.validation_error(value, task.schema) is None else "wrong"


def _plain(value: Any) -> Any:
    return value.strip().casefold() if isinstance(value, str) else value


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _data() -> dict:
    return json.loads((Path(__file__).parent / "pass_rates.json").read_text(encoding="utf-8"))
