"""JSON schemas: checked, closed, cut into parameters; values held against them.

Knows no tokens and no grammars. Remote references are never fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from urllib.parse import quote, unquote

from ..errors import SettingError

#: Keywords that look at an object from outside its own schema: closing it could contradict them.
_OUTSIDE = {"not", "if", "contains", "dependentSchemas", "dependencies", "dependentRequired"}
_OUTSIDE |= {"unevaluatedProperties", "unevaluatedItems"}
#: Keywords that hold for an object itself, and those that give it to another schema as well.
_OWN = {"properties", "patternProperties", "additionalProperties", "propertyNames"}
_OWN |= {"required", "minProperties", "enum", "const"}
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_OTHERS = {"anyOf", "oneOf"} | _REFERENCES
#: Keywords whose values are data, not schemas.
_DATA = {"enum", "const", "default", "examples"}
#: Keywords whose values are schemas by name; a name is no keyword.
_NAMED = {"properties", "patternProperties", "dependentSchemas", "dependencies"}
_DEFINITIONS = {"$defs", "definitions"}
_NAMED |= _DEFINITIONS
#: Keywords that ask nothing of a value.
NOTES = {"title", "description", "default", "examples", "$comment", "deprecated", "discriminator"}
NOTES |= {"$schema", *_DEFINITIONS}


#: Seconds that a pattern may be searched for in a string. Some take longer than the universe lasts.
PATTERN_SECONDS = 0.5


@lru_cache(maxsize=256)
def _validator(text: str):
    from jsonschema import Draft3Validator, Draft202012Validator  # late: 0.1 s
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    schema = json.loads(text)
    kind = validator_for(schema, default=Draft202012Validator)
    if kind is not Draft3Validator:
        kind = extend(kind, {"pattern": _pattern})
        # One inside would bring its own validator, without ours.
        schema = _rebuilt(schema, lambda s: {k: v for k, v in s.items() if k != "$schema"})
    # An empty registry: a remote reference is an error, not a download.
    return kind(schema, registry=Registry())


def _pattern(validator, pattern: str, value, schema):
    """jsonschema's keyword, but for the time that it may take: a search by `re` cannot be ended."""
    import regex
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(value, "string"):
        return
    try:
        if not regex.search(pattern, value, timeout=PATTERN_SECONDS):
            yield ValidationError(f"{value!r} does not match {pattern!r}")
    except TimeoutError:
        yield ValidationError(f"{pattern!r} takes too long to be searched for in {value!r}")
    except regex.error as e:
        yield ValidationError(f"{pattern!r} is no regular expression: {e}")


def check_schema(schema: dict | bool, what: str) -> None:
    """Refuse what is no JSON schema, and references that lead out of it.

    Raises:
        SettingError: names `what`, the place in the schema and the fault.
    """
    from jsonschema import Draft3Validator
    from jsonschema.exceptions import SchemaError

    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SettingError(f"{what} is not JSON: {e}") from e
    if not isinstance(schema, dict | bool) or json.loads(text) != schema:
        raise SettingError(f"{what} is no JSON schema: it must be a dict whose keys are text")
    try:
        for name in ("$schema", "$id", "$ref"):
            if any(not isinstance(s.get(name, ""), str) for s in _subschemas(schema)):
                raise SettingError(f"{what} is no valid JSON schema: {name} must be text")
        validator = _validator(text)
        validator.check_schema(schema)
    except SchemaError as e:
        place = "/".join(map(str, e.absolute_path)) or "its top"
        raise SettingError(
            f"{what} is no valid JSON schema: at {place}: {_short(e.message)}"
        ) from e
    except RecursionError as e:
        raise SettingError(f"{what} is nested too deeply") from e
    if isinstance(validator, Draft3Validator):
        raise SettingError(f"{what} is of draft 3 of JSON schema: write it for draft 4 or later")
    _check_references(schema, what)


def _check_references(schema: dict | bool, what: str) -> None:
    top, *inner = [*_subschemas(schema), {}]
    # With names of its own for parts of it, only the validator can tell.
    if any("$id" in s for s in inner):
        return
    for reference in (s["$ref"] for s in (top, *inner) if "$ref" in s):
        place = reference.removeprefix(top.get("$id", ""))
        if place and not place.startswith("#"):
            raise SettingError(
                f"{what} refers to {reference!r}, which is not fetched: copy it to $defs"
            )
        if _is_pointer(place) and not isinstance(_target(schema, place), dict | bool):
            raise SettingError(f"{what} refers to {reference!r}, where there is no schema")


def fault(value, schema: dict | bool) -> str | None:
    """Why `value` does not satisfy the schema, in one line; None when it does."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(value))
    except Unresolvable as e:
        return f"the schema has a reference that cannot be followed: {_short(str(e))}"
    except (RecursionError, OverflowError) as e:
        return f"it cannot be held against the schema: {e}"
    if error is None:
        return None
    place = "".join(f"[{p!r}]" for p in error.absolute_path)
    return f"{_short(error.message)} (at {place or 'its top'}, keyword {error.validator!r})"


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def closed(schema: dict | bool) -> dict | bool:
    """The schema with objects that list their properties, and do not say whether others may
    follow, taking no others. What satisfies it satisfies the schema; models then do not ramble."""
    if any(_looks_outside(s) for s in _subschemas(schema)):
        return schema
    return _rebuilt(schema, _close)


def _looks_outside(schema: dict) -> bool:
    # A value of one closed alternative may satisfy another one that is open.
    objects = [s for s in _get(schema, "oneOf", list) if _may_be_object(s)]
    overlap = len(objects) > 1 and "discriminator" not in schema
    others = len(_OTHERS & schema.keys()) + len(_get(schema, "allOf", list))
    looks = bool(_OWN & schema.keys()) + others
    return bool(_OUTSIDE & schema.keys()) or overlap or looks > 1


def _may_be_object(schema) -> bool:
    kinds = schema.get("type", "object") if isinstance(schema, dict) else "object"
    return kinds == "object" or (isinstance(kinds, list) and "object" in kinds)


def _close(schema: dict) -> dict:
    says = {"additionalProperties", "patternProperties", "minProperties"} & schema.keys()
    listed = _get(schema, "properties", dict)
    unlisted = set(map(str, _get(schema, "required", list))) - listed.keys()
    if "properties" not in schema or says or unlisted:
        return schema
    return {**schema, "additionalProperties": False}


def _get(schema: dict, key: str, kind: type):
    """The value of a keyword. Under keywords of others, what looks like a schema may be none."""
    value = schema.get(key)
    return value if isinstance(value, kind) else kind()


def _subschemas(schema):
    """Each dict in a schema that may be a schema."""
    if isinstance(schema, list):
        for value in schema:
            yield from _subschemas(value)
    elif isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, dict):
                yield from _subschemas(list(value.values()))
            elif key not in _DATA:
                yield from _subschemas(value)


def _rebuilt(schema, change: Callable[[dict], dict]):
    """The schema with each dict of `_subschemas` changed, inner ones first."""
    if isinstance(schema, list):
        return [_rebuilt(value, change) for value in schema]
    if not isinstance(schema, dict):
        return schema
    new = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            new[key] = {name: _rebuilt(v, change) for name, v in value.items()}
        else:
            new[key] = value if key in _DATA else _rebuilt(value, change)
    return change(new)


def without_patterns(schema, unusable: Callable[[str], bool]):
    """The schema less the `pattern`s for which unusable(pattern) is true."""

    def change(schema):
        pattern = _get(schema, "pattern", str)
        drop = pattern and unusable(pattern)
        return {k: v for k, v in schema.items() if k != "pattern"} if drop else schema

    return _rebuilt(schema, change)


def parameter(schema: dict, name: str) -> dict | bool:
    """The schema of one property, as a schema of its own: its references still find their aim."""
    sub = schema["properties"][name]
    dialect = {"$schema": schema["$schema"]} if "$schema" in schema else {}
    if not any(_REFERENCES & s.keys() for s in _subschemas(sub)):
        return {**dialect, **sub} if isinstance(sub, dict) else sub
    own = schema.get("$id", "")

    def change(schema):
        place = _get(schema, "$ref", str).removeprefix(own)
        moves = "$ref" in schema and _is_pointer(place)
        return {**schema, "$ref": f"#/$defs/root{place[1:]}"} if moves else schema

    root = {k: v for k, v in schema.items() if k not in ("$schema", "$id")}
    place = quote(name.replace("~", "~0").replace("/", "~1"), safe="~")
    moved = {"root": _rebuilt(root, change)}
    return {**dialect, "$ref": f"#/$defs/root/properties/{place}", "$defs": moved}


def resolved(schema: dict | bool) -> dict | bool:
    """The schema with a reference at its top followed, and the definitions that references in it
    need; as it is when that cannot be done."""
    root = schema
    for _ in range(20):
        if not isinstance(schema, dict) or not _is_pointer(schema.get("$ref")):
            break
        target = _target(root, schema["$ref"])
        rest = {k: v for k, v in schema.items() if k not in ("$ref", "description")}
        if isinstance(target, bool) and not rest.keys() - NOTES:
            return target
        # Both may ask something under one keyword.
        if not isinstance(target, dict) or (rest.keys() & target.keys()) - NOTES:
            break
        schema = {**target, **rest, **{k: root[k] for k in _DEFINITIONS & root.keys()}}
    return schema


def _is_pointer(reference) -> bool:
    return reference in ("", "#") or (isinstance(reference, str) and reference.startswith("#/"))


def _target(root, pointer: str):
    """What a pointer leads to; None: nothing."""
    target = root
    for step in unquote(pointer.removeprefix("#")).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
            target = target[int(step)]
        else:
            target = target.get(step) if isinstance(target, dict) else None
    return target


def loads(text: str):
    """The value of a JSON text; ValueError for what is none, and for what JSON cannot write again:
    numbers beyond the range of floats, halves of characters."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    def finite(digits):
        number = float(digits)
        return number if isfinite(number) else refuse(digits)

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def typed(text: str, schema: dict | bool):
    """The value that raw text stands for, by its schema: (value, fault).

    Formats that write strings without quotes leave it open whether `3` is a number. Text that is
    JSON and satisfies the schema is that value (big integers whole); else it is the string. Quotes
    belong to a string, where the schema lets them.
    """
    candidates = [text]
    try:
        value = _as_schema_types(loads(text), resolved(schema))
        candidates.insert(isinstance(value, str), value)
    except (ValueError, RecursionError):
        # As templates write them back.
        words = {"True": True, "False": False, "None": None}
        if text.strip() in words:
            candidates.insert(0, words[text.strip()])
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
