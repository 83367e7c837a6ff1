"""How many tool calls and JSON answers are good, with the grammar and without it.

The questions are data (pass_rates.json): tools with two ways to ask for each, and shapes of JSON.
An answer is greedy, so that a version of a model always gives the same one. Each request of a
group has the same tools in front, which are read once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..chat import json_schema as schemas
from ..engine import Engine
from ..errors import OutputError
from ..events import Text, ToolCall
from ..requests import Request

MAX_TOKENS = 200


@dataclass(frozen=True)
class Task:
    """A request, and what passes: a call of `tool`, or JSON, that fits `schema`.

    values: arguments that the question gives, which a right call has.
    """

    messages: list[dict]
    schema: dict
    tools: tuple[dict, ...] = ()
    tool: str | None = None
    values: dict | None = None


@dataclass(frozen=True)
class Rate:
    """Of `asked`: passed, as their schema asks; right: calls that also have the values of the
    question, None for JSON; cut: cut short at MAX_TOKENS."""

    asked: int
    passed: int
    right: int | None
    cut: int


def call_tasks() -> list[Task]:
    """All tool calls that can be asked for; any first part of them has all tools alike."""
    data = _data()
    tools = [(group, tool) for group in data["groups"] for tool in group]
    found = []
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
                found.append(Task(_user(ask), tool["parameters"], definitions, tool["name"], given))
    return found


def schema_tasks() -> list[Task]:
    """All JSON documents that can be asked for; any first part of them has all shapes alike."""
    data = _data()
    return [
        Task(
            _user(f"Invent a {thing}. Answer with JSON only, of this schema: {json.dumps(shape)}"),
            shape,
        )
        for thing in data["things"]
        for shape in data["shapes"]
    ]


def rate(
    engine: Engine,
    tasks: list[Task],
    *,
    experts: int,
    constrain: bool,
    advance: Callable[[int], None] = lambda answers: None,
) -> Rate:
    """Ask for all of them with the router pruned to its top `experts`."""
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
        # JSON without a grammar fails here too: it was held against its schema.
        return "cut" if e.end is not None and e.end.generated_tokens >= MAX_TOKENS else "wrong"
    if end.finish_reason == "length":
        return "cut"
    if task.tool:
        return judge_call(task, [e for e in events if isinstance(e, ToolCall)])
    return judge_json(task, "".join(e.text for e in events if isinstance(e, Text)))


def judge_call(task: Task, calls: list[ToolCall]) -> str:
    """Passed: each call is of the right tool and fits it, and there is one; right: the first one
    also has the values that were asked for."""
    good = calls and all(
        c.name == task.tool
        and c.error is None
        and schemas.validation_error(c.arguments, task.schema) is None
        for c in calls
    )
    if not good:
        return "wrong"
    given = {name: _plain(calls[0].arguments.get(name)) for name in task.values}
    same = given == {name: _plain(value) for name, value in task.values.items()}
    return "right" if same else "passed"


def judge_json(task: Task, text: str) -> str:
    try:
        value = schemas.loads(text)
    except (ValueError, RecursionError):
        return "wrong"
    return "passed" if schemas.validation_error(value, task.schema) is None else "wrong"


def _plain(value):
    return value.strip().casefold() if isinstance(value, str) else value


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _data() -> dict:
    return json.loads((Path(__file__).parent / "pass_rates.json").read_text(encoding="utf-8"))
