"""The tokens that steer a conversation: they open and close thoughts and calls, and end answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .tool_parsers import FORMATS


@dataclass(frozen=True)
class Control:
    """Token ids of a tokenizer; None where it has no such token.

    Attributes:
        think_start, think_end, call_start, call_end: the markers.
        end: tokens that end an answer.
        silent: tokens that are no text: all markers, turn starts, padding.
        style: the key of `tool_formats.FORMATS` for calls, or None.
    """

    think_start: int | None
    think_end: int | None
    call_start: int | None
    call_end: int | None
    end: frozenset[int]
    silent: frozenset[int]
    style: str | None

    @classmethod
    def of(cls, tokenizer) -> Control:
        """From mlx-lm's wrapper, which infers the markers and the format of calls."""

        def one(tokens) -> int | None:
            # Markers of several tokens belong to families that we do not run.
            return tokens[0] if tokens is not None and len(tokens) == 1 else None

        thinks = one(tokenizer.think_start_tokens), one(tokenizer.think_end_tokens)
        calls = one(tokenizer.tool_call_start_tokens), one(tokenizer.tool_call_end_tokens)
        style = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
        style = style if style in FORMATS and None not in calls else None
        added = tokenizer.get_added_vocab()
        silent = {i for text, i in added.items() if re.fullmatch(r"<\S*>", text)}
        return cls(
            *(thinks if None not in thinks else (None, None)),
            *(calls if style else (None, None)),
            end=frozenset(tokenizer.eos_token_ids),
            silent=frozenset(silent | set(tokenizer.all_special_ids)),
            style=style,
        )
