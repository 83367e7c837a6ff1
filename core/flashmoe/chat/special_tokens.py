"""Find the special tokens that open and close reasoning and tool calls, and end answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .tool_parsers import TOOL_PARSERS


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens of a tokenizer; None where it has no such token.

    Attributes:
        think_start, think_end: the markers around reasoning: both are there, or neither.
        call_start, call_end: the markers around a tool call: both are there, or neither.
        answer_end: the tokens that end an answer.
        non_text: the tokens that are never shown as text: all markers, starts of turns, padding.
        tool_parser: the key in `tool_parsers.TOOL_PARSERS` of the format of tool calls, or None if
            there is no parser for the format, or the model has no tool calls.
    """

    think_start: int | None
    think_end: int | None
    call_start: int | None
    call_end: int | None
    answer_end: frozenset[int]
    non_text: frozenset[int]
    tool_parser: str | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SpecialTokens:
        """Read the special tokens of mlx-lm's TokenizerWrapper, which infers the markers."""

        def single(tokens: tuple[int, ...] | None) -> int | None:
            # Markers of several tokens belong to model families that flashmoe does not run.
            return tokens[0] if tokens is not None and len(tokens) == 1 else None

        thinks = single(tokenizer.think_start_tokens), single(tokenizer.think_end_tokens)
        calls = single(tokenizer.tool_call_start_tokens), single(tokenizer.tool_call_end_tokens)
        # mlx-lm's wrapper keeps its parser as a function, in a module named for the format.
        name = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
        tool_parser = name if name in TOOL_PARSERS and None not in calls else None
        added = tokenizer.get_added_vocab()
        markers = {i for text, i in added.items() if re.fullmatch(r"<\S*>", text)}
        return cls(
            *(thinks if None not in thinks else (None, None)),
            *(calls if tool_parser else (None, None)),
            answer_end=frozenset(tokenizer.eos_token_ids),
            non_text=frozenset(markers | set(tokenizer.all_special_ids)),
            tool_parser=tool_parser,
        )
