"""Generated tokens to events: thought, answer and tool calls apart, without their markers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from ..events import Event, Reasoning, Text, ToolCall, ToolCallArguments, ToolCallStart
from . import tools as tools_module
from .special_tokens import Control
from .tool_parsers import FORMATS, Malformed
from .tools import Tool


class Reply:
    """One answer, token by token.

    Args:
        tokenizer: mlx-lm's wrapper.
        control: its control tokens.
        tools: the tools that may be called.
        stop: the answer's text ends before the first of these.
        in_thought: the prompt left a thought open.

    Attributes:
        kind: what the next token belongs to: "answer", "thought" or "call".
        stopped: a stop string was met: nothing more is to be generated.
        calls: how many calls were reported.
        answer: the text of the answer so far.
    """

    def __init__(
        self,
        tokenizer,
        control: Control,
        tools: dict[str, Tool] | None = None,
        stop: tuple[str, ...] = (),
        in_thought: bool = False,
    ):
        self._tokenizer = tokenizer
        self._control = control
        self._tools = tools or {}
        self._stop = stop
        self._detokenizer = tokenizer.detokenizer
        self._held = ""
        self._fresh = True  # nothing of this stretch of text was given out
        self._call: _Call | None = None
        self.kind = "thought" if in_thought else "answer"
        self.stopped = False
        self.calls = 0
        self.answer = ""

    def feed(self, token: int) -> Iterator[Event]:
        """Events that the next token completes. Nothing comes after a stop string."""
        if self.stopped:
            return
        control = self._control
        # Inside a call they are a part of what the model wrote, and a fault in it.
        if token not in control.silent or (self.kind == "call" and token != control.call_end):
            self._detokenizer.add_token(token)
            yield from self._text(self._detokenizer.last_segment)
            return
        follows = {control.think_start: "thought", control.think_end: "answer"}
        if self.kind == "call":
            follows = {control.call_end: "answer"}
        elif control.call_start is not None:
            follows[control.call_start] = "call"
        if token in follows:
            yield from self._end_stretch(follows[token])

    def finish(self, why: str) -> Iterator[Event]:
        """Events for what was held back, when generation has ended. A call that is still open is
        reported as cut short by `why`."""
        if self.stopped:
            return
        yield from self._drain()
        if self._call is not None:
            yield from self._call.end(f"the answer ended inside the call ({why})")
            self._call = None
        elif self.kind == "answer":
            yield from self._release(len(self._held))

    def _text(self, piece: str) -> Iterator[Event]:
        if self._call is not None:
            yield from self._call.feed(piece)
            return
        self._held += piece
        if self._fresh:
            # Templates put newlines around the markers; they are no part of the text, so that a
            # stop string does not meet them.
            self._held = self._held.lstrip("\n")
        if self.kind == "answer" and self._stop:
            starts = {s: self._held.find(s) for s in self._stop if s in self._held}
            if starts:
                # The first to be complete, however the text comes in.
                first = min(starts, key=lambda s: (starts[s] + len(s), starts[s]))
                yield from self._release(starts[first])
                self.stopped = True
                return
        yield from self._release(len(self._held) - self._undecided())

    def _undecided(self) -> int:
        """How much of the end of the held text may turn out not to be given out."""
        # Newlines before a marker are the template's.
        count = len(self._held) - len(self._held.rstrip("\n"))
        if self.kind == "answer":
            longest = max((len(s) for s in self._stop), default=1) - 1
            for size in range(min(longest, len(self._held)), count, -1):
                if any(s.startswith(self._held[-size:]) for s in self._stop):
                    return size
        return count

    def _release(self, count: int) -> Iterator[Event]:
        ready, self._held = self._held[:count], self._held[count:]
        if ready:
            if self._fresh and self.kind == "answer" and self.answer:
                # Text on both sides of a call or thought.
                ready = "\n" + ready
            self._fresh = False
            if self.kind == "answer":
                self.answer += ready
                yield Text(ready)
            else:
                yield Reasoning(ready)

    def _drain(self) -> Iterator[Event]:
        """What the detokenizer still holds, such as a space, or a character cut short."""
        self._detokenizer.finalize()
        yield from self._text(self._detokenizer.last_segment)

    def _end_stretch(self, kind: str) -> Iterator[Event]:
        yield from self._drain()
        if self.stopped:
            return
        if self._call is not None:
            yield from self._call.end()
            self._call = None
        else:
            yield from self._release(len(self._held.rstrip("\n")))
        self._held, self._fresh, self.kind = "", True, kind
        self._detokenizer = self._tokenizer.detokenizer
        if kind == "call":
            self._call = _Call(self.calls, FORMATS[self._control.style](self._tools), self._tools)
            self.calls += 1


class _Call:
    """A call under way: what its format reads, as events."""

    def __init__(self, index: int, format, tools: dict[str, Tool]):
        self._index = index
        self._id = f"call_{secrets.token_hex(8)}"
        self._format = format
        self._tools = tools
        self._started = False
        self._text = ""
        self._wrong: str | None = None

    def feed(self, text: str) -> Iterator[Event]:
        self._text += text
        if self._wrong is None:
            try:
                for piece in self._format.feed(text):
                    yield from self._start()
                    yield ToolCallArguments(self._index, self._id, piece)
                if self._format.name is not None:
                    yield from self._start()
            except Malformed as e:
                self._wrong = f"the call cannot be read: {e}"

    def end(self, wrong: str | None = None) -> Iterator[Event]:
        wrong = wrong or self._wrong
        arguments = None
        if wrong is None:
            try:
                name, found, rest = self._format.finish()
                wrong = tools_module.fault(name, found, self._tools)
                arguments = None if wrong else found
                yield from self._start()
                if rest:
                    yield ToolCallArguments(self._index, self._id, rest)
            except Malformed as e:
                wrong = f"the call cannot be read: {e}"
        name = self._format.name or ""
        text = self._text.strip("\n")
        yield ToolCall(self._index, self._id, name, arguments, text, wrong)

    def _start(self) -> Iterator[Event]:
        if not self._started:
            self._started = True
            yield ToolCallStart(self._index, self._id, self._format.name)
