"""Build prompts for the text between two texts, as editors ask for it (fill in the middle)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint.json_files import show
from ..errors import SettingError

#: The special tokens before the first text, before the text after the gap, and at the end.
_MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)


def infill_tokens(
    tokenizer: Any, encode: Callable[[str], list[int]], prefix: str, suffix: str
) -> list[int]:
    """Return the tokens of a prompt that asks for the text between `prefix` and `suffix`.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        encode: returns the tokens of a text without special tokens.

    Raises:
        SettingError: the tokenizer has no such special tokens.
    """
    vocabulary = tokenizer.get_added_vocab()
    for before, after, end in _MARKERS:
        if {before, after, end} <= vocabulary.keys():
            first = [vocabulary[before], *encode(prefix)]
            return [*first, vocabulary[after], *encode(suffix), vocabulary[end]]
    raise SettingError(
        f"suffix={show(suffix)} cannot be used: this model's tokenizer has no tokens to fill in "
        "the middle: leave it out"
    )
