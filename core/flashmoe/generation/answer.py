"""Track one answer: what it was prepared from, its tokens and limits, and whether it is valid."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..bounded import calls
from ..chat.json_schema import document_error
from ..chat.output_parser import OutputParser
from ..chat.template import Prompt
from ..errors import LimitError, OutputError
from ..events import End, Event
from ..grammar.constraint import Constraint
from ..grammar.rules import OutputRules
from ..requests import Request
from .delivery import Delivery
from .job import Cancellation
from .logprobs import LogprobReporter
from .sampling import Sampled


@dataclass
class AnswerState:
    """One answer under way.

    Attributes:
        request: what the caller asked.
        prompt: its tokens.
        rules: what the answer must look like.
        max_tokens: the most tokens that may be generated.
        constraint: which tokens the grammar allows next.
        parser: turns tokens into events.
        delivery: takes the events.
        cancelled: tells whether anybody still waits for the answer.
        started: when the work on it began, by perf_counter. While it waits to begin: how long it
            took to prepare, in seconds.
        generated: tokens generated so far.
        reasoning: the generated tokens that are reasoning.
        forced: the generated tokens that a grammar forced.
        logprobs: reports the probabilities of tokens; None: they were not asked for.
        cut: max_tokens kept some forced tokens out, so that the answer is not complete.
    """

    request: Request
    prompt: Prompt
    rules: OutputRules
    max_tokens: int
    constraint: Constraint
    parser: OutputParser
    delivery: Delivery
    cancelled: Cancellation
    started: float
    generated: int = 0
    reasoning: int = 0
    forced: int = 0
    logprobs: LogprobReporter | None = None
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

    def emit_tokens(self, tokens: list[int], first: Sampled | None = None) -> None:
        """Count generated tokens and emit their events.

        Args:
            first: the first of them, which was sampled; None if all of them were forced.
        """
        self.forced += len(tokens) - (first is not None)
        for token in tokens:
            self.reasoning += self.parser.kind == "reasoning"
            self.generated += 1
            if self.logprobs is not None and self.parser.is_text(token):
                self.logprobs.add(first or Sampled(token))
            first = None
            events = self.parser.feed(token)
            if self.logprobs is not None and not self.parser.holds_text:
                self.delivery.events(self.logprobs.take())
            self.delivery.events(events)

    def finish(self, reason: str, end: End) -> None:
        """Emit what the parser held back, and the last event.

        That is an OutputError where the answer is not what its format or tool_choice asks for.

        Args:
            reason: "stop", "length" or "cancelled".
            end: the last event, whose finish reason will be the one that callers see.
        """
        why = {
            "length": f"max_tokens={self.max_tokens} was reached",
            "stop": "the model ended it",
            "cancelled": "it was cancelled",
        }[reason]
        in_reasoning = self.parser.kind == "reasoning"
        if self.logprobs is not None and not self.parser.stopped:
            self.delivery.events(self.logprobs.take())
        self.delivery.events(self.parser.finish(why))
        checked = reason != "cancelled" and not self.parser.calls and self.constraint.covers_answer

        def last() -> Event:
            try:
                if checked:
                    self._check_complete(reason, why, in_reasoning)
            except OutputError as e:
                e.end = end
                raise
            # Whether a call can be made is known when its events were made, which may take long.
            called = reason == "stop" and self.parser.calls_are_good
            return replace(end, finish_reason="tool_calls" if called else reason)

        self.delivery.last(last, late=checked and self.rules.schema is not None)

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
        if self.rules.schema is not None:
            try:
                error = calls.call(document_error, self.parser.answer, self.rules.schema)
            except LimitError as e:
                raise OutputError(
                    f"checking the answer against its schema {e}: use a simpler schema"
                ) from e
            if error is not None:
                raise OutputError(
                    f"the answer does not satisfy the schema, which the grammar could not enforce "
                    f"completely: {error}"
                )
