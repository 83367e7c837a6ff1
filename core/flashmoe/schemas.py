"""JSON schemas: checked, closed, cut into parameters; values held against them.

Knows no tokens and no grammars. Remote references are never fetched.
"""

from __future__ import annotations

import json
from functools import lru_cache

from .errors import SettingError

#: Keywords that look at an object from outside its own schema: closing it could contradict them.
_OUTSIDE = {"not", "if", "dependentSchemas", "dependencies", "dependentRequired"}
_OUTSIDE |= {"unevaluatedProperties", "unevaluatedItems"}
#: Keywords whose values are data, not schemas.
_DATA = {"enum", "const", "default", "examples"}


@lru_cache(maxsize=256)
def _validator(text: str):
    from jsonschema import Draft202012Validator  # late: 0.1 s
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = json.loads(text)
    # An empty registry: a remote reference is an error, not a download.
    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())


def check_schema(schema: dict | bool, what: str) -> None:
    """Refuse what is no JSON schema.

    Raises:
        SettingError: names `what`, the place in the schema and the fault.
    """
    from jsonschema.exceptions import SchemaError

    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as e:
        raise SettingError(f"{what} is not JSON: {e}") from e
    try:
        validator = _validator(text)
        validator.check_schema(schema)
    except SchemaError as e:
        place = "/".join(map(str, e.absolute_path)) or "its top"
        raise SettingError(f"{what} is no valid JSON schema: at {place}: {e.message}") from e


def fault(value, schema: dict | bool) -> str | None:
    """Why `value` does not satisfy the schema, in one line; None when it does."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(value))
    except (Unresolvable, RecursionError) as e:
        return f"the schema has a reference that cannot be followed: {e}"
    if error is None:
        return None
    place = "".join(f"[{p!r}]" for p in error.absolute_path)
    message = error.message if len(error.message) <= 300 else error.message[:297] + "..."
    return f"{message} (at {place or 'its top'}, keyword {error.validator!r})"


def closed(schema: dict | bool) -> dict | bool:
    """The schema with objects that list their properties, and do not say whether others may
    follow, taking no others. What satisfies it satisfies the schema; models then do not ramble."""
    return _close(schema) if not any(_looks_outside(s) for s in _subschemas(schema)) else schema


def _looks_outside(schema: dict) -> bool:
    joined = "properties" in schema and schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}
    return bool(_OUTSIDE & schema.keys() or joined or len(schema.get("allOf", ())) > 1)


def _close(schema):
    if not isinstance(schema, dict):
        return schema
    new = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            new[key] = {k: _close(v) for k, v in value.items()}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            new[key] = [_close(v) for v in value]
        elif key in ("items", "additionalProperties"):
            new[key] = _close(value)
        else:
            new[key] = value
    listed = schema.get("properties")
    if (
        isinstance(listed, dict)
        and set(schema.get("required", ())) <= listed.keys()
        and not schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}
    ):
        new["additionalProperties"] = False
    return new


def _subschemas(schema):
    """Each dict in a schema that may be a schema."""
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in _DATA:
                yield from _subschemas(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _subschemas(value)


def without_patterns(schema, unusable):
    """The schema less the `pattern`s for which unusable(pattern) is true."""
    if isinstance(schema, list):
        return [without_patterns(v, unusable) for v in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _DATA else without_patterns(value, unusable)
        for key, value in schema.items()
        if not (key == "pattern" and isinstance(value, str) and unusable(value))
    }


def parameter(schema: dict, name: str) -> dict | bool:
    """The schema of one property, as a schema of its own: its references still find their aim."""
    sub = schema["properties"][name]
    if not any("$ref" in s or "$dynamicRef" in s for s in _subschemas(sub)):
        return sub
    return {"$ref": f"#/$defs/root/properties/{_pointer(name)}", "$defs": {"root": _moved(schema)}}


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace("%", "%25")


def _moved(schema):
    """References from the root, made to start from where `parameter` puts it."""
    if isinstance(schema, list):
        return [_moved(v) for v in schema]
    if not isinstance(schema, dict):
        return schema
    new = {k: v if k in _DATA else _moved(v) for k, v in schema.items()}
    if isinstance(new.get("$ref"), str) and new["$ref"].startswith("#"):
        new["$ref"] = "#/$defs/root" + new["$ref"][1:]
    return new


def resolved(schema: dict | bool) -> dict | bool:
    """The schema with a reference at its top followed; as it is when that cannot be done."""
    root, seen = schema, 0
    while isinstance(schema, dict) and isinstance(schema.get("$ref"), str) and seen < 20:
        target = root
        for step in schema["$ref"].removeprefix("#").split("/")[1:]:
            step = step.replace("%25", "%").replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, dict) else None
        if not isinstance(target, dict | bool):
            return schema
        rest = {k: v for k, v in schema.items() if k not in ("$ref", "$defs", "description")}
        schema = {**target, **rest} if rest and isinstance(target, dict) else target
        seen += 1
    return schema


def loads(text: str):
    """The value of a JSON text; ValueError for what is none, NaN and Infinity among it."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def typed(text: str, schema: dict | bool):
    """The value that raw text stands for, by its schema: (value, fault).

    Formats that write strings without quotes leave it open whether `3` is a number. Text that is
    JSON and satisfies the schema is that value (big integers whole); else it is the string.
    """
    candidates = []
    try:
        value = loads(text)
        candidates.append(_as_schema_types(value, resolved(schema)))
    except (ValueError, RecursionError):
        # As templates write them back.
        words = {"True": True, "False": False, "None": None}
        candidates += [words[text.strip()]] if text.strip() in words else []
    candidates.append(text)
    faults = [fault(value, schema) for value in candidates]
    for value, wrong in zip(candidates, faults, strict=True):
        if wrong is None:
            return value, None
    return None, faults[0]


def _as_schema_types(value, schema):
    """1.0 is an integer to a schema; to a function in Python it is not."""
    whole = isinstance(value, float) and value.is_integer()
    if whole and isinstance(schema, dict) and schema.get("type") == "integer":
        return int(value)
    return value
