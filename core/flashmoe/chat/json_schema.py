"""Check JSON schemas, transform them, and validate values against them.

Knows nothing of tokens or grammars. Remote references are never fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from math import isfinite
from typing import Any
from urllib.parse import quote, unquote

from ..errors import SettingError
from .formats import format_regex

#: Keywords that constrain an object from outside its own schema. Closing the object could
#: contradict them.
_OUTSIDE = {"not", "if", "contains", "dependentSchemas", "dependencies", "dependentRequired"}
_OUTSIDE |= {"unevaluatedProperties", "unevaluatedItems"}
#: Keywords that constrain an object directly (`_OWN`), and keywords that apply another schema to it
#: as well (`_OTHERS`).
_OWN = {"properties", "patternProperties", "additionalProperties", "propertyNames"}
_OWN |= {"required", "minProperties", "enum", "const"}
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_OTHERS = {"anyOf", "oneOf"} | _REFERENCES
#: Keywords whose values are data, not schemas.
_DATA = {"enum", "const", "default", "examples"}
#: Keywords whose values map names to schemas. The names are not keywords.
_NAMED = {"properties", "patternProperties", "dependentSchemas", "dependencies"}
_DEFINITIONS = {"$defs", "definitions"}
_NAMED |= _DEFINITIONS
#: Keywords that do not constrain a value.
ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "deprecated"}
ANNOTATIONS |= {"discriminator", "$schema", *_DEFINITIONS}

#: Seconds allowed for searching a pattern in a string. Backtracking patterns may never finish.
PATTERN_SECONDS = 0.5


@lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """Return the jsonschema validator of a schema, given as JSON text."""
    from jsonschema import Draft3Validator, Draft202012Validator  # late: 0.1 s
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    schema = json.loads(text)
    kind = validator_for(schema, default=Draft202012Validator)
    if kind is not Draft3Validator:
        kind = extend(kind, {"pattern": _pattern, "format": _format})
        # A nested $schema would select a validator of its own, without our `pattern` keyword.
        schema = rebuilt(schema, lambda s: {k: v for k, v in s.items() if k != "$schema"})
    # The registry is empty, so a remote reference is an error and not a download.
    return kind(schema, registry=Registry())


def _pattern(validator, pattern: str, value, schema):
    """Validate the `pattern` keyword as jsonschema does, but with a time limit.

    jsonschema searches with `re`, and such a search cannot be interrupted.
    """
    import regex
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(value, "string"):
        return
    try:
        if not regex.search(python_pattern(pattern), value, timeout=PATTERN_SECONDS):
            yield ValidationError(f"{value!r} does not match {pattern!r}")
    except TimeoutError:
        yield ValidationError(f"searching {value!r} for {pattern!r} takes too long")
    except regex.error as e:
        yield ValidationError(f"{pattern!r} is not a regular expression: {e}")


def _format(validator, name, value, schema):
    """Validate the `format` keyword, which jsonschema takes for a comment."""
    import regex
    from jsonschema.exceptions import ValidationError

    pattern = format_regex(name)
    if pattern and validator.is_type(value, "string") and not regex.fullmatch(pattern, value):
        yield ValidationError(f"{value!r} is not a {name}")


_ECMA = re.compile(r"\\u\{([0-9A-Fa-f]{1,6})\}|\\.|\[\^?\]|\[\^?|\]|\$", re.DOTALL)


def python_pattern(pattern: str) -> str:
    """Return a pattern of ECMA-262, which JSON schema has, in the syntax of Python's `regex`."""
    in_class = False

    def written(match: re.Match[str]) -> str:
        nonlocal in_class
        text = match[0]
        if match[1] is not None:
            code = int(match[1], 16)
            return re.escape(chr(code)) if code < 0x110000 else text
        if in_class or text[0] == "\\":
            in_class = in_class and text != "]"
            return text
        if text in ("[]", "[^]"):  # no character, and any
            return "(?!)" if text == "[]" else "(?s:.)"
        in_class = text.startswith("[")
        return "\\Z" if text == "$" else text

    return _ECMA.sub(written, pattern)


def is_readable(pattern: str) -> bool:
    """Return whether values can be searched for a pattern."""
    import regex

    try:
        regex.compile(python_pattern(pattern))
    except (regex.error, RecursionError, OverflowError):
        return False
    return True


def check_schema(schema: dict | bool, what: str) -> None:
    """Raise an error if `schema` is not a JSON schema, or has references that lead out of it.

    Args:
        what: what the schema is, for the error text.

    Raises:
        SettingError: names `what`, the place in the schema and the fault.
    """
    from jsonschema import Draft3Validator
    from jsonschema.exceptions import SchemaError

    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SettingError(
            f"{what} cannot be written as JSON: {e}; use only JSON values in a schema"
        ) from e
    if not isinstance(schema, dict | bool) or json.loads(text) != schema:
        raise SettingError(
            f"{what} is not a JSON schema: a schema is a dict whose keys are strings, or a bool"
        )
    try:
        for name in ("$schema", "$id", "$ref"):
            if any(not isinstance(s.get(name, ""), str) for s in _subschemas(schema)):
                raise SettingError(f"{what} is not a valid JSON schema: {name} must be a string")
        validator = _validator(text)
        # Python's `re`, which jsonschema reads patterns with, is not the syntax of JSON schema.
        validator.check_schema(schema, format_checker=None)
    except SchemaError as e:
        place = "/".join(map(str, e.absolute_path)) or "its top"
        raise SettingError(
            f"{what} is not a valid JSON schema: at {place}: {_short(e.message)}"
        ) from e
    except RecursionError as e:
        raise SettingError(f"{what} is nested too deeply: use a flatter schema") from e
    if isinstance(validator, Draft3Validator):
        raise SettingError(
            f"{what} is written for draft 3 of JSON schema: write it for draft 4 or later"
        )
    unreadable = unreadable_patterns(schema)
    if unreadable:
        raise SettingError(
            f"{what} is not a valid JSON schema: {_short(repr(unreadable[0]))} is not a regular "
            "expression"
        )
    _check_references(schema, what)


def unreadable_patterns(schema: dict | bool) -> list[str]:
    """Return the patterns of a schema for which values cannot be searched."""
    found = []
    for sub in _subschemas(schema):
        pattern = _get(sub, "pattern", str)
        found += [pattern] if pattern and not is_readable(pattern) else []
        # jsonschema reads these with `re`.
        found += [p for p in _get(sub, "patternProperties", dict) if not _is_re(p)]
    return found


def without_patterns(schema: Any, patterns: list[str]) -> Any:
    """Return the schema without the given patterns of texts and of names of properties."""

    def change(sub: dict) -> dict:
        if _get(sub, "pattern", str) in patterns:
            sub = {k: v for k, v in sub.items() if k != "pattern"}
        named = _get(sub, "patternProperties", dict)
        if any(name in patterns for name in named):
            # Which names the others are is not known then.
            kept = {k: v for k, v in named.items() if k not in patterns}
            sub = {k: v for k, v in sub.items() if k != "additionalProperties"}
            sub |= {"patternProperties": kept}
        return sub

    return rebuilt(schema, change)


def _is_re(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _check_references(schema: dict | bool, what: str) -> None:
    subschemas: list[dict] = [*_subschemas(schema), {}]
    top, inner = subschemas[0], subschemas[1:]
    # Where a part has an $id of its own, only the validator can resolve references.
    if any("$id" in s for s in inner):
        return
    for reference in (s["$ref"] for s in subschemas if "$ref" in s):
        place = reference.removeprefix(top.get("$id", ""))
        if place and not place.startswith("#"):
            raise SettingError(
                f"{what} refers to {reference!r}, and remote schemas are not fetched: copy that "
                "schema to $defs and refer to it there"
            )
        if _is_pointer(place) and not isinstance(_target(schema, place), dict | bool):
            raise SettingError(
                f"{what} refers to {reference!r}, but there is no schema at that place"
            )


def validation_error(value: Any, schema: dict | bool) -> str | None:
    """Return why `value` does not satisfy the schema, in one line, or None if it does."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(value))
    except Unresolvable as e:
        return f"the schema has a reference that cannot be followed: {_short(str(e))}"
    except (RecursionError, OverflowError) as e:
        return f"it cannot be validated against the schema: {e}"
    if error is None:
        return None
    place = "".join(f"[{p!r}]" for p in error.absolute_path)
    return f"{_short(error.message)} (at {place or 'its top'}, keyword {error.validator!r})"


def document_error(text: str, schema: dict | bool) -> str | None:
    """Return why a text is not JSON that satisfies the schema, in one line, or None if it is."""
    try:
        return validation_error(loads(text), schema)
    except (ValueError, RecursionError) as e:
        return str(e)


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def close_objects(schema: dict | bool) -> dict | bool:
    """Return the schema with its objects closed, so that models do not add properties endlessly.

    An object that lists its properties, and does not say whether others may follow, takes no
    others. Every value that satisfies the closed schema also satisfies the original one. A schema
    for which that cannot be ensured is returned as it is.
    """
    if any(_blocks_closing(s) for s in _subschemas(schema)):
        return schema
    return rebuilt(schema, _close)


def _blocks_closing(schema: dict) -> bool:
    """Return whether a subschema has keywords which closed objects could contradict."""
    # A value of one closed alternative may satisfy another one that is open.
    objects = [s for s in _get(schema, "oneOf", list) if _may_be_object(s)]
    overlap = len(objects) > 1 and "discriminator" not in schema
    others = len(_OTHERS & schema.keys()) + len(_get(schema, "allOf", list))
    constraints = bool(_OWN & schema.keys()) + others
    return bool(_OUTSIDE & schema.keys()) or overlap or constraints > 1


def _may_be_object(schema: Any) -> bool:
    kinds = schema.get("type", "object") if isinstance(schema, dict) else "object"
    return kinds == "object" or (isinstance(kinds, list) and "object" in kinds)


def _close(schema: dict) -> dict:
    explicit = {"additionalProperties", "patternProperties", "minProperties"} & schema.keys()
    listed = _get(schema, "properties", dict)
    unlisted = set(map(str, _get(schema, "required", list))) - listed.keys()
    if "properties" not in schema or explicit or unlisted:
        return schema
    return {**schema, "additionalProperties": False}


def _get(schema: dict, key: str, kind: type) -> Any:
    """Return the value of a keyword, or an empty `kind` if the value is of another type.

    Under unknown keywords, a dict that looks like a schema may be something else.
    """
    value = schema.get(key)
    return value if isinstance(value, kind) else kind()


def _subschemas(schema: Any) -> Iterator[dict]:
    """Yield each dict in a schema that may be a schema, outer ones first."""
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


def rebuilt(schema: Any, change: Callable[[dict], dict]) -> Any:
    """Return the schema with each dict in it that may be a schema changed, inner ones first."""
    if isinstance(schema, list):
        return [rebuilt(value, change) for value in schema]
    if not isinstance(schema, dict):
        return schema
    new = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            new[key] = {name: rebuilt(v, change) for name, v in value.items()}
        else:
            new[key] = value if key in _DATA else rebuilt(value, change)
    return change(new)


def drop_patterns(schema: dict | bool, unusable: Callable[[str], bool]) -> dict | bool:
    """Return the schema without each `pattern` for which `unusable(pattern)` is true."""

    def change(schema):
        pattern = _get(schema, "pattern", str)
        drop = pattern and unusable(pattern)
        return {k: v for k, v in schema.items() if k != "pattern"} if drop else schema

    return rebuilt(schema, change)


def property_schema(schema: dict, name: str) -> dict | bool:
    """Return the schema of one property as a standalone schema.

    References in it are rewritten, with the definitions that they need, so that they still resolve.
    """
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
    moved = {"root": rebuilt(root, change)}
    return {**dialect, "$ref": f"#/$defs/root/properties/{place}", "$defs": moved}


def resolve_reference(schema: dict | bool) -> dict | bool:
    """Return the schema with the reference at its top followed, up to 20 references in a chain.

    The result keeps the definitions that references inside it need. A schema whose reference cannot
    be followed is returned as it is.
    """
    root = schema
    for _ in range(20):
        if not isinstance(root, dict) or not isinstance(schema, dict):
            break
        if not _is_pointer(schema.get("$ref")):
            break
        target = _target(root, schema["$ref"])
        rest = {k: v for k, v in schema.items() if k not in ("$ref", "description")}
        if isinstance(target, bool) and not rest.keys() - ANNOTATIONS:
            return target
        # Where both sides use one keyword, neither value may replace the other.
        if not isinstance(target, dict) or (rest.keys() & target.keys()) - ANNOTATIONS:
            break
        schema = {**target, **rest, **{k: root[k] for k in _DEFINITIONS & root.keys()}}
    return schema


def _is_pointer(reference: Any) -> bool:
    """Return whether a reference leads into its own schema by a JSON pointer."""
    return reference in ("", "#") or (isinstance(reference, str) and reference.startswith("#/"))


def _target(root: Any, pointer: str) -> Any:
    """Return the value that a JSON pointer leads to, or None if there is none."""
    target = root
    for step in unquote(pointer.removeprefix("#")).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
            target = target[int(step)]
        else:
            target = target.get(step) if isinstance(target, dict) else None
    return target


def loads(text: str, *, lone_surrogates: bool = False) -> Any:
    """Parse JSON text strictly, so that every value can be written as JSON again.

    Args:
        lone_surrogates: replace half of a surrogate pair by U+FFFD. Clients that cut text inside an
            emoji send one.

    Raises:
        ValueError: the text is not JSON, or it has numbers beyond the range of floats, or half of a
            surrogate pair.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if isfinite(number) else refuse(digits)

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    if "\\ud" in text.lower():
        if lone_surrogates:
            return _without_lone_surrogates(value)
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(v) for v in value]
    if isinstance(value, dict):
        clean = _without_lone_surrogates
        return {clean(k): clean(v) for k, v in value.items()}
    return value
