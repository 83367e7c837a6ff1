"""Messages to tokens, and generated text to events. Knows templates, not models."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_lm.generate import TextStateMachine

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
    try:
        # enable_thinking=None leaves the choice to the template; mlx-lm's default forces it on.
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=None
        )
    except Exception as e:  # jinja2 has many kinds
        raise CheckpointError(f"the checkpoint's chat template refuses the messages: {e}") from e


class Reply:
    """Splits generated text into answer and thought, without their markers; ends at stop strings.

    Attributes:
        stopped: a stop string was met: nothing more is to be generated.
        reasoning: the current text belongs to a thought.
    """

    def __init__(self, tokenizer, prompt: list[int], stop: tuple[str, ...]):
        transitions: dict[str, list[tuple[str, str | None]]] = {"answer": []}
        initial = "answer"
        if tokenizer.has_thinking:
            transitions["answer"].append((tokenizer.think_start, "thought"))
            transitions["thought"] = [(tokenizer.think_end, "answer")]
            # A template may open the thought itself, or open and close an empty one.
            if tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt):
                initial = "thought"
        transitions["answer"] += [(text, None) for text in stop]
        self._machine = TextStateMachine(transitions)
        self._state = self._machine.make_state(initial)
        self._started = {"answer": False, "thought": False}
        self.stopped = False

    @property
    def reasoning(self) -> bool:
        return self._state[0] == "thought"

    def feed(self, text: str) -> Iterator[Text | Reasoning]:
        """Events for the next piece of text; what may still be part of a marker is held back."""
        self._state, segments = self._machine.split(self._state, text)
        for name, piece in segments:
            if name is None:
                self.stopped = True
                return
            yield from self._event(name, piece)

    def flush(self) -> Iterator[Text | Reasoning]:
        """Events for the text held back, when generation has ended."""
        if not self.stopped:
            self._state, piece, name = self._machine.flush(self._state)
            yield from self._event(name, piece)

    def _event(self, name: str, piece: str) -> Iterator[Text | Reasoning]:
        if not self._started[name]:
            # Templates put newlines around the markers; they are no part of the text.
            piece = piece.lstrip("\n")
        if piece:
            self._started[name] = True
            yield (Text if name == "answer" else Reasoning)(piece)
