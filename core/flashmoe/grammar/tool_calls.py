"""Grammars of tool calls, in the two formats that `tool_formats` reads.

A parameter of the Coder format is raw text when its schema may be a string, and ends at the first
closing tag. What a raw text cannot be held to here is checked when the call has been read. Where
it may be a constrained text or JSON, all that the grammar takes fits; not all that fits is taken.
"""

from __future__ import annotations

import json
import re

from ..chat import json_schema as schemas
from ..chat.tool_parsers import ENDS_NO_LINE, IN_NO_VALUE
from ..chat.tools import Tool
from ..errors import SettingError
from .response import fault, json_rule, literal, refuses_pattern, regex


def calls_rules(tools: dict[str, Tool], style: str, start: int, end: int) -> str:
    """Lark rules for tool calls: `body` is one, from after its start marker to its end marker;
    `call` is one with its start marker.

    Args:
        style: a key of `tool_formats.FORMATS`.
        start, end: the marker tokens.
    """
    write = {"qwen3_coder": _coder, "json_tools": _hermes}[style]
    rules = [f"call: <[{start}]> body\n"]
    bodies = []
    for index, tool in enumerate(tools.values()):
        try:
            rules.append(write(f"t{index}", tool))
        except (SettingError, RecursionError) as e:
            raise SettingError(f"tool {tool.name!r}: {e}") from e
        bodies.append(f"t{index}")
    rules.append(f"body: ({' | '.join(bodies)}) <[{end}]>\n")
    return "".join(rules)


def _hermes(rule: str, tool: Tool) -> str:
    name = json.dumps(tool.name, ensure_ascii=False)
    head, tail = literal(f'\n{{"name": {name}, "arguments": '), literal("}\n")
    return f"{rule}: {head} {rule}a {tail}\n{rule}a: {json_rule(tool.parameters)}\n"


def _coder(rule: str, tool: Tool) -> str:
    schema = tool.parameters
    listed = schema.get("properties", {})
    required = set(schema.get("required", ()))
    if not required <= listed.keys():
        raise SettingError(f"required names {required - listed.keys()}, which are no properties")
    order, rules = [], []
    for index, name in enumerate(listed):
        if any(c in name for c in "<>\n") or name != name.strip() or not name:
            raise SettingError(
                f"the parameter {name!r} cannot be told from the format around it: use a name "
                "without <, > and space at its ends"
            )
        if listed[name] is False:
            if name in required:
                raise SettingError(f"the parameter {name!r} is required, but its schema is false")
            continue
        value = f"{rule}p{index}"
        opening = literal(f"<parameter={name}>\n")
        rules.append(f"{value}: {opening} {value}v\n")
        rules.append(_coder_value(f"{value}v", schemas.parameter(schema, name)))
        order.append(value if name in required else f"{value}?")
    others = schema.get("additionalProperties", True)
    if "properties" not in schema and others is not False:
        # A tool that lists no parameters takes any.
        rules.append(f'{rule}x: "<parameter=" {rule.upper()}N ">\\n" {rule}xv\n')
        rules.append(f"{rule.upper()}N: /[^<>\\s]([^<>\\n]*[^<>\\s])?/\n")
        rules.append(_coder_value(f"{rule}xv", others))
        order.append(f"{rule}x*")
    head, tail = literal(f"\n<function={tool.name}>\n"), literal("</function>\n")
    return "".join([f"{rule}: {head} {' '.join(order)} {tail}\n", *rules])


_CLOSING = "\n</parameter>\n"
#: Raw text that `tool_formats` would read as something else.
_UNREADABLE = (
    f"/(?s:.*){IN_NO_VALUE}(?s:.*)|(?s:.*){ENDS_NO_LINE}(\\n(?s:.*))?"
    "|((?s:.*)\\n)?<\\/parameter>(\\n(?s:.*))?/"
)

_TEXT = {"type", "minLength", "maxLength", "pattern"}
_ROOTS = {"$defs", "$schema"}
#: llguidance gives up on texts that must be several thousand characters long.
_LONGEST_LOW = 1000


def _unreadable(value) -> bool:
    return isinstance(value, str) and re.fullmatch(_UNREADABLE[1:-1], value) is not None


def _coder_value(rule: str, schema: dict | bool) -> str:
    """Lark rules for a raw value and its closing tag."""
    texts, words, parts = [], [], []
    for kind, value in _kinds(schema):
        {"text": texts, "literal": words, "json": parts}[kind].append(value)
    readable = [v for v in words if not _unreadable(v)]
    if words and not (readable or texts or parts):
        raise SettingError(f"the values {words} cannot be told from the format around them")
    words = readable
    strings = [v for v in words if isinstance(v, str)]
    if parts and not (texts or strings):
        return f"{rule}: {rule}j {literal(_CLOSING)}\n{rule}j: {json_rule(schema)}\n"
    terminal = rule.upper()
    written = [*map(_text, texts)]
    if _ANY_TEXT in written:
        # All that the others could be.
        written, words, parts = [_ANY_TEXT], [], []
    if parts:
        parts += [{"type": _OPEN[type(v)], "const": v} for v in words if type(v) in _OPEN]
        words = [v for v in words if type(v) not in _OPEN]
    body = " | ".join([*written, *map(_word, words)])
    if written:
        body = f"({body}) & ~{_UNREADABLE}"
        # The lexer takes what may start a text for one, and does not come back to JSON.
        starts = {_STARTS[p["type"]] for p in parts if p["type"] in _STARTS}
        body += f" & ~/[{''.join(sorted(starts))}](?s:.*)/" if starts else ""
    # Lazy, and with the closing tag inside: the value ends at the first one.
    rules = f"{rule}t[lazy]: {terminal}\n{terminal}: ({body}) {literal(_CLOSING)}\n"
    if not parts:
        return f"{rule}: {rule}t\n{rules}"
    roots = {k: p[k] for p in parts for k in _ROOTS & p.keys()}
    rules += f"{rule}j: {json_rule({'anyOf': parts, **roots})}\n"
    return f"{rule}: {rule}t | {rule}j {literal(_CLOSING)}\n{rules}"


def holds_text(schema: dict | bool) -> bool:
    """Whether a raw value of that schema may be text, and not only JSON."""
    return any(k == "text" or (k == "literal" and isinstance(v, str)) for k, v in _kinds(schema))


_ANY_TEXT = "/(?s:.*)/"
#: What JSON of a type starts with, where few texts do. Numbers are left to a text that may be one.
_STARTS = {"array": "\\[", "object": "{"}
_OPEN = {list: "array", dict: "object"}


def _word(value) -> str:
    return literal(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _kinds(schema: dict | bool):
    """What a value may be: ("literal", value), ("text", schema) or ("json", schema) each."""
    schema = schemas.resolved(schema)
    if isinstance(schema, bool):
        yield "text", {}
    elif "enum" in schema or "const" in schema:
        yield from (("literal", v) for v in schema.get("enum", [schema.get("const")]))
    elif union := _union(schema):
        roots = {k: schema[k] for k in _ROOTS & schema.keys()}
        for part in union:
            yield from _kinds({**part, **roots} if isinstance(part, dict) else part)
    elif isinstance(schema.get("type"), list):
        for kind in schema["type"]:
            yield from _kinds({**schema, "type": kind})
    elif schema.get("type") == "null":
        yield "literal", None
    elif schema.get("type") == "boolean":
        yield from (("literal", True), ("literal", False))
    elif schema.get("type", "string") == "string":
        yield "text", schema
    else:
        yield "json", schema


def _union(schema: dict) -> list:
    """The alternatives of a schema that says nothing beside them."""
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.keys() - schemas.NOTES == {key} and (key != "allOf" or len(schema[key]) == 1):
            return schema[key]
    return []


def _text(schema: dict) -> str:
    """The strings of a schema, as far as a regex can say."""
    if schema.keys() - schemas.NOTES - _TEXT:
        return _ANY_TEXT
    parts = []
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if high != "" and low > high:
        raise SettingError(f"Unsatisfiable schema: minLength ({low}) is above maxLength ({high})")
    low = min(low, _LONGEST_LOW)
    if low or high != "":
        parts.append(f"/(?s:.{{{low},{high}}})/")
    pattern = schema.get("pattern")
    if pattern and not refuses_pattern(pattern):
        searched = regex("|".join(_searched(p) for p in _alternatives(pattern)))
        if fault(f"start: P\nP: {searched}\n") is None:
            parts.append(searched)
    return f"({' & '.join(parts)})" if parts else _ANY_TEXT


def _searched(pattern: str) -> str:
    """A pattern of JSON schema is searched for in the string: the regex of the whole string."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    core = f"({pattern[start : len(pattern) - end]})"
    return f"{'' if start else '(?s:.*)'}{core}{'' if end else '(?s:.*)'}"


def _alternatives(pattern: str) -> list[str]:
    """The alternatives at the top of a regex, to each of which its anchors belong."""
    found, depth, in_class, escaped = [""], 0, False, False
    for c in pattern:
        if c == "|" and not (depth or in_class or escaped):
            found.append("")
            continue
        if not escaped:
            in_class = c != "]" if in_class else c == "["
            depth += 0 if in_class else (c == "(") - (c == ")")
        escaped = c == "\\" and not escaped
        found[-1] += c
    return found
