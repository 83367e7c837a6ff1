"""How models write tool calls: what stands between the markers, read piece by piece.

Two formats, told apart by the parser that mlx-lm infers for a tokenizer:

    Coder (Qwen3-Coder, Qwen3.5):  <function=NAME> <parameter=KEY> raw text </parameter> </function>
    Hermes (Qwen3, Qwen3-Next):    {"name": NAME, "arguments": {...}}

The grammars of the same formats are in `call_grammars`. What is read here may come from a model
without a grammar, so anything can be malformed; then `finish` says what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from . import json_schema as schemas
from .tools import Tool

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?")
_FUNCTION_END = re.compile(r"\s*</function>\s*")
_PARAMETER_END = "</parameter>"

#: What no raw value may hold, in the syntax of Python and of llguidance: with it, a parameter that
#: was not closed would read as a longer value.
IN_NO_VALUE = r"<\/parameter>[ \t\r\n]*<(?:parameter=|\/function>)"
#: The same at the end of a line.
ENDS_NO_LINE = r"<(?:parameter|function)=[^<>\n]+>"
_UNCLOSED = re.compile(f"{IN_NO_VALUE}|{ENDS_NO_LINE}$", re.MULTILINE)


class Malformed(ValueError):
    """A call that cannot be read; the text says what is wrong with it."""


class CoderCall:
    """Reads one call of the Coder format.

    Attributes:
        name: the function, once it is known.
        text: all that was fed.
    """

    def __init__(self, tools: dict[str, Tool]):
        self.name: str | None = None
        self.text = ""
        self._tools = tools
        self._at = 0
        self._arguments: dict = {}

    def feed(self, text: str) -> Iterator[str]:
        """Pieces of JSON for the arguments that `text` completes.

        Raises:
            Malformed
        """
        self.text += text
        if self.name is None:
            match = _FUNCTION.match(self.text)
            if match is None:
                return
            self.name, self._at = match[1].strip(), match.end()
        yield from self._parameters(on_a_line=True)

    def finish(self) -> tuple[str, dict, str]:
        """(name, arguments, the piece of their JSON that was not given out).

        Raises:
            Malformed
        """
        if self.name is None:
            raise Malformed("it has no <function=NAME> at its start")
        # Only now, with all of the text, may a closing tag inside a line be the end.
        rest = "".join(self._parameters(on_a_line=False))
        end = _FUNCTION_END.match(self.text, self._at)
        if end is None or end.end() != len(self.text):
            after = self.text[self._at :].strip()
            raise Malformed(
                f"after {len(self._arguments)} parameters comes {after[:80]!r}, not </function>"
            )
        return self.name, self._arguments, rest + ("}" if self._arguments else "{}")

    def _parameters(self, on_a_line: bool) -> Iterator[str]:
        """Read on, up to a parameter whose closing tag is not there, on a line of its own."""
        while (start := _PARAMETER.match(self.text, self._at)) is not None:
            # A value may hold the closing tag inside a line; at the start of one it is the end.
            tag = f"\n{_PARAMETER_END}\n" if on_a_line else _PARAMETER_END
            end = self.text.find(tag, start.end() - on_a_line)
            if end < 0:
                return
            self._at = end + len(tag)
            raw = self.text[start.end() : end]
            raw = raw if on_a_line else raw.removesuffix("\n")
            open_ended = _UNCLOSED.search(raw) or (not on_a_line and "<parameter=" in raw)
            yield self._argument(start[1].strip(), raw, bool(open_ended))

    def _argument(self, name: str, raw: str, open_ended: bool) -> str:
        tool = self._tools.get(self.name)
        schema: dict | bool = True
        if tool is not None and name in tool.parameters.get("properties", {}):
            schema = schemas.parameter(tool.parameters, name)
        value, wrong = schemas.typed(raw, schema)
        # In JSON it stands between quotes.
        if open_ended and (wrong is not None or isinstance(value, str)):
            raise Malformed(f"the parameter {name!r} is not closed before the next tag")
        if wrong is not None:
            raise Malformed(f"the parameter {name!r} is {raw[:80]!r}: {wrong}")
        if name in self._arguments:
            raise Malformed(f"the parameter {name!r} is given twice")
        lead = ", " if self._arguments else "{"
        self._arguments[name] = value
        return lead + ": ".join(json.dumps(v, ensure_ascii=False) for v in (name, value))


class HermesCall:
    """Reads one call of the Hermes format. Attributes as of CoderCall."""

    def __init__(self, tools: dict[str, Tool]):
        self.name: str | None = None
        self.text = ""
        self._start = self._at = 0  # of what was given out as arguments: its bounds
        self._depth = 0
        self._in_string = self._escaped = self._over = False

    def feed(self, text: str) -> Iterator[str]:
        """Pieces of the arguments' JSON, as the model writes them."""
        self.text += text
        if self.name is None:
            match = _HEAD.match(self.text)
            if match is None or match.end() == len(self.text) or self.text[match.end()] != "{":
                return
            try:
                self.name = schemas.loads(match[1])
            except ValueError:
                return
            self._start = self._at = match.end()
        start = self._at
        while self._at < len(self.text) and not self._over:
            self._over = self._closes(self.text[self._at])
            self._at += 1
        if self._at > start:
            yield self.text[start : self._at]

    def finish(self) -> tuple[str, dict, str]:
        """(name, arguments, the piece of their JSON that was not given out).

        Raises:
            Malformed
        """
        try:
            call = schemas.loads(self.text)
        except (ValueError, RecursionError) as e:
            raise Malformed(f"it is not JSON: {e}") from e
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise Malformed('it is no object with a "name"')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            raise Malformed(f'its "arguments" are {arguments!r}, not an object')
        text = json.dumps(arguments, ensure_ascii=False)
        if self.name is None:
            self.name = call["name"]
            return self.name, arguments, text
        given = schemas.loads(self.text[self._start : self._at])
        if self.name != call["name"] or json.dumps(given, ensure_ascii=False) != text:
            raise Malformed('it has a "name" or "arguments" twice')
        return self.name, arguments, ""

    def _closes(self, c: str) -> bool:
        """Whether a character ends the arguments."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
            return False
        if c == '"':
            self._in_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
        return self._depth == 0


#: By the name of mlx-lm's tool parser.
FORMATS = {"qwen3_coder": CoderCall, "json_tools": HermesCall}
