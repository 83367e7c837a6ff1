"""Tokens counted as the model will count them, without loading it. From any thread."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import CheckpointError, SettingError
from .special_tokens import SpecialTokens
from .template import ChatTemplate
from .tools import read_tools

_FILLER = {"role": "user", "content": "x"}


class Counter:
    """Of the checkpoint in a directory. Has a tokenizer of its own: the engine's belongs to its
    thread.

    Raises:
        CheckpointError: there is no tokenizer that can be read.
    """

    def __init__(self, path: Path):
        tokenizer = read_tokenizer(Checkpoint.open(path))
        self._template = ChatTemplate(tokenizer, SpecialTokens.from_tokenizer(tokenizer))
        self._lock = threading.Lock()

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text that stands in a message."""
        with self._lock:
            return self._template.text_tokens(text)

    def count(
        self, messages: list[dict], tools: list[dict] | None = None, think: bool | None = None
    ) -> int:
        """Tokens of messages and tools through the chat template.

        A conversation that can be answered counts as its prompt does (`End.prompt_tokens`); any
        other part of one as much as it adds to the prompt before a message of the user.

        Raises:
            SettingError: a message or tool cannot be used.
        """
        known = read_tools(tools or [])
        if not messages and not known:
            return 0

        def prompt(messages, tools):
            return len(self._template.build_prompt(messages, tools, think=think).tokens)

        with self._lock:
            try:
                return prompt(messages, known)
            except (SettingError, CheckpointError):
                return prompt([*messages, _FILLER], known) - prompt([_FILLER], {})


@lru_cache(maxsize=2)
def counter(path: Path) -> Counter:
    """The counter of a checkpoint, made on first use."""
    return Counter(path)
