"""Write requests that cost a server without limits seconds, gigabytes, or its life.

Each function takes a number, which varies what it returns, so that no cache of earlier checks hides
what a request costs.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any


def ask(text: str = "Hello.", **fields: Any) -> dict:
    """Return the body of a request with one message."""
    fields = {"max_tokens": 4, "temperature": 0} | fields
    return {"model": "toy", "messages": [{"role": "user", "content": text}]} | fields


def by_schema(schema: Any, **fields: Any) -> dict:
    """Return the body of a request for JSON of a schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return ask(response_format=wanted, **fields)


def slow_pattern(n: int) -> dict:
    """Names of properties are matched against a pattern of exponential time."""
    letter = string.ascii_lowercase[n % 26]
    key = letter * (30 + n % 17) + "!"
    schema = {
        "type": "object",
        "patternProperties": {f"^({letter}+)+$": {"type": "string", "maxLength": 3 + n}},
        "properties": {key: {"type": "integer"}},
        "required": [key],
    }
    return by_schema(schema)


def slow_key(n: int) -> dict:
    """The same, where the model may choose the names."""
    letter = string.ascii_lowercase[n % 26]
    schema = {
        "type": "object",
        "patternProperties": {f"^({letter}|{letter}{letter})+{n}$": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    return by_schema(schema)


def doubled_references(n: int) -> dict:
    """To validate a value, each definition is looked at twice as often as the one before it."""
    name = f"a{n}_"
    definitions = {
        f"{name}{i}": {"anyOf": [{"$ref": f"#/$defs/{name}{i - 1}"}] * 2} for i in range(1, 26)
    }
    definitions[f"{name}0"] = {"type": "string"}
    schema = {"const": n, "not": {"$ref": f"#/$defs/{name}25"}, "$defs": definitions}
    return by_schema(schema)


def large_enum(n: int) -> dict:
    """An enum of 200,000 strings."""
    return by_schema({"enum": [f"{n}-{i:06}" for i in range(200_000)]})


def many_properties(n: int) -> dict:
    """An object with 20,000 required properties."""
    names = [f"p{n}_{i}" for i in range(20_000)]
    properties = {name: {"type": "integer"} for name in names}
    return by_schema({"type": "object", "properties": properties, "required": names})


def large_tuple(n: int) -> dict:
    """A metaschema's uniqueItems compares all names with each other."""
    names = [{"a": n, "b": i} for i in range(3000)]
    return by_schema({"enum": names})


def long_repetition(n: int) -> dict:
    """Counted repetitions inside each other."""
    pattern = f"((a{{1,{100 + n % 50}}}){{1,100}}){{1,100}}"
    return ask(response_format={"type": "regex", "pattern": pattern})


def large_lark(n: int) -> dict:
    """A grammar with an exponential number of alternatives."""
    rules = [f'start: r{n}_0 "x"'] + [f"r{n}_{i}: r{n}_{i + 1} r{n}_{i + 1} |" for i in range(40)]
    grammar = "\n".join([*rules, f'r{n}_40: "a" | "b" |'])
    return ask(response_format={"type": "lark", "grammar": grammar})


def large_integers(n: int) -> dict:
    """Bounds of many digits."""
    schema = {"type": "integer", "minimum": n, "maximum": 10**3000 + n, "multipleOf": 7**400}
    return by_schema(schema)


def long_bounds(n: int) -> dict:
    """Lengths and counts that are as long as a disk."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 10**6 + n}}
    return by_schema(schema | {"minItems": 10**6})


def nested(n: int) -> dict:
    """Objects that each have two of the next."""
    schema: dict = {"type": "integer", "minimum": n}
    for i in range(30):
        schema = {"type": "object", "properties": {f"a{i}": schema}, "required": [f"a{i}"]}
        schema = {"allOf": [schema, {"anyOf": [schema, {"type": "null"}]}]} if i < 12 else schema
    return by_schema(schema)


def endless_reference(n: int) -> dict:
    """Definitions that only refer to each other."""
    definitions = {f"a{i}": {"$ref": f"#/$defs/a{(i + 1) % 50}"} for i in range(50)}
    return by_schema({"$ref": "#/$defs/a0", "$defs": definitions, "title": str(n)})


def tools_with_slow_patterns(n: int) -> dict:
    """Arguments of tools have patterns of exponential time."""
    schema = {"type": "object", "properties": {"a": {"pattern": f"^(a+)+{n}$"}}}
    schema |= {"patternProperties": {f"^(x+x+)+{n}y$": {}}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    return ask("x" * 50, tools=tools, tool_choice="required")


def odd_sampling(n: int) -> dict:
    """Numbers so small or large that float32 has no reciprocal of them."""
    fields = [
        {"temperature": 1e-40},
        {"top_p": 1e-320, "temperature": 1},
        {"repetition_penalty": 1e-308},
        {"temperature": 1e308},
        {"min_p": 1e-320, "temperature": 1},
        {"repetition_penalty": 1e308},
        {"top_k": 10**18, "temperature": 1},
        {"seed": 2**64 - 1, "temperature": 1},
    ]
    return ask(f"Number {n}.", **fields[n % len(fields)])


def costly_template(n: int) -> dict:
    """Makes the template of `benchmarks/hostile_clients.py` loop."""
    return ask(f"explode {n}")


#: What got through once. Each run of the fuzzer begins with them, and mutates them.
KNOWN: list[Callable[[int], dict]] = [
    slow_pattern,
    slow_key,
    doubled_references,
    large_enum,
    many_properties,
    large_tuple,
    long_repetition,
    large_lark,
    large_integers,
    long_bounds,
    nested,
    endless_reference,
    tools_with_slow_patterns,
    *[lambda n, i=i: odd_sampling(8 * n + i) for i in range(8)],
]
