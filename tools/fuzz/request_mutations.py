"""Mutate requests: schemas, regexes, Lark grammars, messages, tools, numbers, bodies, headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import jsonschema

from . import values
from .hostile_requests import KNOWN, ask, by_schema

CHAT = "/v1/chat/completions"
_JSON = {"content-type": "application/json"}
_META = jsonschema.Draft202012Validator.META_SCHEMA

PATTERNS = [
    "^(a+)+$",
    "(a|a)*b",
    "(?=a)b",
    "(?<!a)b",
    "\\1(a)",
    "[",
    "(",
    "a{99999}",
    "a{5,2}",
    "(a{100}){100}",
    ".*.*.*.*.*.*.*.*.*x",
    "\\p{L}{1,200}",
    "\\p{Nope}",
    "^$",
    "$^",
    "",
    "\\Z\\A",
    "\\b\\B",
    "(?i)ſ{1,40}",
    "[^\\x00-\\U0010ffff]",
    "[a-\\d]",
    "\\ud800",
    "a" * 20_000,
    "(" * 300 + "a" + ")" * 300,
    "|".join(f"w{i}" for i in range(3000)),
    "(?P<x>a)(?P=x)",
    "(?x) a # b",
    "a++b",
    "\\u{110000}",
    "\0",
    "[[:alpha:]]",
    "(?R)",
    "[a-z]{2,4}\\d*|x",
]
GRAMMARS = [
    'start: "a"',
    "start: ((((",
    'start: start "a" | "b"',
    "start: start",
    "start: a\na: b\nb: a",
    'start: ("a" | "b")* "c"',
    "start: /(a+)+$/",
    "start: /a{99999}/",
    'start: %json {"type": "object"}',
    'start: %json {"$ref": "https://example.com/x.json"}',
    'start: %json {"anyOf": []}',
    "start: %regex { }",
    'start: %lark { start: "a" }',
    "start: @other",
    "start[max_tokens=5, temperature=0.5]: /.*/",
    'start[capture, stop="x"]: /.*/',
    "start: <|im_end|>",
    "start: <[0-9999999]>",
    "start: <think> /.*/ </think>",
    "%import common.WORD\nstart: WORD",
    "%import os.system\nstart: system",
    "%ignore /(a+)+/\nstart: /b/",
    "%llguidance {}\nstart: /a/",
    '%llguidance {"no_forcing": true, "x": 3}\nstart: "a"',
    "start: a{1,100000}\na: /x/",
    'start: ""',
    "start:",
    "",
    "\0",
    "start: " + "(" * 2000 + '"a"' + ")" * 2000,
    "start: " + " | ".join(f'"w{i}"' for i in range(5000)),
    "start: A\nA: B\nB: A",
    "start: /[/",
    "start: /(?=a)b/",
    'start: "\ud800"',
]
NAMES = [
    "a",
    "b",
    "name",
    "",
    "$ref",
    "é",
    "a b",
    "\ud800",
    "__proto__",
    "a" * 3000,
    "0",
    "~1",
    "%",
]
TYPES = ["object", "array", "string", "integer", "number", "boolean", "null", "x", "any"]
REFERENCES = [
    "#",
    *["#/$defs/a", "#/$defs/b"] * 8,
    "#/properties/a",
    "https://example.com/a.json",
    "x",
]
REFERENCES += [
    "file:///etc/passwd",
    "#/",
    "#a",
    "##",
    "#/$defs/%zz",
    "",
    "#/definitions/a",
    "urn:x",
]
FORMATS = ["date-time", "uuid", "regex", "x", "ipv6", "email", "uri", "json-pointer", "duration"]


def schema(random: Random, depth: int = 4) -> Any:
    """Return a JSON schema of any keywords, valid or not, easy or not."""
    kind = random.random()
    if kind < 0.04:
        return values.junk(random)
    if kind < 0.08:
        return random.choice([True, False, {}])
    result: dict[str, Any] = {}
    if random.random() < 0.7:
        result["type"] = random.choice([*TYPES[:7], *TYPES[:7], random.sample(TYPES, 2), *TYPES])
    for _ in range(random.choice([0, 1, 1, 2, 2, 3, 5])):
        name = random.choice(list(_KEYWORDS))
        result[name] = _KEYWORDS[name](random, depth)
    if depth == 4 and random.random() < 0.4:
        result["$defs"] = {name: schema(random, 2) for name in ("a", "b")}
    return result


def valid(document: Any) -> Any:
    """Return a schema without the parts that its metaschema refuses; a large one as it is."""
    if len(values.dumps(document)) > 3_000:
        return document
    for _ in range(20):
        bad = next(jsonschema.Draft202012Validator(_META).iter_errors(document), None)
        if bad is None or not bad.absolute_path:
            return document if bad is None else {}
        document = values.drop(document, tuple(bad.absolute_path))
    return {}


def _inner(random: Random, depth: int) -> Any:
    return schema(random, depth - 1) if depth > 0 else random.choice([{}, {"type": "integer"}])


def _list(random: Random, depth: int) -> list:
    if random.random() < 0.05:
        # Of leaves only: lists of such lists would be gigabytes of text.
        return [_inner(random, 0)] * random.choice([50, 2000])
    return [_inner(random, depth) for _ in range(random.choice([0, 1, 2, 3]))]


def _named(random: Random, depth: int) -> dict:
    if random.random() < 0.03:
        return {f"p{i}": {"type": "integer"} for i in range(random.choice([100, 3000]))}
    return {random.choice(NAMES): _inner(random, depth) for _ in range(random.choice([1, 2, 3]))}


def _number(random: Random, depth: int) -> Any:
    numbers = [0, 1, 2, 5, -1, 0.1, 1e-9, 1e300, 10**40, 2**53 + 1, -(10**20), 0.3, 1000]
    return random.choice([*numbers, values.junk(random)])


def _count(random: Random, depth: int) -> Any:
    return random.choice([0, 1, 2, 3, 10, 10**6, 2**31, 2**63, -1, 1.0, 1.5, values.junk(random)])


def _values(random: Random, depth: int) -> Any:
    few = [values.junk(random) for _ in range(random.choice([0, 1, 2, 5]))]
    many = [f"v{i}" for i in range(random.choice([300, 20_000]))]
    return random.choice([few, few, few, many, [1, 1.0, True, "1"], [{"a": 1}, {"a": 1}], "x"])


def _pattern(random: Random, depth: int) -> Any:
    return random.choice([*PATTERNS, values.junk(random)])


_KEYWORDS: dict[str, Callable[[Random, int], Any]] = {
    "properties": _named,
    "patternProperties": lambda r, d: {_text(_pattern(r, d)): _inner(r, d)},
    "additionalProperties": _inner,
    "required": lambda r, d: r.choice([r.sample(NAMES, 3), ["a", "a"], [3], "a", []]),
    "items": lambda r, d: r.choice([_inner(r, d), _list(r, d)]),
    "prefixItems": _list,
    "anyOf": _list,
    "oneOf": _list,
    "allOf": _list,
    "not": _inner,
    "if": _inner,
    "then": _inner,
    "else": _inner,
    "enum": _values,
    "const": lambda r, d: values.junk(r),
    "pattern": _pattern,
    "format": lambda r, d: r.choice([*FORMATS, values.junk(r)]),
    "minimum": _number,
    "maximum": _number,
    "exclusiveMinimum": _number,
    "exclusiveMaximum": _number,
    "multipleOf": _number,
    "minLength": _count,
    "maxLength": _count,
    "minItems": _count,
    "maxItems": _count,
    "minProperties": _count,
    "maxProperties": _count,
    "uniqueItems": lambda r, d: r.choice([True, "x", False]),
    "contains": _inner,
    "propertyNames": _inner,
    "dependentRequired": lambda r, d: {"a": ["b"], "b": ["a"]},
    "dependentSchemas": _named,
    "unevaluatedProperties": _inner,
    "unevaluatedItems": _inner,
    "$ref": lambda r, d: r.choice(REFERENCES),
    "$dynamicRef": lambda r, d: r.choice(REFERENCES),
    "$id": lambda r, d: r.choice([*REFERENCES, 3]),
    "$anchor": lambda r, d: r.choice(["a", "", 3, "a" * 1000]),
    "$schema": lambda r, d: r.choice(
        ["http://json-schema.org/draft-04/schema#", "https://json-schema.org/draft/2020-12/schema"]
        + ["x", 3, "http://json-schema.org/draft-07/schema#"]
    ),
    "$defs": _named,
    "definitions": _named,
    "x-guidance": lambda r, d: r.choice([{"whitespace_flexible": True}, {"x": 1}, 3]),
    "title": lambda r, d: values.junk(r),
    "default": lambda r, d: values.junk(r),
}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)[:200]


TEXTS = [
    "",
    " ",
    "x" * 3000,
    "x" * 300_000,
    "aaaa " * 500,
    "<|im_end|><|im_start|>system\nx",
    "<think>\n</think>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>",
    "\ud800",
    "\0\x01\x7f\u2028\ufeff",
    "é\u0301" * 100,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 50,
    "ﷺ" * 200,
    "{{ 1/0 }}{% for %}",
    "%s{}\\",
    "\u202e" * 10,
]
ROLES = ["user", "assistant", "system", "tool", "developer", "function", "x", "", None, 3]


def message(random: Random) -> Any:
    """Return a message, valid or not."""
    content = random.choice(
        [
            *random.choices(TEXTS, k=4),
            [{"type": "text", "text": random.choice(TEXTS)}] * random.choice([0, 1, 2, 100]),
            [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
            [random.choice([3, None, "x", {}, {"type": "text"}, {"type": "text", "text": 3}])],
            values.junk(random),
        ]
    )
    result = {"role": random.choice([*ROLES[:4] * 3, *ROLES[:1] * 12, *ROLES]), "content": content}
    arguments = ["{}", "{", '{"a": 1}', "[1]", "3", "", "[" * 1000, {"a": 1}, '{"a": NaN}', None]
    call = {"id": "c", "type": "function"}
    call |= {"function": {"name": random.choice(NAMES), "arguments": random.choice(arguments)}}
    more: dict[str, Any] = {
        "tool_calls": random.choice([[call], [call] * 50, [], [3], 3, [{}], [call | {"id": None}]]),
        "tool_call_id": random.choice(["c", "d", "", 3, None]),
        "reasoning_content": random.choice([*TEXTS, 3]),
        "name": random.choice([*NAMES, 3]),
        "refusal": random.choice([None, "no"]),
        "x": 1,
    }
    for name in random.sample(list(more), random.choice([0, 0, 0, 1, 2])):
        result[name] = more[name]
    return result


@dataclass
class HostileRequest:
    """A request to send.

    Attributes:
        body: its bytes.
        headers: its headers.
        changes: what was changed, in words.
    """

    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(_JSON))
    changes: list[str] = field(default_factory=list)


def _tool(random: Random) -> Any:
    function = {
        "name": random.choice(["f", "f", "get_x", *NAMES]),
        "parameters": _parameters(random),
    }
    if random.random() < 0.3:
        function["description"] = random.choice(TEXTS[:2] + TEXTS[5:])
    if random.random() < 0.2:
        function = values.mutate(random, function)[0]
    return {"type": random.choice(["function"] * 9 + ["x"]), "function": function}


def _parameters(random: Random) -> Any:
    """Return a schema, which is more often valid than not."""
    return valid(schema(random)) if random.random() < 0.7 else schema(random)


def _with_schema(random: Random, body: dict) -> tuple[dict, str]:
    new = _parameters(random)
    return body | {"response_format": by_schema(new)["response_format"]}, "schema"


def _with_regex(random: Random, body: dict) -> tuple[dict, str]:
    pattern = random.choice(PATTERNS)
    if random.random() < 0.5:
        pattern = random.choice(["({}){{2,9}}", "{}|x", "(?:{})*", "a{}", "{0}{0}"]).format(
            pattern[:3000]
        )
    return body | {"response_format": {"type": "regex", "pattern": pattern}}, "regex"


def _with_grammar(random: Random, body: dict) -> tuple[dict, str]:
    grammar = random.choice(GRAMMARS)
    if random.random() < 0.4:
        at = random.randrange(len(grammar) + 1)
        other = random.choice(GRAMMARS)
        grammar = grammar[:at] + random.choice(
            [other[at:], "(", "\n", "|", "start", "[", "%json {"]
        )
    return body | {"response_format": {"type": "lark", "grammar": grammar}}, "grammar"


def _with_messages(random: Random, body: dict) -> tuple[dict, str]:
    count = random.choice([0, 1, 1, 2, 2, 3, 5, 200])
    return body | {"messages": [message(random) for _ in range(count)]}, "messages"


def _with_tools(random: Random, body: dict) -> tuple[dict, str]:
    tools = [_tool(random) for _ in range(random.choice([0, 1, 1, 1, 2, 3]))]
    if random.random() < 0.05:
        tools = [_tool(random)] * 100
    choices: list[Any] = ["auto", "none", *["required"] * 4, "x", 3, None, {}]
    choices += [{"type": "function", "function": {"name": random.choice(["f", "g", "", 3])}}]
    return body | {"tools": tools, "tool_choice": random.choice(choices)}, "tools"


_NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"]
_NUMBERS += ["max_completion_tokens", "thinking_budget", "experts", "n", "presence_penalty"]
_OTHERS: dict[str, list[Any]] = {
    "stop": ["x", "", [], ["a"] * 5000, ["x" * 10**6], [3], [""], ["\ud800"], ["<|im_end|>"], "\n"],
    "stream": [True, False, 3, "x", None],
    "stream_options": [{"include_usage": True}, {}, 3, {"x": 1}, {"include_usage": "x"}, []],
    "think": [True, False, "x", 3],
    "reasoning_effort": ["low", "none", "x", 3, None],
    "chat_template_kwargs": [{"enable_thinking": True}, {"x": 1}, 3, {"enable_thinking": "x"}],
    "logit_bias": [{}, {"1": 100}, 3],
    "model": ["toy", "x", "", 3, None, "../x", "a" * 10**5],
    "parallel_tool_calls": [True, False, 3],
    "response_format": [{"type": "json_object"}, {"type": "x"}, {}, 3, {"type": ["x"]}],
    "user": ["x", 3],
    "x": [1],
}


def _with_fields(random: Random, body: dict) -> tuple[dict, str]:
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < 0.5:
            tiny = [0, 1, 0.5, 1e-40, 1e-320, 1e-308, 1e38, 1e39, 1e308, -1, 2**31, 2**63, 2**64]
            name = random.choice(_NUMBERS)
            value = random.choice([*tiny, values.junk(random)])
        else:
            name = random.choice(list(_OTHERS))
            value = random.choice(_OTHERS[name])
        body = body | {name: value}
    return body, "fields"


def _with_mutation(random: Random, body: dict) -> tuple[dict, str]:
    new, what = values.mutate(random, body)
    return (new if isinstance(new, dict) else {"x": new}), what


_CHANGES: dict[Callable[[Random, dict], tuple[dict, str]], int] = {
    _with_schema: 34,
    _with_regex: 8,
    _with_grammar: 10,
    _with_messages: 12,
    _with_tools: 20,
    _with_fields: 8,
    _with_mutation: 8,
}
_PLAIN = [
    ask("Hello."),
    ask("Hello.", stream=True, stream_options={"include_usage": True}),
    ask("Think.", think=True, thinking_budget=4),
    by_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    ask("Call.", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
]
HEADERS = [
    {"content-type": "text/plain"},
    {},
    {"content-type": "application/json; charset=utf-16"},
    _JSON | {"content-encoding": "gzip"},
    _JSON | {"origin": "https://evil.example"},
    _JSON | {"host": "evil.example"},
    _JSON | {"authorization": "Bearer " + "x" * 10_000},
    _JSON | {"accept": "x"},
    _JSON | {"expect": "100-continue"},
    _JSON | {"x-many": "y" * 60_000},
]


def make(seed: int, number: int) -> HostileRequest:
    """Return the request of a number. The first ones are those that got through once."""
    random = Random(f"{seed}:{number}")
    if number < len(KNOWN):
        body, changes = KNOWN[number](number), [f"known: {_name(KNOWN[number])}"]
        return HostileRequest(values.dumps(body).encode(), changes=changes)
    body, changes = random.choice(_PLAIN), []
    if random.random() < 0.02:
        make_known = random.choice(KNOWN)
        body, changes = make_known(number), [f"like {_name(make_known)}"]
    for change in random.choices(
        list(_CHANGES), list(_CHANGES.values()), k=random.choice([1, 1, 1, 1, 2])
    ):
        body, what = change(random, body)
        changes.append(what)
    if random.random() < 0.3:
        body = body | {"stream": True}
        changes.append("streamed")
    # Text that is no JSON hides everything else that was changed.
    text = values.dumps(body) if random.random() < 0.1 else json.dumps(body)
    raw, headers = text.encode("utf-8", "surrogatepass"), dict(_JSON)
    if random.random() < 0.06:
        raw, what = values.spoil_text(random, text)
        changes.append(f"text: {what}")
    if random.random() < 0.03:
        headers = random.choice(HEADERS)
        changes.append(f"headers: {str(headers)[:80]}")
    return HostileRequest(raw, headers, changes)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", "").replace("<lambda>", "odd_sampling")
