"""One answer under way: what it was prepared from, what has come of it, whether it is good."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..chat import json_schema as schemas
from ..chat.output_parser import Reply
from ..chat.template import Prompt
from ..errors import OutputError
from ..events import Event
from ..grammar.constraint import Constraint
from ..grammar.response import Document
from ..requests import Request


@dataclass
class AnswerState:
    """started: when the work on it began, by perf_counter. The counts are of generated tokens: all,
    those of the thought, those that were forced. cut: max_tokens kept some of the forced ones out,
    so that the answer is not whole."""

    request: Request
    prompt: Prompt
    document: Document | None
    max_tokens: int
    constraint: Constraint
    reply: Reply
    emit: Callable[[Event], None]
    cancelled: threading.Event
    started: float
    generated: int = 0
    thought: int = 0
    forced: int = 0
    cut: bool = False

    def over(self) -> str | None:
        """Why no more tokens are needed: "stop" or "length"; None: they are."""
        if self.cut:
            return "length"
        if self.reply.stopped or self.constraint.finished:
            return "stop"
        return "length" if self.generated >= self.max_tokens else None

    def within_limit(self, tokens: list[int]) -> list[int]:
        """The tokens that max_tokens still lets through. What a grammar forced may be more."""
        room = self.max_tokens - self.generated
        self.cut = len(tokens) > room
        return tokens[:room]

    def take(self, tokens: list[int], *, forced: int) -> None:
        """Emit the events of generated tokens, of which so many were forced."""
        self.forced += forced
        for token in tokens:
            self.thought += self.reply.kind == "thought"
            self.generated += 1
            self._give(self.reply.feed(token))

    def finish(self, reason: str) -> str:
        """Emit what was held back; the reason that callers see.

        Raises:
            OutputError: the answer is not what its format or tool_choice asks for.
        """
        why = {
            "length": f"max_tokens={self.max_tokens} was reached",
            "stop": "the model ended it",
            "cancelled": "it was cancelled",
        }[reason]
        in_thought = self.reply.kind == "thought"
        self._give(self.reply.finish(why))
        if reason == "cancelled":
            return reason
        if self.reply.calls:
            return "tool_calls" if reason == "stop" else reason
        if self.constraint.demands:
            self._check_whole(reason, why, in_thought)
        return reason

    def _check_whole(self, reason: str, why: str, in_thought: bool) -> None:
        if in_thought:
            raise OutputError(
                f"there is no answer: {why} inside the thought. Raise max_tokens, set "
                "thinking_budget, or turn thinking off"
            )
        if self.reply.stopped:
            raise OutputError("a stop string ended the answer before it was complete: drop it")
        if reason == "length":
            raise OutputError(
                f"the answer is cut short: {why} before it was complete. Raise max_tokens, or "
                "limit the length of strings and arrays in the schema"
            )
        if self.document is not None and self.document.schema is not None:
            try:
                value = schemas.loads(self.reply.answer)
                wrong = schemas.fault(value, self.document.schema)
            except (ValueError, RecursionError) as e:
                wrong = str(e)
            if wrong is not None:
                raise OutputError(
                    f"the answer does not satisfy the schema, which the grammar could not enforce "
                    f"whole: {wrong}"
                )

    def _give(self, events: Iterable[Event]) -> None:
        for event in events:
            self.emit(event)
