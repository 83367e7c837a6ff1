"""Parses the JSON of request bodies, within limits of depth and number of values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..chat import json_schema as schemas
from .openai_errors import ApiError, short_repr

#: Maximum depth of objects and lists inside each other.
MAX_DEPTH = 100
#: Maximum number of values: while they are parsed, no other thread runs.
MAX_VALUES = 200_000

_SEPARATORS = np.isin(np.arange(256), list(b",[{"))


def parse_object(body: bytes) -> dict:
    """Return the JSON object of a body.

    Raises:
        ApiError: 400 if it is not one, 413 if it has too many values.
    """
    if len(body) > MAX_VALUES and _count_values(body) > MAX_VALUES:
        raise ApiError(
            413,
            f"the body has more than {MAX_VALUES} JSON values: shorten it",
            code="body_too_large",
        )
    try:
        fields = schemas.loads(body.decode(), lone_surrogates=True)
        too_deep = _is_deeper(fields, MAX_DEPTH)
    except (ValueError, RecursionError) as e:
        text = f"the body is not JSON: {short_repr(str(e))}"
        raise ApiError(400, text, code="invalid_json") from e
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if too_deep:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
    return fields


def _count_values(body: bytes) -> int:
    """Return about how many values a JSON text has, without parsing it.

    numpy leaves the interpreter to other threads meanwhile, which json does not.
    """
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    text = np.frombuffer(without_escapes, np.uint8)
    in_string = np.bitwise_xor.accumulate(text == ord('"'))
    return int(np.count_nonzero(_SEPARATORS[text] & ~in_string))


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
