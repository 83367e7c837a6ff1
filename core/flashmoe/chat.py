"""Messages to tokens, and generated text to events. Knows templates, not models."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import CheckpointError, SettingError
from .events import Reasoning, Text


def render(tokenizer, messages: list[dict]) -> list[int]:
    """The prompt of a conversation, up to where the assistant's answer begins.

    Raises:
        SettingError: there is nothing to answer.
        CheckpointError: the checkpoint has no chat template, or it refuses the messages.
    """
    if not messages or not str(messages[-1].get("content") or "").strip():
        raise SettingError("the prompt is empty: give the model something to answer")
    if not tokenizer.has_chat_template:
        raise CheckpointError(
            "this checkpoint has no chat template, so it cannot answer messages: "
            "download its chat_template.jinja, or use flashmoe.load with mlx_lm.generate"
        )
    seam, messages = _break_special_tokens(tokenizer, messages)
    try:
        # enable_thinking=None leaves the choice to the template; mlx-lm's default forces it on.
        # As text first: encoding a long prompt there would warn before our error has both numbers.
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=None
        )
        pieces = text.split(seam)
        return [
            token
            for piece in pieces
            for token in tokenizer.encode(piece, add_special_tokens=False, verbose=False)
        ]
    except Exception as e:  # jinja2 has many kinds
        raise CheckpointError(f"the checkpoint's chat template refuses the messages: {e}") from e


def _break_special_tokens(tokenizer, messages: list[dict]) -> tuple[str, list[dict]]:
    """Put a seam into each special token that a message holds as text: (seam, messages).

    A user who writes "<|im_end|>" means the characters. Encoded at one go they would become the
    control token, and what follows could pose as another role. Cut at the seam, they cannot.
    """
    text = "".join(str(v) for message in messages for v in message.values())
    seam = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def broken(value):
        if isinstance(value, str):
            for token in special:
                value = value.replace(token, token[:1] + seam + token[1:])
        return value

    return seam, [{k: broken(v) for k, v in message.items()} for message in messages]


class Reply:
    """Splits generated text into answer and thought, without their markers; ends at stop strings.

    Attributes:
        stopped: a stop string was met: nothing more is to be generated.
        reasoning: the current text belongs to a thought.
    """

    def __init__(self, tokenizer, prompt: list[int], stop: tuple[str, ...]):
        # Text that ends the current kind of text -> the kind that follows; None ends the reply.
        self._markers: dict[str, dict[str, str | None]] = {
            "answer": dict.fromkeys(stop),
            "thought": {},
        }
        self._kind = "answer"
        if tokenizer.has_thinking:
            self._markers["answer"][tokenizer.think_start] = "thought"
            self._markers["thought"][tokenizer.think_end] = "answer"
            # A template may open the thought itself, or open and close an empty one.
            if tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
                self._kind = "thought"
        self._held = ""
        self._started = {"answer": False, "thought": False}
        self.stopped = False

    @property
    def reasoning(self) -> bool:
        return self._kind == "thought"

    def feed(self, text: str) -> Iterator[Text | Reasoning]:
        """Events for the next piece of text; what may still become a marker is held back."""
        self._held += text
        while not self.stopped:
            markers = self._markers[self._kind]
            found = [(self._held.find(m), -len(m), m) for m in markers if m in self._held]
            if not found:
                cut = len(self._held) - self._may_become(markers)
                ready, self._held = self._held[:cut], self._held[cut:]
                yield from self._event(ready)
                return
            at, _, marker = min(found)  # the first one; of those the longest
            ready, self._held = self._held[:at], self._held[at + len(marker) :]
            yield from self._event(ready)
            if markers[marker] is None:
                self.stopped = True
            else:
                self._kind = markers[marker]

    def flush(self) -> Iterator[Text | Reasoning]:
        """Events for the text held back, when generation has ended."""
        if not self.stopped:
            ready, self._held = self._held, ""
            yield from self._event(ready)

    def _may_become(self, markers) -> int:
        """Length of the longest end of the held text that a marker starts with."""
        longest = max((len(m) for m in markers), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(m.startswith(self._held[-size:]) for m in markers):
                return size
        return 0

    def _event(self, piece: str) -> Iterator[Text | Reasoning]:
        if not self._started[self._kind]:
            # Templates put newlines around the markers; they are no part of the text.
            piece = piece.lstrip("\n")
        if piece:
            self._started[self._kind] = True
            yield (Text if self._kind == "answer" else Reasoning)(piece)
