"""Count tokens as the model will count them, without loading it."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import CheckpointError, SettingError
from .infill import infill_tokens
from .special_tokens import SpecialTokens
from .template import ChatTemplate
from .tools import Tool, read_tools

_FILLER = {"role": "user", "content": "x"}


class TokenCounter:
    """Counts tokens for the checkpoint in a directory; may be called from any thread.

    It has a tokenizer of its own, since the engine's tokenizer belongs to the engine's thread.

    Raises:
        CheckpointError: there is no tokenizer that can be read.
    """

    def __init__(self, path: Path):
        tokenizer = read_tokenizer(Checkpoint.open(path))
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, SpecialTokens.from_tokenizer(tokenizer))
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text as it is encoded in a message."""
        with self._lock:
            return self._template.encode_text(text)

    def infill(self, prefix: str, suffix: str) -> list[int]:
        """Return the tokens of a prompt that asks for the text between two texts.

        Raises:
            SettingError: the tokenizer has no special tokens for that.
        """
        with self._lock:
            return infill_tokens(self._tokenizer, self._template.encode_text, prefix, suffix)

    def count(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        think: bool | None = None,
        variables: dict | None = None,
    ) -> int:
        """Return the number of tokens of messages and tools, with the chat template.

        For a conversation that can be answered, that is the length of its prompt
        (`End.prompt_tokens`). For any other part of a conversation, it is the number of tokens that
        the part adds to a prompt when a message of the user follows.

        Raises:
            SettingError: a message or tool cannot be used.
        """
        checked = read_tools(tools or [])
        if not messages and not checked:
            return 0

        def prompt_length(messages: list[dict], tools: dict[str, Tool]) -> int:
            build = self._template.build_prompt
            return len(build(messages, tools, think=think, variables=variables).tokens)

        with self._lock:
            try:
                return prompt_length(messages, checked)
            except (SettingError, CheckpointError):
                return prompt_length([*messages, _FILLER], checked) - prompt_length([_FILLER], {})


@lru_cache(maxsize=2)
def token_counter(path: Path) -> TokenCounter:
    """Return the token counter of a checkpoint, created on first use; two are kept."""
    return TokenCounter(path)
