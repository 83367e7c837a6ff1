"""Check that a tokenizer.json does not make texts or tokens that are out of all proportion.

| part of tokenizer.json             | bound                                                      |
|------------------------------------|------------------------------------------------------------|
| text of a token                    | MAX_TOKEN_CHARACTERS                                       |
| normalizer, decoder                | the text is at most MAX_GROWTH times as long, all together |
| templates of the post_processor    | MAX_PIECES pieces each                                     |

A few words would fill the memory otherwise.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
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
    """Check the parts of a tokenizer that make a text longer, before any text goes through them.

    Args:
        backend: the tokenizer of the package tokenizers; others have no such parts.
        where: the file, for errors.

    Raises:
        CheckpointError: names file, part and value.
    """
    for name in ("normalizer", "decoder"):
        part = _state(backend, name)
        if part is not None and (growth := _growth(part)) > MAX_GROWTH:
            raise CheckpointError(
                f"{where} has {name} {show(part)}, which makes a text up to {growth:.3g} times as "
                f"long: at most {MAX_GROWTH} is allowed; download it again"
            )
    for name, pieces in _templates(_state(backend, "post_processor") or {}):
        if len(pieces) > MAX_PIECES:
            raise CheckpointError(
                f"{where} has post_processor.{name} with {len(pieces)} pieces: at most "
                f"{MAX_PIECES} are allowed; download it again"
            )


def check_lengths(texts: Iterable[str | bytes | None], where: Path) -> None:
    """Check the lengths of the texts of tokens; None is no token.

    Raises:
        CheckpointError: names the file and the text.
    """
    longest = max(filter(None, texts), key=len, default="")
    if len(longest) > MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"{where} has a token {show(longest)} of {len(longest)} characters: at most "
            f"{MAX_TOKEN_CHARACTERS} are allowed; download it again"
        )


def _state(backend: Any, name: str) -> dict | None:
    part = getattr(backend, name, None)
    state = None if part is None else json.loads(part.__getstate__())
    return state if isinstance(state, dict) else None


def _growth(part: dict) -> float:
    """Return how many times as long a normalizer or decoder can make a text."""
    kind = part.get("type")
    if kind == "Sequence":
        growth = 1.0
        for inner in part.get("normalizers") or part.get("decoders") or []:
            growth *= _growth(inner)
        return growth
    if kind == "Replace":
        pattern, content = part.get("pattern", {}), part.get("content", "")
        # A regular expression may match nothing, before and after each character.
        text = pattern.get("String")
        return max(1.0, len(content) / len(text)) if text else 1.0 + len(content)
    if kind == "Prepend":
        return 1.0 + len(part.get("prepend", ""))
    if kind == "Precompiled":
        # A trie, its length before it, and the texts that it leads to, each ended by a zero.
        data = base64.b64decode(part.get("precompiled_charsmap") or "")
        texts = data[4 + int.from_bytes(data[:4], "little") :]
        return 1.0 + max(map(len, texts.split(b"\0")))
    return _UNICODE if kind in ("NFKC", "NFKD") else 1.0


def _templates(processor: dict) -> list[tuple[str, list]]:
    found = [(name, processor[name]) for name in ("single", "pair") if name in processor]
    for inner in processor.get("processors", []):
        found += _templates(inner)
    return found
