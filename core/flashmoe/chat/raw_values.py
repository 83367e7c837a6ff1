"""Decide what the raw values in tool calls of the Coder format stand for.

The format writes strings without quotes and all other values as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .json_schema import ANNOTATIONS, loads, resolve_reference, validation_error

#: Keywords of a schema that its alternatives need, too.
ROOTS = {"$defs", "$schema"}


def value_kinds(schema: dict | bool) -> Iterator[tuple[str, Any]]:
    """Yield what a value may be: ("literal", value), ("text", schema) or ("json", schema)."""
    schema = resolve_reference(schema)
    if isinstance(schema, bool):
        yield "text", {}
    elif "enum" in schema or "const" in schema:
        yield from (("literal", v) for v in schema.get("enum", [schema.get("const")]))
    elif union := _union(schema):
        roots = {k: schema[k] for k in ROOTS & schema.keys()}
        for part in union:
            yield from value_kinds({**part, **roots} if isinstance(part, dict) else part)
    elif isinstance(schema.get("type"), list):
        for kind in schema["type"]:
            yield from value_kinds({**schema, "type": kind})
    elif schema.get("type") == "null":
        yield "literal", None
    elif schema.get("type") == "boolean":
        yield from (("literal", True), ("literal", False))
    elif schema.get("type", "string") == "string":
        yield "text", schema
    else:
        yield "json", schema


def _union(schema: dict) -> list:
    """Return the alternatives of a schema that has no other constraints, or [] for any other."""
    constraints = schema.keys() - ANNOTATIONS
    for key in ("anyOf", "oneOf", "allOf"):
        if constraints == {key} and (key != "allOf" or len(schema[key]) == 1):
            return schema[key]
    return []


def may_be_text(schema: dict | bool) -> bool:
    """Return whether a raw value of this schema may be text, and not only JSON."""
    return any(
        k == "text" or (k == "literal" and isinstance(v, str)) for k, v in value_kinds(schema)
    )


def value_from_text(text: str, schema: dict | bool) -> tuple[Any, str | None]:
    """Decide by its schema which value a raw text stands for.

    Formats that write strings without quotes leave it open whether `3` is a number or a string.
    Text that is JSON and satisfies the schema is parsed (big integers stay exact); otherwise it is
    the string. Quotes are part of a string where the schema allows that.

    Returns:
        (value, None), or (None, why the text fits no value of the schema).
    """
    candidates: list[Any] = [text]
    try:
        value = _as_schema_types(loads(text), resolve_reference(schema))
        candidates.insert(isinstance(value, str), value)
    except (ValueError, RecursionError):
        # Chat templates write these values of earlier calls as Python does, and models copy that.
        words = {"True": True, "False": False, "None": None}
        if text.strip() in words:
            candidates.insert(0, words[text.strip()])
    errors = [validation_error(value, schema) for value in candidates]
    for value, error in zip(candidates, errors, strict=True):
        if error is None:
            return value, None
    return None, errors[0]


def _as_schema_types(value: Any, schema: dict | bool) -> Any:
    """Return 1.0 as 1 where the schema asks for an integer: to a Python function they differ."""
    whole = isinstance(value, float) and value.is_integer()
    if whole and isinstance(schema, dict) and schema.get("type") == "integer":
        return int(value)
    return value
