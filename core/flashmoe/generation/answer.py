"""Track one answer: what it was prepared from, its tokens and limits, and whether it is valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..chat import json_schema
from ..chat.output_parser import OutputParser
from ..chat.template import Prompt
from ..errors import OutputError
from ..events import Event
from ..grammar.constraint import Constraint
from ..grammar.response import ResponseFormat
from ..requests import Request
from .job import Cancellation


@dataclass
class AnswerState:
    """One answer under way.

    Attributes:
        request: what the caller asked.
        prompt: its tokens.
        response_format: the format that the answer must have, None for text.
        max_tokens: the most tokens that may be generated.
        constraint: which tokens the grammar allows next.
        parser: turns tokens into events.
        emit: takes the events.
        cancelled: tells whether anybody still waits for the answer.
        started: when the work on it began, by perf_counter.
        generated: tokens generated so far.
        reasoning: the generated tokens that are reasoning.
        forced: the generated tokens that a grammar forced.
        cut: max_tokens kept some forced tokens out, so that the answer is not complete.
    """

    request: Request
    prompt: Prompt
    response_format: ResponseFormat | None
    max_tokens: int
    constraint: Constraint
    parser: OutputParser
    emit: Callable[[Event], None]
    cancelled: Cancellation
    started: float
    generated: int = 0
    reasoning: int = 0
    forced: int = 0
    cut: bool = False

    def finish_reason(self) -> str | None:
        """Return "stop" or "length" when no more tokens are needed, None when they are."""
        if self.cut:
            return "length"
        if self.parser.stopped or self.constraint.finished:
            return "stop"
        return "length" if self.generated >= self.max_tokens else None

    def within_limit(self, tokens: list[int]) -> list[int]:
        """Return the tokens that max_tokens still allows. A grammar may force more."""
        left = self.max_tokens - self.generated
        self.cut = len(tokens) > left
        return tokens[:left]

    def emit_tokens(self, tokens: list[int], *, forced: int) -> None:
        """Count generated tokens, of which `forced` were forced, and emit their events."""
        self.forced += forced
        for token in tokens:
            self.reasoning += self.parser.kind == "reasoning"
            self.generated += 1
            self._emit(self.parser.feed(token))

    def finish(self, reason: str) -> str:
        """Emit what the parser held back; return the finish reason that callers see.

        Args:
            reason: "stop", "length" or "cancelled".

        Raises:
            OutputError: the answer is not what its format or tool_choice asks for.
        """
        why = {
            "length": f"max_tokens={self.max_tokens} was reached",
            "stop": "the model ended it",
            "cancelled": "it was cancelled",
        }[reason]
        in_reasoning = self.parser.kind == "reasoning"
        self._emit(self.parser.finish(why))
        if reason == "cancelled":
            return reason
        if self.parser.calls:
            return "tool_calls" if reason == "stop" else reason
        if self.constraint.covers_answer:
            self._check_complete(reason, why, in_reasoning)
        return reason

    def _check_complete(self, reason: str, why: str, in_reasoning: bool) -> None:
        if in_reasoning:
            raise OutputError(
                f"there is no answer: {why} inside the reasoning. Raise max_tokens, set "
                "thinking_budget, or turn thinking off"
            )
        if self.parser.stopped:
            raise OutputError("a stop string ended the answer before it was complete: drop it")
        if reason == "length":
            raise OutputError(
                f"the answer is cut short: {why} before it was complete. Raise max_tokens, or "
                "limit the length of strings and arrays in the schema"
            )
        if self.response_format is not None and self.response_format.schema is not None:
            try:
                value = json_schema.loads(self.parser.answer)
                error = json_schema.validation_error(value, self.response_format.schema)
            except (ValueError, RecursionError) as e:
                error = str(e)
            if error is not None:
                raise OutputError(
                    f"the answer does not satisfy the schema, which the grammar could not enforce "
                    f"completely: {error}"
                )

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            self.emit(event)
