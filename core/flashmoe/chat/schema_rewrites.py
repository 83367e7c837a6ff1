"""Rewrite JSON schemas: to the current draft, and to what a grammar can enforce."""

from __future__ import annotations

from typing import Any

from . import json_schema as schemas
from .formats import format_regex

#: Keywords that may be null.
_MAY_BE_NULL = {"const", "default", "examples", "enum"}
_BOUNDS = (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum"))


def modern(schema: Any) -> Any:
    """Return a schema without keywords that are null, and in the current draft of JSON schema.

    Tools often have draft 4 without saying so. A schema that says its draft stays as it is written.
    """
    draft_is_known = isinstance(schema, dict) and isinstance(schema.get("$schema"), str)

    def change(schema: dict) -> dict:
        new = {k: v for k, v in schema.items() if v is not None or k in _MAY_BE_NULL}
        return new if draft_is_known else _from_draft_4(new)

    return schemas.rebuilt(schema, change)


def _from_draft_4(schema: dict) -> dict:
    for exclusive, inclusive in _BOUNDS:
        if isinstance(schema.get(exclusive), bool):
            bound = schema.get(inclusive) if schema[exclusive] else None
            drop = {exclusive} | ({inclusive} if bound is not None else set())
            schema = {k: v for k, v in schema.items() if k not in drop}
            schema |= {} if bound is None else {exclusive: bound}
    if isinstance(schema.get("items"), list):
        more = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
        kept = {k: v for k, v in schema.items() if k not in ("items", "additionalItems")}
        schema = {**kept, "prefixItems": schema["items"], **more}
    if isinstance(schema.get("required"), bool):
        schema = {k: v for k, v in schema.items() if k != "required"}
    return schema


def enforceable(schema: dict | bool) -> dict | bool:
    """Return a schema of the same values in which llguidance enforces more.

    Formats become patterns, which bound the length of texts. Names of properties that are listed,
    or have a pattern, become properties.
    """
    return schemas.rebuilt(schema, lambda s: _names_as_properties(_format_as_pattern(s)))


def _format_as_pattern(schema: dict) -> dict:
    regex = format_regex(schema.get("format"))
    if regex is None or "pattern" in schema or schema.get("type") != "string":
        return schema
    rest = {k: v for k, v in schema.items() if k != "format"}
    return {**rest, "pattern": f"^({regex})$"}


def _names_as_properties(schema: dict) -> dict:
    names, others = schema.get("propertyNames"), schema.get("additionalProperties", True)
    if not isinstance(names, dict) or others is False or "patternProperties" in schema:
        return schema
    rest = {k: v for k, v in schema.items() if k != "propertyNames"}
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    keys = names.keys() - schemas.ANNOTATIONS - {"type"}
    if isinstance(listed, list) and keys <= {"enum", "const"}:
        texts = [name for name in listed if isinstance(name, str)]
        known = schema.get("properties", {})
        properties = {name: known.get(name, others) for name in texts}
        return {**rest, "properties": properties, "additionalProperties": False}
    if keys == {"pattern"} and not schema.get("properties"):
        pattern = {names["pattern"]: others}
        return {**rest, "patternProperties": pattern, "additionalProperties": False}
    return schema
