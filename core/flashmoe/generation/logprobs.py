"""Report the log probabilities of the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..events import Logprobs, TokenLogprob
from .sampling import Sampled


class LogprobReporter:
    """Makes the events of one answer that tell how probable its tokens were.

    Events wait here until it is known whether their tokens belong to the text: those of a stop
    string do not.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._waiting: list[Logprobs] = []

    def add(self, sampled: Sampled) -> None:
        """Add a token of the text."""
        own = self._token(sampled.token, sampled.logprob or 0.0)
        top = tuple(self._token(token, value) for token, value in sampled.top)
        self._waiting.append(Logprobs(own, top))

    def take(self) -> Sequence[Logprobs]:
        """Return the events that waited."""
        taken, self._waiting = self._waiting, []
        return taken

    def _token(self, token: int, logprob: float) -> TokenLogprob:
        data = token_bytes(self._tokenizer, token)
        return TokenLogprob(data.decode(errors="replace"), data, logprob)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for, which may be a part of a character."""
    written = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(written, str):  # an id that the model has and the tokenizer has not
        return b""
    byte_level = isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)
    if byte_level and token not in _added(tokenizer):
        table = _bytes()
        return b"".join(bytes([table[c]]) if c in table else c.encode() for c in written)
    return tokenizer.decode([token]).encode()


def _added(tokenizer: Any) -> set[int]:
    return set(tokenizer.get_added_vocab().values())


@lru_cache(maxsize=1)
def _bytes() -> dict[str, int]:
    """The bytes that the characters of tokens of a byte-level tokenizer stand for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
