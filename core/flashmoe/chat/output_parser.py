"""Split generated tokens into events: text, reasoning and tool calls, without their markers.

mlx-lm's TextStateMachine and StopSequences are not used. TextStateMachine matches markers as text:
here markers are matched as special tokens, so text cannot pose as one. StopSequences matches stop
strings as tokens: here they are matched in the text, however it is split into tokens. And the
arguments of tool calls are streamed while they are written, and get the types of the tool's schema.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from ..errors import LimitError
from ..events import Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from .special_tokens import SpecialTokens
from .tool_parsers import TOOL_PARSERS, MalformedCall, Run, ToolCallParser, directly
from .tools import Tool, call_error


class OutputParser:
    """Turns the tokens of one answer into events.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        special: the special tokens of the tokenizer.
        tools: the tools that may be called, by name.
        stop: stop strings: the text of the answer ends before the first of them.
        in_reasoning: the prompt ends inside reasoning.
        run: calls a function that checks values by a schema.
        continues: the answer goes on with a text that has begun, so that white space at its start
            belongs to it.

    Attributes:
        kind: what the next token belongs to: "answer", "reasoning" or "call".
        stopped: a stop string was found, so nothing more is to be generated.
        calls: the number of tool calls so far.
        answer: the text of the answer so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: SpecialTokens,
        tools: dict[str, Tool] | None = None,
        stop: tuple[str, ...] = (),
        in_reasoning: bool = False,
        run: Run = directly,
        *,
        continues: bool = False,
    ):
        self._run = run
        self._out: list[Iterable[Event]] = []
        self._tokenizer = tokenizer
        self._special = special
        self._tools = tools or {}
        self._stop = stop
        self._made: list[_CallEvents] = []
        self._detokenizer = tokenizer.detokenizer
        self._held = ""
        if continues:
            with suppress(AttributeError):  # a detokenizer that does not drop a space at the start
                self._detokenizer.text, self._detokenizer.offset = "x", 1
        self._at_start = not continues  # nothing of this stretch of text was emitted yet
        self._call: _CallEvents | None = None
        self.kind = "reasoning" if in_reasoning else "answer"
        self.stopped = False
        self.calls = 0
        self.answer = ""

    @property
    def holds_text(self) -> bool:
        """Whether there is text of which it is not known yet whether it belongs to the answer."""
        return self.kind == "answer" and (self.stopped or bool(self._held))

    def is_text(self, token: int) -> bool:
        """Return whether the next token belongs to the text of the answer."""
        return self.kind == "answer" and not self.stopped and token not in self._special.non_text

    def feed(self, token: int) -> Iterable[Event]:
        """Return the events that the next token completes, and none after a stop string.

        The attributes of the parser change at once. Inside a call the events are made only while
        they are iterated, since a value may take long to check: see `is_late`.
        """
        if self.stopped:
            return []
        special = self._special
        # Inside a call, all markers but its end are text that the model wrote, and an error in it.
        if token not in special.non_text or (self.kind == "call" and token != special.call_end):
            self._detokenizer.add_token(token)
            self._add_text(self._detokenizer.last_segment)
            return self._taken()
        next_kinds = {special.think_start: "reasoning", special.think_end: "answer"}
        if self.kind == "call":
            next_kinds = {special.call_end: "answer"}
        elif special.call_start is not None:
            next_kinds[special.call_start] = "call"
        if token in next_kinds:
            self._change_kind(next_kinds[token])
        return self._taken()

    def finish(self, why: str) -> Iterable[Event]:
        """Return the events for text that was held back, when generation has ended; see `feed`.

        Args:
            why: why it has ended, for the error of a call that is still open.
        """
        if self.stopped:
            return []
        self._drain_detokenizer()
        if self._call is not None:
            self._out.append(self._call.finish(f"the answer ended inside the call ({why})"))
            self._call = None
        elif self.kind == "answer":
            self._emit(len(self._held))
        return self._taken()

    @property
    def calls_are_good(self) -> bool:
        """Whether each call of the answer can be made, after all events were iterated."""
        return bool(self._made) and all(call.good for call in self._made)

    def _taken(self) -> Iterable[Event]:
        """Return what `_out` holds, and empty it."""
        out, self._out = self._out, []
        return chain.from_iterable(out) if any(map(is_late, out)) else [e for es in out for e in es]

    def _add_text(self, piece: str) -> None:
        if self._call is not None:
            self._out.append(self._call.feed(piece))
            return
        self._held += piece
        if self._at_start:
            # Templates put newlines around the markers. They are no part of the text, so a stop
            # string must not match them.
            self._held = self._held.lstrip("\n")
        if self.kind == "answer" and self._stop:
            starts = {s: self._held.find(s) for s in self._stop if s in self._held}
            if starts:
                # The stop string that is complete first, however the text is cut into pieces.
                first = min(starts, key=lambda s: (starts[s] + len(s), starts[s]))
                self._emit(starts[first])
                self.stopped = True
                return
        self._emit(len(self._held) - self._undecided())

    def _undecided(self) -> int:
        """Return how many characters at the end of the held text may turn out not to be emitted."""
        # Newlines before a marker belong to the template.
        count = len(self._held) - len(self._held.rstrip("\n"))
        if self.kind == "answer":
            longest = max((len(s) for s in self._stop), default=1) - 1
            for size in range(min(longest, len(self._held)), count, -1):
                if any(s.startswith(self._held[-size:]) for s in self._stop):
                    return size
        return count

    def _emit(self, count: int) -> None:
        """Make an event of the first `count` characters of the held text."""
        ready, self._held = self._held[:count], self._held[count:]
        if ready:
            if self._at_start and self.kind == "answer" and self.answer:
                # Separates the texts on both sides of a call or of reasoning.
                ready = "\n" + ready
            self._at_start = False
            if self.kind == "answer":
                self.answer += ready
                self._out.append([Text(ready)])
            else:
                self._out.append([Reasoning(ready)])

    def _drain_detokenizer(self) -> None:
        """Add the text that the detokenizer holds, such as a space or an incomplete character."""
        self._detokenizer.finalize()
        self._add_text(self._detokenizer.last_segment)

    def _change_kind(self, kind: str) -> None:
        self._drain_detokenizer()
        if self.stopped:
            return
        if self._call is not None:
            self._out.append(self._call.finish())
            self._call = None
        else:
            self._emit(len(self._held.rstrip("\n")))
        self._held, self._at_start, self.kind = "", True, kind
        self._detokenizer = self._tokenizer.detokenizer
        if kind == "call":
            name = self._special.tool_parser
            assert name is not None, "call_start is a token only where there is a parser"
            parser = TOOL_PARSERS[name](self._tools, self._run)
            self._call = _CallEvents(self.calls, parser, self._tools, self._run)
            self._made.append(self._call)
            self.calls += 1


def is_late(events: Iterable[Event]) -> bool:
    """Return whether events are made only while they are iterated, and may take long."""
    return not isinstance(events, list)


class _CallEvents:
    """Turns the text of one tool call into events."""

    def __init__(self, index: int, parser: ToolCallParser, tools: dict[str, Tool], run: Run):
        self._run = run
        self._index = index
        self._id = f"call_{secrets.token_hex(8)}"
        self._parser = parser
        self._tools = tools
        self._started = False
        self.good = False
        self._text = ""
        self._error: str | None = None

    def feed(self, text: str) -> Iterator[Event]:
        self._text += text
        if self._error is None:
            try:
                for piece in self._parser.feed(text):
                    yield from self._start()
                    yield ToolCallArguments(self._index, self._id, piece)
                yield from self._start()
            except MalformedCall as e:
                self._error = f"the call cannot be read: {e}"

    def finish(self, error: str | None = None) -> Iterator[Event]:
        error = error or self._error
        arguments = None
        if error is None:
            try:
                name, parsed, rest = self._parser.finish()
                error = self._run(call_error, name, parsed, self._tools)
                arguments = None if error else parsed
                yield from self._start()
                if rest and error is None:
                    yield ToolCallArguments(self._index, self._id, rest)
            except MalformedCall as e:
                error = f"the call cannot be read: {e}"
            except LimitError as e:
                error = f"checking the arguments {e}"
        text = self._text.strip("\n")
        self.good = error is None
        yield ToolCall(self._index, self._id, self._parser.name or "", arguments, text, error)

    def _start(self) -> Iterator[Event]:
        """Yield the ToolCallStart once, as soon as the function's name is known."""
        if not self._started and self._parser.name is not None:
            self._started = True
            yield ToolCallStart(self._index, self._id, self._parser.name)
