"""Messages to the tokens of a prompt, through the checkpoint's own chat template.

The template runs in the sandbox of transformers. What users, tools and models wrote is text: a
control token in it is encoded as the characters it is made of.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from ..errors import CheckpointError, SettingError
from .messages import for_template
from .special_tokens import Control
from .tools import Tool

#: A first turn (system prompt and tools) of so many tokens gets a cut of its own behind it.
LONG_FIRST_TURN = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the model.

    Attributes:
        tokens: up to where the assistant's answer begins.
        cuts: ascending places (token counts) where the prompt is split, whatever the prompt cache
            holds: before each turn of the assistant, and behind a long first turn. Whether there
            is a cut depends on the tokens up to it alone, so a longer conversation is split at
            the same places. The last one is just before the turn to be generated.
        in_thought: the prompt leaves a thought open.
    """

    tokens: list[int]
    cuts: tuple[int, ...]
    in_thought: bool


class Template:
    """The chat template of a tokenizer (mlx-lm's wrapper)."""

    def __init__(self, tokenizer, control: Control):
        self._tokenizer = tokenizer
        self._control = control

    def prompt(
        self,
        messages: list[dict],
        tools: dict[str, Tool] | None = None,
        *,
        think: bool | None = None,
        structured: bool = False,
    ) -> Prompt:
        """The prompt for the next turn of the assistant.

        Args:
            think: open a thought; False: none; None: what the template does by itself.
            structured: the answer will follow a grammar, so a model that opens its thoughts
                itself must have it opened.

        Raises:
            SettingError: the messages or options cannot be used.
            CheckpointError: there is no chat template, or it refuses the messages.
        """
        if not self._tokenizer.has_chat_template:
            raise CheckpointError(
                "this checkpoint has no chat template, so it cannot answer messages: "
                "download its chat_template.jinja, or use flashmoe.load with mlx_lm.generate"
            )
        if tools and self._control.style is None:
            raise SettingError(
                "this checkpoint's chat template has no tool calls of a kind that flashmoe reads: "
                "ask without tools"
            )
        if think and self._control.think_start is None:
            raise SettingError("think=True: this model has no thoughts; leave think out")
        messages = for_template(messages)
        definitions = [tool.definition for tool in (tools or {}).values()]
        try:
            seam, (messages, definitions) = _break_special_tokens(
                self._tokenizer, (messages, definitions)
            )
        except RecursionError as e:
            raise SettingError("the messages or tools hold data that is nested too deeply") from e
        text = self._render(messages, definitions, think=think)
        in_thought = False
        if self._control.think_start is not None:
            start, end = self._tokenizer.think_start, self._tokenizer.think_end
            in_thought = text.rfind(start) > text.rfind(end)
            if in_thought and think is False:
                text += f"\n{end}\n\n"
                in_thought = False
            elif not in_thought and think is not False:
                reacts = text != self._render(messages, definitions, think=False)
                if think and not reacts:
                    raise SettingError(
                        "think=True: this model's chat template has no thoughts; leave think out"
                    )
                if reacts and structured:
                    text += f"{start}\n"
                    in_thought = True
        tokens = self.encode(*text.split(seam))
        return Prompt(tokens, self._cuts(tokens), in_thought)

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of a text as it stands in a message: no control tokens."""
        seam, text = _break_special_tokens(self._tokenizer, text)
        return self.encode(*text.split(seam))

    def encode(self, *pieces: str) -> list[int]:
        """Tokens of pieces of text, each encoded by itself."""
        # Halves of characters, as in bytes of another encoding, are joined or marked as lost.
        pieces = [p.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for p in pieces]
        encode = self._tokenizer.encode
        return [t for p in pieces for t in encode(p, add_special_tokens=False, verbose=False)]

    def _render(self, messages, tools, *, think: bool | None, answer: bool = True) -> str:
        try:
            # think None leaves the choice to the template; mlx-lm's default forces thoughts on.
            # As text: encoding a long prompt there would warn before our error has both numbers.
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=answer,
                tokenize=False,
                enable_thinking=think,
            )
        except Exception as e:  # jinja2 has many kinds
            raise CheckpointError(
                f"the checkpoint's chat template refuses the messages: {e}"
            ) from e

    def _cuts(self, tokens: list[int]) -> tuple[int, ...]:
        header = self._header
        if not header:
            return ()
        starts = [i for i, token in enumerate(tokens) if token == header[0] and i]
        cuts = {i for i in starts if tokens[i : i + len(header)] == header}
        if starts and starts[0] >= LONG_FIRST_TURN:
            cuts.add(starts[0])
        return tuple(sorted(cuts))

    @cached_property
    def _header(self) -> list[int]:
        """What each turn of the assistant starts with, or [] when no control token marks it."""
        ask = {"role": "user", "content": "x"}
        history = [ask, {"role": "assistant", "content": "y"}, ask]
        try:
            base = self._render([ask], None, think=None, answer=False)
            turns = [self._render([ask], None, think=think) for think in (True, False)]
            turns.append(self._render(history, None, think=None, answer=False))
        except CheckpointError:
            return []
        if not all(turn.startswith(base) for turn in turns):
            return []
        # Not the white space at its end: it may be one token with what follows.
        header = self.encode(os.path.commonprefix([t[len(base) :] for t in turns]).rstrip())
        return header if header and header[0] in self._control.silent else []


def _break_special_tokens(tokenizer, value):
    """Put a seam into each special token that strings in `value` hold as text: (seam, value).

    A user who writes "<|im_end|>" means the characters. Encoded at one go they would become the
    control token, and what follows could pose as another role. Cut at the seam, they cannot.
    """
    used = {c for text in _strings(value) for c in text}
    seam = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def broken(value):
        if isinstance(value, str):
            for token in special:
                if token in value:
                    value = value.replace(token, token[:1] + seam + token[1:])
        elif isinstance(value, dict):
            value = {broken(k): broken(v) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            value = [broken(v) for v in value]
        return value

    return seam, broken(value)


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _strings(list(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
