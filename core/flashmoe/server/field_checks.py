"""Checks of the values that fields of a request may have."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from .openai_errors import invalid_field, short_repr

log = logging.getLogger("flashmoe")

#: Raises ApiError for a value that the field of the given name may not have.
Check = Callable[[str, Any], None]


def of_type(types: type | tuple[type, ...], description: str) -> Check:
    """Return the check that a value is of one of the types, which `description` names."""
    types = types if isinstance(types, tuple) else (types,)

    def check(name: str, value: Any) -> None:
        # A bool is an int to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise invalid_field(
                name, f"{name} is {short_repr(value)}: it must be {description}", "invalid_type"
            )

    return check


def one_of(*values: Any, way_out: str) -> Check:
    """Return the check that a value is one of these."""

    def check(name: str, value: Any) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise invalid_field(
                name,
                f"{name}={short_repr(value)} is not supported: {way_out}",
                "unsupported_value",
            )

    return check


def ignored(name: str, value: Any) -> None:
    """Accept any value: the field does not affect the answer."""


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    of_type((int, float), "a number")(name, value)
    if abs(value) > sys.float_info.max:
        raise invalid_field(name, f"{name} is {short_repr(value)}: that is out of range")


check_flag = of_type(bool, "true or false")
check_integer = of_type(int, "an integer")
check_text = of_type(str, "text")
check_object = of_type(dict, "an object")
check_list = of_type(list, "a list")


def check_fields(
    fields: Mapping[str, Any], known: Mapping[str, Check], required: tuple[str, ...]
) -> None:
    """Check the fields of an API that agents speak, whose next versions send more fields.

    A field with almost the name of a known one is refused: it is a typing error. Other unknown
    fields are ignored, and the server's log says so.

    Args:
        known: the check of each value that is not null.
        required: fields that must be there.

    Raises:
        ApiError: 400, with the name of the field.
    """
    for name, value in fields.items():
        if name in known:
            if value is not None:
                known[name](name, value)
        # The comparison takes long for a long name.
        elif near := get_close_matches(name[:40], known, 1, 0.85):
            raise invalid_field(
                name[:120], f"{short_repr(name)} is not a known field: did you mean {near[0]!r}?"
            )
        elif value is not None:
            log.warning("the field %s of a request is ignored: it is not known", short_repr(name))
    for name in required:
        if fields.get(name) is None:
            raise invalid_field(name, f"{name} is missing", "missing_required_parameter")
