"""What the next token may be: llguidance's masks, bans, and the tokens that have no alternative.

An answer without a grammar is left alone. A grammar for all of it (a schema, a call that is
required) begins after the thought; one for a tool call begins when the model opens a call.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from ..chat.special_tokens import Control
from ..chat.tools import Tool
from ..errors import SettingError
from ..requests import Request
from . import response as grammars
from . import tool_calls as call_grammars
from .numbers import NumberGuard

#: More digits than one token has.
_LONGEST_DIGITS = 20


class Matchers:
    """Makes matchers for one tokenizer. The first one reads its vocabulary: seconds for a large
    one.

    Args:
        tokenizer: mlx-lm's wrapper.
        control: its control tokens.
        width: of the logits, which may be wider than the vocabulary.
    """

    def __init__(self, tokenizer, control: Control, width: int):
        self._tokenizer = tokenizer
        self._end = sorted(control.end)
        self.width = width
        self._read: LLTokenizer | None = None
        self._digits: np.ndarray | None = None

    def text(self, tokens: list[int]) -> str:
        """The text of generated tokens."""
        return self._read.decode_str(tokens)

    @property
    def digits(self) -> np.ndarray:
        """(width,) int: how many digits each token starts with."""
        if self._digits is None:
            texts = [self._read.decode_bytes([i]) for i in range(self.width)]
            self._digits = np.array([len(t) - len(t.lstrip(b"0123456789")) for t in texts])
        return self._digits

    def new(self, lark: str) -> LLMatcher:
        """A matcher at the start of a Lark grammar.

        Raises:
            SettingError: llguidance does not take the grammar.
        """
        if self._read is None:
            self._read = from_tokenizer(
                self._tokenizer._tokenizer, n_vocab=self.width, eos_token=self._end
            )
        matcher = LLMatcher(self._read, LLMatcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            raise SettingError(f"the grammar cannot be enforced: {matcher.get_error()[:500]}")
        return matcher


class Constraint:
    """The constraint of one answer. `start`, then for each token `mask` and `accept`.

    Args:
        matchers: for the model's tokenizer.
        control: its control tokens.
        newlines: the tokens of "\\n" and of "\\n\\n", which stand around the end of a thought.
        request: the request; tools: its tools; document: its structured answer.
        in_thought: the prompt left a thought open.

    Attributes:
        finished: the grammar is complete: the answer ends here.
        demands: the whole answer must follow a grammar.
    """

    def __init__(
        self,
        matchers: Matchers,
        control: Control,
        newlines: tuple[list[int], list[int]],
        request: Request,
        tools: dict[str, Tool],
        document: grammars.Document | None,
        in_thought: bool,
    ):
        self._matchers = matchers
        self._control = control
        self._newline, self._blank_line = newlines
        self._budget = request.thinking_budget
        self._thought = 0
        self._in_thought = in_thought
        self._matcher: LLMatcher | None = None
        self._guard: NumberGuard | None = None
        self._tools = tools
        # Regexes and Lark grammars say for themselves how long they are.
        self._guarded = document is None or document.schema is not None
        self._parallel = request.parallel_tool_calls
        self._no_calls = bool(tools) and request.tool_choice == "none"
        self._whole, self._call = _grammars(request, tools, document, control)
        self._bitmask = allocate_token_bitmask(1, matchers.width)
        self.finished = False
        self.demands = self._whole is not None
        for lark in (self._whole, self._call):
            if lark is not None:
                matchers.new(lark)  # what is refused is refused before any work

    def start(self) -> list[int]:
        """Tokens that follow the prompt without an alternative."""
        if not self._in_thought:
            return self._begin_answer()
        return self._close_thought() if self._budget == 0 else []

    def mask(self, logits: mx.array) -> mx.array:
        """The logits (1, width), -inf where a token is not allowed now."""
        if self._matcher is not None:
            fill_next_token_bitmask(self._matcher, self._bitmask, 0)
            bits = np.unpackbits(self._bitmask.view(np.uint8), bitorder="little")
            allowed = bits[: logits.shape[-1]].astype(bool)
            if self._guard is not None and self._guard.room < _LONGEST_DIGITS:
                shorter = allowed & (self._matchers.digits <= self._guard.room)
                allowed = shorter if shorter.any() else allowed
            return mx.where(mx.array(allowed)[None], logits, -mx.inf)
        banned = set()
        if self._in_thought and self.demands:
            banned = self._control.end | {self._control.call_start}
        elif self._no_calls:
            banned = {self._control.call_start}
        if self._budget is not None and self._thought >= self._budget:
            banned = banned | {self._control.think_start}
        banned = sorted(t for t in banned if t is not None)
        return logits.at[:, mx.array(banned)].add(-mx.inf) if banned else logits

    def ends(self, token: int) -> bool:
        """Whether a picked token ends the answer."""
        return token in self._control.end

    def accept(self, token: int) -> list[int]:
        """Take the next token; the tokens that now follow without an alternative, taken too."""
        if self._matcher is not None:
            return self._consume([token])
        control = self._control
        if self._in_thought:
            if token == control.think_end:
                self._in_thought = False
                return [*self._blank_line, *self._begin_answer()] if self.demands else []
            self._thought += 1
            spent = self._budget is not None and self._thought >= self._budget
            return self._close_thought() if spent else []
        if token == control.think_start:
            self._in_thought = True
        elif token == control.call_start and self._call is not None:
            forced = self._begin(self._call)
            self._follow([token, *forced])
            return forced
        return []

    def _begin_answer(self) -> list[int]:
        return [] if self._whole is None else self._begin(self._whole)

    def _begin(self, lark: str) -> list[int]:
        self._matcher = self._matchers.new(lark)
        self._guard = NumberGuard() if self._guarded else None
        return self._consume([])

    def _close_thought(self) -> list[int]:
        self._in_thought = False
        closing = [*self._newline, self._control.think_end, *self._blank_line]
        return closing + self._begin_answer()

    def _consume(self, tokens: list[int]) -> list[int]:
        """Feed tokens to the matcher, then what it forces; the latter."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise self._broken("a masked token was sampled")
        forced = []
        while not self._matcher.is_stopped() and (more := self._matcher.compute_ff_tokens()):
            self._matcher.consume_tokens(more)
            forced += more
        if self._matcher.is_error():
            raise self._broken("the grammar failed")
        self._follow([*tokens, *forced])
        if self._matcher.is_stopped():
            # The end of all, or of one call among text.
            self.finished = self.demands or not self._parallel
            self._matcher = None
        return forced

    def _broken(self, what: str) -> Exception:
        error = self._matcher.get_error()[:500]
        # Its stop reason does not say so.
        if "; max is " in error:
            return SettingError(
                f"the schemas or the grammar are too large to be enforced ({error}): ask for "
                "less at a time"
            )
        return RuntimeError(f"{what}: {error}")

    def _follow(self, tokens: list[int]) -> None:
        """Tell the guard what came."""
        if self._guard is None:
            return
        if tokens and tokens[0] == self._control.call_start:
            coder = self._control.style == "qwen3_coder"
            self._guard = NumberGuard(self._tools if coder else None)
        self._guard.feed(self._matchers.text(tokens))


def _grammars(
    request: Request,
    tools: dict[str, Tool],
    document: grammars.Document | None,
    control: Control,
) -> tuple[str | None, str | None]:
    """Lark grammars: (for the whole answer, for a call from after its start marker)."""
    if not request.constrain:
        return None, None
    choice = request.tool_choice
    rules, starts = "", []
    if tools and choice != "none":
        chosen = {choice: tools[choice]} if choice in tools else tools
        markers = control.call_start, control.call_end
        rules = call_grammars.calls_rules(chosen, control.style, *markers)
        if document is None and choice == "auto":
            return None, f"start: body\n{rules}"
        more = request.parallel_tool_calls and choice not in tools
        starts.append('call ("\\n" call)*' if more else "call")
    if document is not None and (choice in ("auto", "none") or not tools):
        starts.append("document")
        rules += document.rules
    return (f"start: {' | '.join(starts)}\n{rules}", None) if starts else (None, None)
