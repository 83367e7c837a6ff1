"""Write an object schema with alternatives at its top as a list of plain ones.

The Coder format writes the properties of an object one by one, so its grammar needs to know which
of them may stand together.
"""

from __future__ import annotations

from typing import Any

from . import json_schema as schemas

#: The most plain schemas that one schema becomes.
MAX_VARIANTS = 16

_UNIONS = ("anyOf", "oneOf", "allOf")
#: What a plain object schema may have besides annotations.
_PLAIN = {"type", "properties", "required", "additionalProperties"}


class _NotPlain(Exception):
    """Raised for a schema that cannot be written so."""


def object_variants(schema: dict) -> list[dict]:
    """Return plain object schemas, one of which each object that satisfies the schema satisfies.

    Not each object of these schemas satisfies it: oneOf allows only one of its alternatives. A
    schema that cannot be written so is returned without its alternatives.

    Args:
        schema: of type "object".
    """
    plain = {k: v for k, v in schema.items() if k not in _UNIONS}
    if len(plain) == len(schema):
        return [schema]
    shared = {k: schema[k] for k in ("$schema", "$id", "$defs", "definitions") if k in schema}
    try:
        variants = _variants(schema, shared, depth=0)
    except _NotPlain:
        variants = []
    return [{**v, **shared} for v in variants] or [plain]


def _variants(schema: Any, shared: dict, depth: int) -> list[dict]:
    if schema is True:
        schema = {}
    schema = schemas.resolve_reference({**schema, **shared}) if isinstance(schema, dict) else schema
    if not isinstance(schema, dict) or depth > 8:
        raise _NotPlain
    schema = {k: v for k, v in schema.items() if k not in schemas.ANNOTATIONS or k == "properties"}
    unions = {k: schema.pop(k) for k in _UNIONS if k in schema}
    schema.pop("$id", None)
    if schema.keys() - _PLAIN or schema.get("type", "object") != "object":
        raise _NotPlain
    variants = [schema]
    for name, parts in unions.items():
        if not isinstance(parts, list):
            raise _NotPlain
        inner = [_variants(part, shared, depth + 1) for part in parts]
        groups = inner if name == "allOf" else [[v for part in inner for v in part]]
        for group in groups:
            variants = [m for a in variants for b in group if (m := _merged(a, b)) is not None]
            if len(variants) > MAX_VARIANTS:
                raise _NotPlain
    return variants


def _merged(a: dict, b: dict) -> dict | None:
    """Return the schema of objects that satisfy both, or None if there are none."""
    first, second = a.get("properties", {}), b.get("properties", {})
    properties = {**first, **second}
    for name in first.keys() & second.keys():
        properties[name] = _both(first[name], second[name])
    required = {*a.get("required", ()), *b.get("required", ())}
    merged: dict[str, Any] = {"type": "object"}
    for schema in (a, b):
        others = schema.get("additionalProperties", True)
        if others is False:
            merged["additionalProperties"] = False
            properties = {k: v for k, v in properties.items() if k in schema.get("properties", {})}
            if not required <= properties.keys():
                return None
        elif others is not True:
            raise _NotPlain
    if properties:
        merged["properties"] = properties
    return merged | ({"required": sorted(required)} if required else {})


def _both(a: Any, b: Any) -> Any:
    """Return the schema of values that satisfy both."""
    for one, other in ((a, b), (b, a)):
        if one is True or one == other or one == {}:
            return other
    if not isinstance(a, dict) or not isinstance(b, dict):
        raise _NotPlain
    if any(a[k] != b[k] for k in (a.keys() & b.keys()) - schemas.ANNOTATIONS):
        raise _NotPlain
    return {**a, **b}
