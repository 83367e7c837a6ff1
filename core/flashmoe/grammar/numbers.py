"""Limit the digits of numbers in constrained JSON.

A grammar lets a number go on for ever, and a weak model writes `"age": 99999999...` until
max_tokens. Here an integer has at most 40 digits, which is more than 128 bits. A decimal number has
at most 15 digits in all, so that parsing it as a float does not round it to another one
(83.99999999999999999 is 84 as a float, and no longer below 84). An exponent is at most 299, so that
the number is finite. Digits in raw text and in JSON strings are not limited.
"""

from __future__ import annotations

import re

from ..chat.tools import Tool

#: The most digits of a number, by the part of the number that was seen last.
MAX_DIGITS = {"integer": 40, "fraction": 15, "exponent": 2}
_THIRD_DIGIT_UP_TO = 29

_TAG = re.compile(r"<(function|parameter)=([^<>\n]+)>\n")
_CLOSING = "\n</parameter>\n"


class NumberGuard:
    """Follows JSON text, or the text of tool calls, and counts the digits of its numbers.

    Args:
        tools: the tools by name, for the text of calls in the Coder format, whose values may be raw
            text; None for JSON and for calls in the Hermes format.
    """

    def __init__(self, tools: dict[str, Tool] | None = None):
        self._tools = tools
        self._digits = 0
        self._part = "integer"
        self._exponent = ""
        self._in_string = self._escaped = False
        # For the Coder format: the text since the last tag, and how much of it was followed.
        self._rest = ""
        self._read = 0
        self._function = ""
        self._value_kind: str | None = None  # "json", "text", or None between parameters

    @property
    def digits_left(self) -> int:
        """The number of digits that may follow, one after the other."""
        if self._part == "exponent" and self._digits >= MAX_DIGITS[self._part]:
            return int(self._digits == 2 and int(self._exponent) <= _THIRD_DIGIT_UP_TO)
        return max(0, MAX_DIGITS[self._part] - self._digits)

    def feed(self, text: str) -> None:
        """Follow the next piece of text, wherever it is cut."""
        if self._tools is None:
            self._follow_json(text)
        else:
            self._rest += text
            while self._pass_tag(self._tools):
                pass
            if self._value_kind == "json":
                self._follow_json(self._rest[self._read :])
            self._read = len(self._rest)

    def _pass_tag(self, tools: dict[str, Tool]) -> bool:
        """Go past the next tag; return False if it has not come yet."""
        if self._value_kind is not None:
            end = self._rest.find(_CLOSING, max(0, self._read - len(_CLOSING)))
            if end < 0:
                return False
            self._value_kind, self._rest = None, self._rest[end + len(_CLOSING) :]
        elif match := _TAG.search(self._rest):
            if match[1] == "function":
                self._function = match[2]
            else:
                self._value_kind = "text" if self._is_text(match[2], tools) else "json"
            # The line end is kept: it may be the start of the closing tag.
            self._rest = self._rest[match.end() - 1 :]
        else:
            return False
        self._digits, self._part = 0, "integer"
        self._in_string, self._escaped, self._read = False, False, 0
        return True

    def _is_text(self, name: str, tools: dict[str, Tool]) -> bool:
        """Return whether the value of a parameter may be raw text."""
        tool = tools.get(self._function)
        return tool is None or name not in tool.json_parameters

    def _follow_json(self, text: str) -> None:
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
