"""Parse the tool calls that models write, piece by piece, as their tokens arrive.

There are two formats, told apart by the tool parser that mlx-lm infers for a tokenizer:

    Coder (Qwen3-Coder, Qwen3.5):  <function=NAME> <parameter=KEY> raw text </parameter> </function>
    Hermes (Qwen3, Qwen3-Next):    {"name": NAME, "arguments": {...}}

mlx-lm's own tool parsers are not used, because they take the text of a complete call: here the
arguments are streamed as JSON while the model writes them, and raw values get the types of the
tool's schema. The grammars of the same formats are in `flashmoe.grammar.tool_calls`. The text may
come from a model that runs without a grammar, so anything in it can be malformed; `finish` then
says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..errors import LimitError
from . import json_schema as schemas
from .raw_values import value_from_text
from .tools import Tool

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?")
_FUNCTION_END = re.compile(r"\s*</function>\s*")
_PARAMETER_END = "</parameter>"

#: A regex of text that no raw value may contain, in the common syntax of Python and llguidance: if
#: values could contain it, a parameter that was not closed would read as a longer value.
NEVER_IN_VALUE = r"<\/parameter>[ \t\r\n]*<(?:parameter=|\/function>)"
#: A regex of text that no line of a raw value may end with, for the same reason.
NEVER_ENDS_LINE = r"<(?:parameter|function)=[^<>\n]+>"
_UNCLOSED = re.compile(f"{NEVER_IN_VALUE}|{NEVER_ENDS_LINE}$", re.MULTILINE)


#: Calls a function with arguments: in a helper process, or directly.
Run = Callable[..., Any]


def directly(function: Callable, *args: Any) -> Any:
    """Call a function without limits, for callers that trust its arguments."""
    return function(*args)


class MalformedCall(ValueError):
    """Raised for a tool call that cannot be parsed; the text says what is wrong with it."""


class ToolCallParser(Protocol):
    """Parses one tool call, given in pieces without its markers.

    The last brace of the arguments comes only from `finish`, so that the pieces of a call that
    turns out to be none are no JSON.

    Attributes:
        name: the name of the function, or None while it is not known.
        text: all text that was fed.
    """

    name: str | None
    text: str

    def feed(self, text: str) -> Iterator[str]:
        """Parse the next piece of text, and yield the pieces of the arguments' JSON it completes.

        Raises:
            MalformedCall: the call cannot be parsed.
        """

    def finish(self) -> tuple[str, dict, str]:
        """Check the call after its last piece.

        Returns:
            (name, arguments, the rest of the arguments' JSON that `feed` did not yield).

        Raises:
            MalformedCall: the call cannot be parsed.
        """


class CoderCallParser:
    """Parses one call of the Coder format; see `ToolCallParser`.

    Args:
        tools: the tools by name, whose schemas give raw values their types.
        run: calls a function that checks a value by a schema.
    """

    def __init__(self, tools: dict[str, Tool], run: Run = directly):
        self._run = run
        self.name: str | None = None
        self.text = ""
        self._tools = tools
        self._at = 0
        self._arguments: dict[str, Any] = {}

    def feed(self, text: str) -> Iterator[str]:
        """Parse the next piece of text, and yield the pieces of the arguments' JSON it completes.

        Raises:
            MalformedCall: the call cannot be parsed.
        """
        self.text += text
        if self.name is None:
            match = _FUNCTION.match(self.text)
            if match is None:
                return
            self.name, self._at = match[1].strip(), match.end()
        yield from self._parameters(self.name, on_own_line=True)

    def finish(self) -> tuple[str, dict, str]:
        """Check the call after its last piece; see `ToolCallParser.finish`.

        Raises:
            MalformedCall: the call cannot be parsed.
        """
        if self.name is None:
            raise MalformedCall("it has no <function=NAME> at its start")
        # A closing tag inside a line may be the end of a value only when the whole text is known.
        rest = "".join(self._parameters(self.name, on_own_line=False))
        end = _FUNCTION_END.match(self.text, self._at)
        if end is None or end.end() != len(self.text):
            after = self.text[self._at :].strip()
            raise MalformedCall(
                f"after {len(self._arguments)} parameters comes {after[:80]!r}, not </function>"
            )
        return self.name, self._arguments, rest + ("}" if self._arguments else "{}")

    def _parameters(self, function: str, on_own_line: bool) -> Iterator[str]:
        """Parse parameters until one has no closing tag yet, and yield their JSON.

        Args:
            on_own_line: accept only a closing tag that stands on a line of its own.
        """
        while (start := _PARAMETER.match(self.text, self._at)) is not None:
            # Inside a line, the closing tag may belong to the value; at the start of a line it does
            # not.
            tag = f"\n{_PARAMETER_END}\n" if on_own_line else _PARAMETER_END
            end = self.text.find(tag, start.end() - on_own_line)
            if end < 0:
                return
            self._at = end + len(tag)
            raw = self.text[start.end() : end]
            raw = raw if on_own_line else raw.removesuffix("\n")
            unclosed = _UNCLOSED.search(raw) or (not on_own_line and "<parameter=" in raw)
            yield self._argument(function, start[1].strip(), raw, bool(unclosed))

    def _argument(self, function: str, name: str, raw: str, unclosed: bool) -> str:
        """Add an argument, and return its JSON.

        Args:
            unclosed: the raw value contains what may be the next tag.
        """
        tool = self._tools.get(function)
        possible = [True] if tool is None else tool.parameter_schemas(name)
        value, error = None, None
        try:
            for schema in possible:
                value, error = self._run(value_from_text, raw, schema)
                if error is None:
                    break
        except LimitError as e:
            raise MalformedCall(f"checking the parameter {name!r} {e}") from e
        # Inside JSON such a text stands between quotes, where it cannot be a tag.
        if unclosed and (error is not None or isinstance(value, str)):
            raise MalformedCall(f"the parameter {name!r} is not closed before the next tag")
        if error is not None:
            raise MalformedCall(f"the parameter {name!r} is {raw[:80]!r}: {error}")
        if name in self._arguments:
            raise MalformedCall(f"the parameter {name!r} is given twice")
        lead = ", " if self._arguments else "{"
        self._arguments[name] = value
        return lead + ": ".join(json.dumps(v, ensure_ascii=False) for v in (name, value))


class HermesCallParser:
    """Parses one call of the Hermes format; see `ToolCallParser`.

    Args:
        tools, run: not used, since the values are JSON and have types of their own.
    """

    def __init__(self, tools: dict[str, Tool], run: Run = directly):
        self.name: str | None = None
        self.text = ""
        self._start = self._at = 0  # the bounds of the arguments that were yielded
        self._depth = 0
        self._in_string = self._escaped = self._complete = False

    def feed(self, text: str) -> Iterator[str]:
        """Parse the next piece of text, and yield the arguments' JSON as the model writes it."""
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
        while self._at < len(self.text) and not self._complete:
            self._complete = self._closes(self.text[self._at])
            self._at += 1
        if (end := self._at - self._complete) > start:
            yield self.text[start:end]

    def finish(self) -> tuple[str, dict, str]:
        """Check the call after its last piece; see `ToolCallParser.finish`.

        Raises:
            MalformedCall: the call cannot be parsed.
        """
        try:
            call = schemas.loads(self.text)
        except (ValueError, RecursionError) as e:
            raise MalformedCall(f"it is not JSON: {e}") from e
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise MalformedCall('it is not an object with a "name"')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            raise MalformedCall(f'its "arguments" are {arguments!r}, not an object')
        text = json.dumps(arguments, ensure_ascii=False)
        if self.name is None:
            name: str = call["name"]
            self.name = name
            return name, arguments, text
        yielded = schemas.loads(self.text[self._start : self._at])
        if self.name != call["name"] or json.dumps(yielded, ensure_ascii=False) != text:
            raise MalformedCall('it has a "name" or "arguments" twice')
        return self.name, arguments, "}"

    def _closes(self, c: str) -> bool:
        """Follow the next character of the arguments, and return whether they end with it."""
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


#: The parser of each format, by the name of mlx-lm's tool parser.
TOOL_PARSERS: dict[str, Callable[[dict[str, Tool], Run], ToolCallParser]] = {
    "qwen3_coder": CoderCallParser,
    "json_tools": HermesCallParser,
}
