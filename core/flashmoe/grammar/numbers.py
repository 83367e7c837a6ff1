"""Keeps numbers of constrained JSON finite.

A grammar lets a number go on for ever, and a weak model does: `"age": 99999999...` until
max_tokens. Here an integer has at most 40 digits, more than 128 bits; a decimal number 15 in all,
so that reading it rounds it to no other one (83.99999999999999999 is 84 to a float, and no longer
below 84); an exponent is at most 299, so that it is finite. Text and JSON strings have any.
"""

from __future__ import annotations

import re

from ..chat import json_schema as schemas
from ..chat.tools import Tool
from .tool_calls import holds_text

#: Digits of the parts of a number, by what was seen last.
LIMITS = {"integer": 40, "fraction": 15, "exponent": 2}
_THIRD_DIGIT_UP_TO = 29

_TAG = re.compile(r"<(function|parameter)=([^<>\n]+)>\n")
_CLOSING = "\n</parameter>\n"


class NumberGuard:
    """Follows the text of a document, or of calls in one of the formats.

    Args:
        tools: given for the Coder format alone, whose values may be raw text.
    """

    def __init__(self, tools: dict[str, Tool] | None = None):
        self._tools = tools
        self._digits = 0
        self._part = "integer"
        self._exponent = ""
        self._in_string = self._escaped = False
        # Of the Coder format: the text since the last tag, and what is open.
        self._rest = ""
        self._read = 0  # how much of it was followed
        self._function = ""
        self._open: str | None = None  # "json", "text", or None between parameters

    @property
    def room(self) -> int:
        """How many digits may come next, one after the other."""
        if self._part == "exponent" and self._digits >= LIMITS[self._part]:
            return int(self._digits == 2 and int(self._exponent) <= _THIRD_DIGIT_UP_TO)
        return max(0, LIMITS[self._part] - self._digits)

    def feed(self, text: str) -> None:
        """Follow the next piece of text, however it is cut."""
        if self._tools is None:
            self._json(text)
        else:
            self._rest += text
            while self._tag():
                pass
            if self._open == "json":
                self._json(self._rest[self._read :])
            self._read = len(self._rest)

    def _tag(self) -> bool:
        """Go past the next tag, if it is there."""
        if self._open is not None:
            end = self._rest.find(_CLOSING, max(0, self._read - len(_CLOSING)))
            if end < 0:
                return False
            self._open, self._rest = None, self._rest[end + len(_CLOSING) :]
        elif match := _TAG.search(self._rest):
            if match[1] == "function":
                self._function = match[2]
            else:
                self._open = "text" if self._is_text(match[2]) else "json"
            # With the line end, which may start the closing tag.
            self._rest = self._rest[match.end() - 1 :]
        else:
            return False
        self._digits, self._part = 0, "integer"
        self._in_string, self._escaped, self._read = False, False, 0
        return True

    def _is_text(self, name: str) -> bool:
        tool = self._tools.get(self._function)
        if tool is None or name not in tool.parameters.get("properties", {}):
            return True
        return holds_text(schemas.parameter(tool.parameters, name))

    def _json(self, text: str) -> None:
        for c in text:
            if self._in_string:
                self._in_string = self._escaped or c != '"'
                self._escaped = c == "\\" and not self._escaped
            elif c in "0123456789":
                self._digits += 1
                self._exponent += c
            elif c == "." and self._digits:
                self._part = "fraction"
            elif c in "eE" and self._digits:
                self._digits, self._part, self._exponent = 0, "exponent", ""
            elif c not in "+-":
                self._in_string = c == '"'
                self._digits, self._part = 0, "integer"
