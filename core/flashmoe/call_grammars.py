"""Grammars of tool calls, in the two formats that `tool_formats` reads.

A parameter of the Coder format is raw text when its schema may be a string, and ends at the first
closing tag. What a raw text cannot be held to here is checked when the call has been read.
"""

from __future__ import annotations

import json

from . import schemas
from .errors import SettingError
from .grammars import fault, json_rule, literal, refuses_pattern, regex
from .tools import Tool


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
        except SettingError as e:
            raise SettingError(f"tool {tool.name!r}: {e}") from e
        bodies.append(f"t{index}")
    rules.append(f"body: ({' | '.join(bodies)}) <[{end}]>\n")
    return "".join(rules)


def _hermes(rule: str, tool: Tool) -> str:
    head = literal(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
    return (
        f"{rule}: {head} {rule}a {literal('}' + chr(10))}\n{rule}a: {json_rule(tool.parameters)}\n"
    )


def _coder(rule: str, tool: Tool) -> str:
    schema = tool.parameters
    listed = schema.get("properties", {})
    required = set(schema.get("required", ()))
    if not required <= listed.keys():
        raise SettingError(f"required names {required - listed.keys()}, which are no properties")
    order, rules = [], []
    for index, name in enumerate(listed):
        if any(c in name for c in "<>\n"):
            raise SettingError(f"the parameter {name!r} has a character of the format itself")
        value = f"{rule}p{index}"
        opening = literal(f"<parameter={name}>\n")
        rules.append(f"{value}: {opening} {value}v\n")
        rules.append(_coder_value(f"{value}v", schemas.parameter(schema, name)))
        order.append(value if name in required else f"{value}?")
    head, tail = literal(f"\n<function={tool.name}>\n"), literal("</function>\n")
    return "".join([f"{rule}: {head} {' '.join(order)} {tail}\n", *rules])


_HERMES_END = "}\n"
_CLOSING = "\n</parameter>\n"
_TEXT = {"type", "minLength", "maxLength", "pattern"}
_NOTES = {"title", "description", "default", "examples", "$comment", "deprecated"}


def _coder_value(rule: str, schema: dict | bool) -> str:
    """Lark rules for a raw value and its closing tag."""
    kinds = list(_kinds(schema))
    if all(kind == "literal" for kind, _ in kinds):
        raw = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for _, v in kinds]
        return f"{rule}: {' | '.join(literal(text + _CLOSING) for text in raw)}\n"
    # true, false and null are literals and JSON both.
    if not any(kind == "text" or isinstance(value, str) for kind, value in kinds):
        return f"{rule}: {rule}j {literal(_CLOSING)}\n{rule}j: {json_rule(schema)}\n"
    parts = ["/(?s:.*)/"]
    if len(kinds) == 1:
        parts = list(_text_parts(kinds[0][1])) or parts
    # Lazy, and with the closing tag inside: the value ends at the first one.
    terminal = rule.upper()
    body = " & ".join(parts)
    return f"{rule}[lazy]: {terminal}\n{terminal}: ({body}) {literal(_CLOSING)}\n"


def _kinds(schema: dict | bool):
    """What a value may be: ("literal", value), ("text", schema) or ("json", None) each."""
    schema = schemas.resolved(schema)
    if isinstance(schema, bool):
        yield "text", {}
    elif "enum" in schema or "const" in schema:
        yield from (("literal", v) for v in schema.get("enum", [schema.get("const")]))
    elif (union := schema.get("anyOf") or schema.get("oneOf")) and _is_plain(schema):
        roots = {"$defs": schema["$defs"]} if "$defs" in schema else {}
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
        yield "json", None


def _is_plain(schema: dict) -> bool:
    """Whether a union says it all."""
    return not schema.keys() - _NOTES - {"anyOf", "oneOf", "$defs"}


def _text_parts(schema: dict):
    """Lark terminals that all hold for a string of the schema."""
    if schema.keys() - _NOTES - _TEXT - {"$defs"}:
        return
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if low or high != "":
        yield f"/(?s:.{{{low},{high}}})/"
    pattern = schema.get("pattern")
    # A pattern is searched for, not matched; one with alternatives is left to the check after.
    if pattern and "|" not in pattern and not refuses_pattern(pattern):
        anchored = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        core = pattern[anchored[0] : len(pattern) - anchored[1]]
        core = f"{'' if anchored[0] else '(?s:.*)'}({core}){'' if anchored[1] else '(?s:.*)'}"
        if fault(f"start: P\nP: {regex(core)}\n") is None:
            yield regex(core)
