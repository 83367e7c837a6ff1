"""Check that a tokenizer.json does not make texts or tokens that are out of all proportion.

| part of tokenizer.json             | bound                                                      |
|------------------------------------|------------------------------------------------------------|
| text of a token                    | MAX_TOKEN_CHARACTERS                                       |
| Replace, Prepend of the normalizer | the text is at most MAX_GROWTH times as long, all together |
| templates of the post_processor    | MAX_PIECES pieces each                                     |

A few words would fill the memory otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import show

#: Real vocabularies have runs of some hundred spaces or dashes.
MAX_TOKEN_CHARACTERS = 4096
#: Real normalizers put one character in the place of another.
MAX_GROWTH = 1000
MAX_PIECES = 64
#: The most characters that a form of Unicode makes of one.
_UNICODE = 18


def check_growth(backend: Any, where: Path) -> None:
    """Check the parts of a tokenizer that make a text longer.

    Args:
        backend: the tokenizer of the package tokenizers; others have no such parts.
        where: the file, for errors.

    Raises:
        CheckpointError: names file, part and value.
    """
    normalizer = _state(backend, "normalizer")
    if normalizer is not None and (growth := _growth(normalizer)) > MAX_GROWTH:
        raise CheckpointError(
            f"{where} has normalizer {show(normalizer)}, which makes a text up to {growth:.3g} "
            f"times as long: at most {MAX_GROWTH} is allowed; download it again"
        )
    for name, pieces in _templates(_state(backend, "post_processor") or {}):
        if len(pieces) > MAX_PIECES:
            raise CheckpointError(
                f"{where} has post_processor.{name} with {len(pieces)} pieces: at most "
                f"{MAX_PIECES} are allowed; download it again"
            )


def check_token(text: str | bytes, token: int, where: Path) -> None:
    """Check the length of a token's text."""
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{where} has token {token}, {show(text)}, of {len(text)} characters: at most "
            f"{MAX_TOKEN_CHARACTERS} are allowed; download it again"
        )


def _state(backend: Any, name: str) -> dict | None:
    part = getattr(backend, name, None)
    state = None if part is None else json.loads(part.__getstate__())
    return state if isinstance(state, dict) else None


def _growth(normalizer: dict) -> float:
    kind = normalizer.get("type")
    if kind == "Sequence":
        growth = 1.0
        for part in normalizer.get("normalizers", []):
            growth *= _growth(part)
        return growth
    if kind == "Replace":
        pattern, content = normalizer.get("pattern", {}), normalizer.get("content", "")
        # A regular expression may match nothing, before and after each character.
        text = pattern.get("String")
        return max(1.0, len(content) / len(text)) if text else 1.0 + len(content)
    if kind == "Prepend":
        return 1.0 + len(normalizer.get("prepend", ""))
    return _UNICODE if kind in ("NFKC", "NFKD") else 1.0


def _templates(processor: dict) -> list[tuple[str, list]]:
    found = [(name, processor[name]) for name in ("single", "pair") if name in processor]
    for inner in processor.get("processors", []):
        found += _templates(inner)
    return found
