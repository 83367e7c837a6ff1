"""Write the grammars of tool calls, in the two formats that `flashmoe.chat.tool_parsers` parses.

In the Coder format, the value of a parameter is raw text if its schema allows a string, and ends at
the first closing tag. What a grammar cannot enforce on raw text is checked after the call has been
parsed. Where a value may be either a constrained text or JSON, every value that the grammar accepts
fits the schema, but the grammar does not accept every value that fits.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from ..chat import json_schema as schemas
from ..chat.formats import format_regex
from ..chat.raw_values import ROOTS, value_kinds
from ..chat.tool_parsers import NEVER_ENDS_LINE, NEVER_IN_VALUE
from ..chat.tools import Tool
from ..checkpoint.json_files import show
from ..errors import SettingError
from .response import grammar_error, is_unsupported_pattern, json_rule, lark_regex, lark_string

log = logging.getLogger("flashmoe")


def tool_call_rules(tools: dict[str, Tool], tool_parser: str, start: int, end: int) -> str:
    """Return the Lark rules of tool calls.

    The rule `body` is one call from after its start marker up to its end marker, and `call` is one
    call with its start marker.

    Args:
        tools: the tools that may be called, by name; at least one.
        tool_parser: the format, a key of `flashmoe.chat.tool_parsers.TOOL_PARSERS`.
        start, end: the marker tokens.

    Raises:
        SettingError: names the tool that cannot be enforced, and why.
    """
    write = {"qwen3_coder": _coder, "json_tools": _hermes}[tool_parser]
    rules = [f"call: <[{start}]> body\n"]
    bodies = []
    for index, tool in enumerate(tools.values()):
        try:
            rules.append(write(f"t{index}", tool))
        except (SettingError, RecursionError) as e:
            if len(tools) == 1:
                raise SettingError(f"tool {tool.name!r}: {e}") from e
            # Agents send many tools: an odd one must not stop the others. Its calls are checked.
            log.warning("the grammar cannot enforce the schema of tool %r: %s", tool.name, e)
            rules.append(write(f"t{index}", Tool(tool.name, {"type": "object"}, tool.definition)))
        bodies.append(f"t{index}")
    rules.append(f"body: ({' | '.join(bodies)}) <[{end}]>\n")
    return "".join(rules)


def _hermes(rule: str, tool: Tool) -> str:
    """Return the Lark rules of a call in the Hermes format, between its markers."""
    name = json.dumps(tool.name, ensure_ascii=False)
    head, tail = lark_string(f'\n{{"name": {name}, "arguments": '), lark_string("}\n")
    return f"{rule}: {head} {rule}a {tail}\n{rule}a: {json_rule(tool.parameters)}\n"


def _coder(rule: str, tool: Tool) -> str:
    """Return the Lark rules of a call in the Coder format, between its markers."""
    variants = tool.variants or (tool.parameters,)
    if len(variants) == 1:
        order, rules = _coder_parameters(rule, variants[0], {})
        body = " ".join(order)
    else:
        shared: dict[str, str] = {}
        bodies, rules = [], []
        for index, variant in enumerate(variants):
            order, more = _coder_parameters(f"{rule}o{index}", variant, shared)
            bodies.append(f"{rule}o{index}: {' '.join(order)}\n")
            rules += more
        body = f"({' | '.join(f'{rule}o{i}' for i in range(len(variants)))})"
        rules = [*bodies, *rules]
    head, tail = lark_string(f"\n<function={tool.name}>\n"), lark_string("</function>\n")
    return "".join([f"{rule}: {head} {body} {tail}\n", *rules])


def _coder_parameters(
    rule: str, schema: dict, shared: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Return the items of an object's parameters, in order, and the Lark rules that they need.

    Args:
        shared: the rules that other variants of the object have already, by what they are for: two
            rules for the same text would make the lexer choose between them.
    """
    listed = schema.get("properties", {})
    required = set(schema.get("required", ()))
    others = schema.get("additionalProperties", True)
    order, rules = [], []
    # A parameter that is required and not listed may have any value.
    parameters = {**listed, **dict.fromkeys(sorted(required - listed.keys()), others)}
    for index, name in enumerate(parameters):
        if any(c in name for c in "<>\n") or name != name.strip() or not name:
            if name not in required:
                log.warning("the parameter %r cannot be told from the format: left out", name)
                continue
            raise SettingError(
                f"the parameter {name!r} cannot be told from the format around it: use a name "
                "without <, > and line ends, and without white space at its ends"
            )
        if parameters[name] is False:
            if name in required:
                raise SettingError(
                    f"the parameter {name!r} is required, but its schema is false, so it has no "
                    "value: use another schema"
                )
            continue
        value = schemas.property_schema({**schema, "properties": parameters}, name)
        key = json.dumps([name, value])
        if key not in shared:
            shared[key] = f"{rule}p{index}"
            opening = lark_string(f"<parameter={name}>\n")
            rules.append(f"{shared[key]}: {opening} {shared[key]}v\n")
            rules.append(_coder_value(f"{shared[key]}v", value))
        order.append(shared[key] if name in required else f"{shared[key]}?")
    if "properties" not in schema and others is not False:
        # A tool that does not list its parameters takes any.
        rules.append(f'{rule}x: "<parameter=" {rule.upper()}N ">\\n" {rule}xv\n')
        rules.append(f"{rule.upper()}N: /[^<>\\s]([^<>\\n]*[^<>\\s])?/\n")
        rules.append(_coder_value(f"{rule}xv", others))
        order.append(f"{rule}x*")
    return order, rules


_CLOSING = "\n</parameter>\n"
#: A Lark regex of raw texts that `tool_parsers` would parse as something else.
_UNREADABLE = (
    f"/(?s:.*){NEVER_IN_VALUE}(?s:.*)|(?s:.*){NEVER_ENDS_LINE}(\\n(?s:.*))?"
    "|((?s:.*)\\n)?<\\/parameter>(\\n(?s:.*))?/"
)

_TEXT_KEYWORDS = {"type", "minLength", "maxLength", "pattern", "format"}
#: The highest minLength that is enforced: llguidance gives up on texts that must be several
#: thousand characters long.
_MAX_ENFORCED_MIN_LENGTH = 1000


def _unreadable(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(_UNREADABLE[1:-1], value) is not None


def _coder_value(rule: str, schema: dict | bool) -> str:
    """Return the Lark rules of a raw value and its closing tag."""
    texts: list[dict] = []
    literals: list[Any] = []
    json_values: list[dict] = []
    for kind, value in value_kinds(schema):
        {"text": texts, "literal": literals, "json": json_values}[kind].append(value)
    readable = [v for v in literals if not _unreadable(v)]
    if literals and not (readable or texts or json_values):
        raise SettingError(
            f"the values {literals} cannot be told from the format around them: use values without "
            "<parameter=...>, <function=...> and </parameter>"
        )
    literals = readable
    strings = [v for v in literals if isinstance(v, str)]
    if json_values and not (texts or strings):
        return f"{rule}: {rule}j {lark_string(_CLOSING)}\n{rule}j: {json_rule(schema)}\n"
    terminal = rule.upper()
    patterns = [*map(_text, texts)]
    if _ANY_TEXT in patterns:
        # Any text includes all other values.
        patterns, literals, json_values = [_ANY_TEXT], [], []
    if json_values:
        # Arrays and objects among the literals belong to the JSON rule.
        json_values += [
            {"type": _CONTAINERS[type(v)], "const": v} for v in literals if type(v) in _CONTAINERS
        ]
        literals = [v for v in literals if type(v) not in _CONTAINERS]
    body = " | ".join([*patterns, *map(_literal, literals)])
    if patterns:
        body = f"({body}) & ~{_UNREADABLE}"
        # The lexer takes what may be the start of a text for one, and does not go back to JSON.
        starts = {_STARTS[v["type"]] for v in json_values if v["type"] in _STARTS}
        body += f" & ~/[{''.join(sorted(starts))}](?s:.*)/" if starts else ""
    # The terminal is lazy and includes the closing tag, so the value ends at the first such tag.
    rules = f"{rule}t[lazy]: {terminal}\n{terminal}: ({body}) {lark_string(_CLOSING)}\n"
    if not json_values:
        return f"{rule}: {rule}t\n{rules}"
    roots = {k: v[k] for v in json_values for k in ROOTS & v.keys()}
    rules += f"{rule}j: {json_rule({'anyOf': json_values, **roots})}\n"
    return f"{rule}: {rule}t | {rule}j {lark_string(_CLOSING)}\n{rules}"


_ANY_TEXT = "/(?s:.*)/"
#: The first character of JSON values of a type with which few texts start. Numbers are not listed:
#: a value that may be a number or a text may start with a digit in either case.
_STARTS = {"array": "\\[", "object": "{"}
_CONTAINERS: dict[type, str] = {list: "array", dict: "object"}


def _literal(value: Any) -> str:
    """Return the Lark string of a value as it stands in a call."""
    return lark_string(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _text(schema: dict) -> str:
    """Return the Lark regex of the strings of a schema, as far as a regex can express them."""
    if schema.keys() - schemas.ANNOTATIONS - _TEXT_KEYWORDS:
        return _ANY_TEXT
    parts = []
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if high != "" and low > high:
        raise SettingError(
            f"Unsatisfiable schema: minLength ({low}) is greater than maxLength ({high})"
        )
    low = min(low, _MAX_ENFORCED_MIN_LENGTH)
    if low or high != "":
        parts.append(f"/(?s:.{{{low},{high}}})/")
    wanted = schema.get("format")
    if regex := format_regex(wanted):
        parts.append(lark_regex(f"({regex})"))
    elif wanted is not None:
        log.warning("the grammar cannot enforce the format %s", show(wanted))
    pattern = schema.get("pattern")
    if pattern and not is_unsupported_pattern(pattern):
        searched = lark_regex("|".join(_searched(p) for p in _alternatives(pattern)))
        if grammar_error(f"start: P\nP: {searched}\n") is None:
            parts.append(searched)
    return f"({' & '.join(parts)})" if parts else _ANY_TEXT


def _searched(pattern: str) -> str:
    """Return the regex of all strings in which a JSON schema's search for `pattern` succeeds."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    core = f"({pattern[start : len(pattern) - end]})"
    return f"{'' if start else '(?s:.*)'}{core}{'' if end else '(?s:.*)'}"


def _alternatives(pattern: str) -> list[str]:
    """Split a regex at its outermost "|", since an anchor belongs to one alternative only."""
    parts, depth, in_class, escaped = [""], 0, False, False
    for c in pattern:
        if c == "|" and not (depth or in_class or escaped):
            parts.append("")
            continue
        if not escaped:
            in_class = c != "]" if in_class else c == "["
            depth += 0 if in_class else (c == "(") - (c == ")")
        escaped = c == "\\" and not escaped
        parts[-1] += c
    return parts
