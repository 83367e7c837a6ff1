"""Parse and format sizes in bytes.

Text uses decimal units, as drives and Apple's memory figures do.
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

from .errors import SettingError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*((?:[KMGT]I?)?)B?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return the bytes of a size such as "8GB" (8 * 10**9), "7.5GiB" or 800000000.

    Raises:
        SettingError: the size cannot be parsed, or is less than one byte.
    """
    nbytes = 0
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        if match:
            nbytes = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(text, int) and not isinstance(text, bool):
        nbytes = text
    if nbytes < 1:
        raise SettingError(
            f'{text!r} is not a memory size: write it as "8GB", "7.5GiB", "800MB" or as bytes'
        )
    return nbytes


def format_size(nbytes: int | float) -> str:
    """Return `nbytes` as short text for people, such as "7.1 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size * 0.99995:  # 999,960,000 is "1.0 GB", not "1000.0 MB"
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def round_up(nbytes: int) -> str:
    """Return a short size that `parse_size` reads as `nbytes` or slightly more."""
    size, unit = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{(Decimal(nbytes) / size).quantize(Decimal('0.1'), ROUND_CEILING)}{unit}"
