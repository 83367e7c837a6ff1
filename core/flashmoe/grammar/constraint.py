"""Constrain the next token: llguidance's masks, banned tokens, and tokens without an alternative.

An answer without a grammar is not constrained. A grammar for the whole answer (a response format,
or a required tool call) begins after the reasoning; a grammar for one tool call begins when the
model opens a call.
"""

from __future__ import annotations

import re
import threading
from time import thread_time
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from ..chat.special_tokens import SpecialTokens
from ..errors import CheckpointError, SettingError
from ..requests import Request
from .numbers import NumberGuard
from .rules import OutputRules

#: More digits than any token starts with.
_LONGEST_DIGITS = 20
#: Processor seconds that the first token may take.
STEP_SECONDS = 1.0
#: A state takes 1 to 2 kB; llguidance's own limit of 250,000 would allow half a gigabyte.
_LIMITS = LLParserLimits(max_lexer_states=50_000)


class MatcherFactory:
    """Creates llguidance's matchers for one tokenizer, on any thread.

    The first matcher reads the vocabulary, which takes seconds for a large one.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        special: the special tokens of the tokenizer.
        width: the width of the logits, which may be greater than the size of the vocabulary.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens, width: int):
        self._tokenizer = tokenizer
        self._end = sorted(special.answer_end)
        self.width = width
        self._lock = threading.Lock()
        self._read: tuple[LLTokenizer, np.ndarray, np.ndarray] | None = None

    def decode(self, tokens: list[int]) -> str:
        """Return the text of generated tokens."""
        return self._vocabulary()[0].decode_str(tokens)

    @property
    def leading_digits(self) -> np.ndarray:
        """The number of digits that each token starts with: (width,) int."""
        return self._vocabulary()[1]

    @property
    def only_digits(self) -> np.ndarray:
        """Whether each token is nothing but digits: (width,) bool."""
        return self._vocabulary()[2]

    def create(self, lark: str) -> LLMatcher:
        """Return a matcher at the start of a Lark grammar.

        Raises:
            SettingError: llguidance cannot enforce the grammar.
        """
        grammar = LLMatcher.grammar_from_lark(lark)
        matcher = LLMatcher(self._vocabulary()[0], grammar, log_level=0, limits=_LIMITS)
        # The first step tells grammars that would hold up all answers at each token.
        first, start = matcher.deep_copy(), thread_time()
        if not first.is_error():
            fill_next_token_bitmask(first, allocate_token_bitmask(1, self.width), 0)
        if first.is_error():
            raise SettingError(f"the grammar cannot be enforced: {first.get_error()[:500]}")
        if (seconds := thread_time() - start) > STEP_SECONDS:
            raise SettingError(
                f"the grammar takes {seconds:.1f} seconds for a token, more than {STEP_SECONDS:g}: "
                "use a smaller schema or grammar"
            )
        return matcher

    def _vocabulary(self) -> tuple[LLTokenizer, np.ndarray, np.ndarray]:
        """Return llguidance's tokenizer, and which of its tokens have digits."""
        with self._lock:
            if self._read is None:
                vocabulary = from_tokenizer(
                    self._tokenizer._tokenizer, n_vocab=self.width, eos_token=self._end
                )
                texts = [vocabulary.decode_bytes([i]) for i in range(self.width)]
                counts = [len(t) - len(t.lstrip(b"0123456789")) for t in texts]
                digits = [bool(t) and n == len(t) for t, n in zip(texts, counts, strict=True)]
                self._read = vocabulary, np.array(counts), np.array(digits)
            return self._read


class Constraint:
    """Constrains the tokens of one answer.

    Call `begin_answer` first, then `mask` and `accept` for each token.

    Args:
        matchers: creates matchers for the model's tokenizer.
        special: the special tokens of the tokenizer.
        newlines: the tokens of "\\n" and of "\\n\\n", which stand around the end of reasoning.
        request: the request.
        rules: what its answer must look like.
        in_reasoning: the prompt ends inside reasoning.

    Attributes:
        finished: the grammar is complete, so the answer ends here.
        covers_answer: the whole answer must follow a grammar.

    Raises:
        SettingError: llguidance cannot enforce the grammar.
    """

    def __init__(
        self,
        matchers: MatcherFactory,
        special: SpecialTokens,
        newlines: tuple[list[int], list[int]],
        request: Request,
        rules: OutputRules,
        in_reasoning: bool,
    ):
        self._matchers = matchers
        self._special = special
        self._newline, self._blank_line = newlines
        self._budget = request.thinking_budget
        self._reasoning_tokens = 0
        self._in_reasoning = in_reasoning
        self._matcher: LLMatcher | None = None
        self._guard: NumberGuard | None = None
        self._tools = rules.tools
        # Regexes and Lark grammars limit the length of their numbers themselves.
        self._guarded = not rules.structured or rules.schema is not None
        self._parallel = request.parallel_tool_calls
        self._no_calls = bool(rules.tools) and request.tool_choice == "none"
        self._bitmask = allocate_token_bitmask(1, matchers.width)
        self.finished = False
        # Compiled now: a grammar is refused before the model does any work, and does not hold up
        # other answers later.
        self._answer_grammar = self._compiled(rules.answer_grammar)
        self._call_grammar = self._compiled(rules.call_grammar)
        self.covers_answer = self._answer_grammar is not None

    def begin_answer(self) -> list[int]:
        """Begin the answer, and return the tokens that follow the prompt without an alternative."""
        if not self._in_reasoning:
            return self._begin_answer_grammar()
        return self._close_reasoning() if self._budget == 0 else []

    def mask(self, logits: mx.array) -> mx.array:
        """Return the logits (1, width), with -inf for each token that is not allowed now."""
        if self._matcher is not None:
            fill_next_token_bitmask(self._matcher, self._bitmask, 0)
            bits = np.unpackbits(self._bitmask.view(np.uint8), bitorder="little")
            allowed = bits[: logits.shape[-1]].astype(bool)
            if self._guard is not None and self._guard.digits_left < _LONGEST_DIGITS:
                shorter = self._within_digits(allowed, self._guard.digits_left)
                allowed = shorter if shorter.any() else allowed
            return mx.where(mx.array(allowed)[None], logits, -mx.inf)
        banned: set[int | None] = set()
        if self._in_reasoning and self.covers_answer:
            banned = {*self._special.answer_end, self._special.call_start}
        elif self._no_calls:
            banned = {self._special.call_start}
        if self._budget is not None and self._reasoning_tokens >= self._budget:
            banned = banned | {self._special.think_start}
        tokens = sorted(t for t in banned if t is not None)
        return logits.at[:, mx.array(tokens)].add(-mx.inf) if tokens else logits

    def _within_digits(self, allowed: np.ndarray, left: int) -> np.ndarray:
        """Return which of the allowed tokens keep a number within the digits that are left.

        The last digit must be one after which the number may end: between two bounds, 0 may not be.
        """
        leading, whole = self._matchers.leading_digits, self._matchers.only_digits
        shorter = allowed & ((leading < left) | ((leading <= left) & ~whole))
        if left == 1:
            last = np.flatnonzero(allowed & whole & (leading == 1)).tolist()
            shorter[[token for token in last if self._ends(token)]] = True
        return shorter

    def _ends(self, digit: int) -> bool:
        """Return whether something other than a digit may follow a token."""
        assert self._matcher is not None, "callers have begun a grammar"
        matcher = self._matcher.deep_copy()
        bitmask = allocate_token_bitmask(1, self._matchers.width)
        if not matcher.consume_token(digit) or matcher.is_stopped():
            return matcher.is_stopped()
        fill_next_token_bitmask(matcher, bitmask, 0)
        bits = np.unpackbits(bitmask.view(np.uint8), bitorder="little")[: self._matchers.width]
        return bool((bits.astype(bool) & (self._matchers.leading_digits == 0)).any())

    def is_end(self, token: int) -> bool:
        """Return whether a sampled token ends the answer."""
        return token in self._special.answer_end

    def accept(self, token: int) -> list[int]:
        """Accept the next token, and the tokens that now follow without an alternative.

        Returns:
            Those tokens that follow.
        """
        if self._matcher is not None:
            return self._consume([token])
        special = self._special
        if self._in_reasoning:
            if token == special.think_end:
                self._in_reasoning = False
                if self.covers_answer:
                    return [*self._blank_line, *self._begin_answer_grammar()]
                return []
            self._reasoning_tokens += 1
            spent = self._budget is not None and self._reasoning_tokens >= self._budget
            return self._close_reasoning() if spent else []
        if token == special.think_start:
            self._in_reasoning = True
        elif token == special.call_start and self._call_grammar is not None:
            forced = self._begin_grammar(self._call_grammar)
            self._update_guard([token, *forced])
            return forced
        return []

    def _begin_answer_grammar(self) -> list[int]:
        return [] if self._answer_grammar is None else self._begin_grammar(self._answer_grammar)

    def _compiled(self, lark: str | None) -> LLMatcher | None:
        """Return a matcher at the start of a grammar, of which each use takes a copy."""
        return None if lark is None else self._matchers.create(lark)

    def _begin_grammar(self, start: LLMatcher) -> list[int]:
        """Constrain the tokens from here on by a grammar; return the tokens that it forces."""
        self._matcher = start.deep_copy()
        self._guard = NumberGuard() if self._guarded else None
        return self._consume([])

    def _close_reasoning(self) -> list[int]:
        self._in_reasoning = False
        assert self._special.think_end is not None, "there is no reasoning without its markers"
        closing = [*self._newline, self._special.think_end, *self._blank_line]
        return closing + self._begin_answer_grammar()

    def _consume(self, tokens: list[int]) -> list[int]:
        """Feed tokens to the matcher, then the tokens that it forces; return the forced tokens."""
        matcher = self._matcher
        assert matcher is not None, "callers have begun a grammar"
        for token in tokens:
            if not matcher.consume_token(token):
                raise self._matcher_error(matcher, "a masked token was sampled")
        forced: list[int] = []
        while not matcher.is_stopped() and (more := matcher.compute_ff_tokens()):
            matcher.consume_tokens(more)
            forced += more
        if matcher.is_error():
            raise self._matcher_error(matcher, "the grammar failed")
        self._update_guard([*tokens, *forced])
        if matcher.is_stopped():
            # The grammar ends with the whole answer, or with one call among text.
            self.finished = self.covers_answer or not self._parallel
            self._matcher = None
        return forced

    def _matcher_error(self, matcher: LLMatcher, what: str) -> Exception:
        error = matcher.get_error()[:500]
        # The matcher's stop reason does not tell these cases, so its text must.
        if re.search("max is|limit|fuel|too many", error, re.IGNORECASE):
            return SettingError(
                f"the schemas or the grammar are too large to be enforced ({error}): use fewer or "
                "smaller ones in one request"
            )
        return CheckpointError(
            f"{what} ({error}): tokenizer.json may be damaged; download the model again, or report "
            "this with the output of flashmoe doctor --json"
        )

    def _update_guard(self, tokens: list[int]) -> None:
        """Feed the text of the tokens that came to the number guard."""
        if self._guard is None:
            return
        if tokens and tokens[0] == self._special.call_start:
            raw_values = self._special.tool_parser == "qwen3_coder"
            self._guard = NumberGuard(self._tools if raw_values else None)
        self._guard.feed(self._matchers.decode(tokens))
