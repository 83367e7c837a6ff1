"""Turn messages into the tokens of a prompt, with the checkpoint's own chat template.

The template runs in the sandbox of transformers, in a helper process with limits. What users, tools
and models wrote is text: a special token in it is encoded as the characters that it consists of.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..bounded import calls
from ..errors import CheckpointError, LimitError, SettingError
from .messages import THINK, fold_system_messages, normalize_messages
from .rendering import render
from .special_tokens import SpecialTokens
from .tools import Tool

#: A first turn (system prompt and tools) of at least this many tokens is followed by its own cut.
LONG_FIRST_TURN = 64
#: Characters of a text that takes a processor for long: such texts are encoded one after the other.
LONG_TEXT = 500_000
#: Processor seconds for rendering a prompt.
RENDER_SECONDS = 3.0


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the model.

    Attributes:
        tokens: all tokens up to the start of the assistant's answer.
        cuts: ascending places (token counts) where prefill splits the prompt, whatever the prompt
            cache holds: before each turn of the assistant, and after a long first turn. Whether
            there is a cut at a place depends only on the tokens up to it, so a longer conversation
            is split at the same places. The last cut is just before the turn to be generated.
        in_reasoning: the prompt ends inside reasoning.
        continues: the prompt ends inside a turn of the assistant that has begun.
    """

    tokens: list[int]
    cuts: tuple[int, ...]
    in_reasoning: bool
    continues: bool = False


class ChatTemplate:
    """Renders prompts with the chat template of a tokenizer, on any thread.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        special: the special tokens of the tokenizer.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens):
        self._tokenizer = tokenizer
        self._special = special
        self._long = threading.Lock()

    def build_prompt(
        self,
        messages: list[dict],
        tools: dict[str, Tool] | None = None,
        *,
        think: bool | None = None,
        structured: bool = False,
        variables: dict[str, Any] | None = None,
        continue_last: bool = True,
    ) -> Prompt:
        """Return the prompt for the next turn of the assistant, or for the rest of its last one.

        Args:
            messages: the conversation; see `flashmoe.chat.messages`.
            tools: the tools that the model may call, by name.
            think: True opens reasoning, False closes it, and None leaves that to the template.
            structured: the answer will follow a grammar. The grammar begins after the reasoning,
                so for a model that opens reasoning by itself the prompt must open it.
            variables: more variables for the template.
            continue_last: go on with the last message if it is the assistant's own. A turn that has
                called tools is complete, and so is one before an answer that is structured.

        Raises:
            SettingError: the messages or options cannot be used.
            CheckpointError: there is no chat template, or it refuses the messages.
        """
        if not self._tokenizer.has_chat_template:
            raise CheckpointError(
                "this checkpoint has no chat template, so it cannot answer messages: "
                "download its chat_template.jinja, or use flashmoe.load with mlx_lm.generate"
            )
        if tools and self._special.tool_parser is None:
            raise SettingError(
                "this checkpoint's chat template has no tool calls in a format that flashmoe can "
                "parse: leave tools out"
            )
        if think and self._special.think_start is None:
            raise SettingError("think=True: this model does not reason; leave think out")
        messages = normalize_messages(messages, self._think_markers)
        if any(m["role"] == "system" for m in messages[1:]) and not self._keeps_system_messages:
            messages = fold_system_messages(messages)
        definitions = [tool.definition for tool in (tools or {}).values()]
        try:
            seam, (messages, definitions, variables) = _break_special_tokens(
                self._tokenizer, (messages, definitions, variables or {})
            )
        except RecursionError as e:
            raise SettingError(
                "the messages or tools have data that is nested too deeply: use flatter data"
            ) from e
        begun = None
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]  # nothing was said
        if continue_last and not structured and _can_go_on(messages[-1]):
            *messages, begun = messages
            # A thought that was cut off goes on; after a text it is too late to begin one.
            think = think if begun.get("reasoning_content") and not begun["content"] else False
        may_reason = self._special.think_start is not None and think is not False
        thinks = [think, False] if may_reason else [think]
        text, *without = self._render([messages] * len(thinks), definitions, thinks, variables)
        in_reasoning = False
        if self._special.think_start is not None:
            start, end = self._think_markers
            in_reasoning = text.rfind(start) > text.rfind(end)
            if in_reasoning and think is False:
                text += f"\n{end}\n\n"
                in_reasoning = False
            elif not in_reasoning and think is not False:
                responds = text != without[0]
                if think and not responds:
                    raise SettingError(
                        "think=True: this model's chat template has no reasoning; leave think out"
                    )
                if responds and structured:
                    text += f"{start}\n"
                    in_reasoning = True
        if begun is not None:
            text, in_reasoning = self._go_on(text, begun)
        tokens = self.encode(*text.split(seam))
        if not tokens:
            raise CheckpointError(
                "the checkpoint's chat template writes nothing for these messages: download it "
                "again"
            )
        return Prompt(tokens, self._find_cuts(tokens), in_reasoning, begun is not None)

    @property
    def _think_markers(self) -> tuple[str, str]:
        """What the model writes around its thoughts."""
        if self._special.think_start is None:
            return THINK
        return self._tokenizer.think_start, self._tokenizer.think_end

    def _go_on(self, text: str, begun: dict[str, Any]) -> tuple[str, bool]:
        """Return a prompt with the turn that has begun, and whether it ends inside reasoning.

        Args:
            text: the prompt up to the turn, and how the template begins a turn without reasoning.
        """
        thought, content = begun.get("reasoning_content"), begun["content"]
        start, end = self._think_markers
        turn = self._turn_start[1].partition(start)[0]
        if not thought or not turn or self._special.think_start is None:
            return text + content, False
        before = f"{text[: text.rindex(turn)]}{turn}{start}\n{thought}"
        # The model was cut off inside its thought, or has closed it.
        return (f"{before}\n{end}\n\n{content}", False) if content else (before, True)

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text as it is encoded in a message: without special tokens."""
        seam, broken = _break_special_tokens(self._tokenizer, text)
        return self.encode(*broken.split(seam))

    def raw_prompt(self, prompt: str | Sequence[int]) -> Prompt:
        """Return a prompt that is not rendered: a text, in which special tokens count, or tokens.

        Raises:
            SettingError: it is empty, or has tokens that the model does not have.
        """
        tokens = [*prompt] if not isinstance(prompt, str) else []
        if isinstance(prompt, str):
            text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            with self._long if len(text) > LONG_TEXT else nullcontext():
                tokens = self._tokenizer.encode(text, verbose=False)
        if not tokens:
            raise SettingError("the prompt is empty: give a text that the model can continue")
        wrong = [t for t in tokens if not 0 <= t < len(self._tokenizer)]
        if wrong:
            raise SettingError(
                f"prompt=[{wrong[0]}] is no token: this model's tokens are 0 to "
                f"{len(self._tokenizer) - 1}"
            )
        return Prompt(tokens, (), False)

    def encode(self, *pieces: str) -> list[int]:
        """Return the tokens of pieces of text, each of them encoded by itself."""
        # Lone surrogates, as from bytes of another encoding, are joined to pairs or replaced.
        texts = [p.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for p in pieces]
        encode = self._tokenizer.encode
        with self._long if sum(map(len, texts)) > LONG_TEXT else nullcontext():
            return [t for p in texts for t in encode(p, add_special_tokens=False, verbose=False)]

    def _render(
        self,
        conversations: list[list[dict]],
        tools: list[dict] | None,
        thinks: list[bool | None],
        variables: dict[str, Any] | None = None,
        *,
        answer: bool = True,
    ) -> list[str]:
        """Return the texts of conversations, all within one limit of time.

        They are not encoded here: for a long prompt that would print a warning before our
        ContextError, which has both numbers, is raised.

        Args:
            thinks: whether to reason, for each of them. None leaves the choice to the template;
                mlx-lm's default forces reasoning on.
            variables: more variables, for all of them.
            answer: end with the beginning of the assistant's turn.
        """
        tokenizer = self._tokenizer
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        fixed = {**(variables or {}), **special, "add_generation_prompt": answer}
        try:
            source = tokenizer.get_chat_template(tools=tools or None)
            all_variables = [{**fixed, "enable_thinking": think} for think in thinks]
            arguments = source, conversations, tools or None, all_variables
            return calls.call(render, *arguments, seconds=RENDER_SECONDS, group=calls.TEMPLATES)
        except LimitError as e:
            raise SettingError(
                f"rendering the checkpoint's chat template {e}: shorten the messages, or download "
                "the template again"
            ) from e
        except SettingError:  # a ValueError, too
            raise
        except ValueError as e:  # several templates, and none of them is the default
            raise CheckpointError(f"the checkpoint's chat template cannot be chosen: {e}") from e

    def _find_cuts(self, tokens: list[int]) -> tuple[int, ...]:
        header, _ = self._turn_start
        if not header:
            return ()
        starts = [i for i, token in enumerate(tokens) if token == header[0] and i]
        cuts = {i for i in starts if tokens[i : i + len(header)] == header}
        if starts and starts[0] >= LONG_FIRST_TURN:
            cuts.add(starts[0])
        return tuple(sorted(cuts))

    @cached_property
    def _turn_start(self) -> tuple[list[int], str]:
        """The tokens and the text that each turn of the assistant starts with.

        The tokens are [] if no marker is first. The text is "" if there is none, and ends as the
        text of a turn that has no reasoning begins.
        """
        ask = {"role": "user", "content": "x"}
        history = [ask, {"role": "assistant", "content": "y"}, ask]
        try:
            base, turn = self._render([[ask], history], None, [None, None], answer=False)
            turns = [*self._render([[ask], [ask]], None, [True, False]), turn]
        except CheckpointError:
            return [], ""
        if not all(turn.startswith(base) for turn in turns):
            return [], ""
        text = os.path.commonprefix([t[len(base) :] for t in turns])
        # White space at the end is left out: it may form one token with the text that follows.
        header = self.encode(text.rstrip())
        return header if header and header[0] in self._special.non_text else [], text

    @cached_property
    def _keeps_system_messages(self) -> bool:
        """Whether the template writes a system message that stands after others, and there."""
        ask, said = {"role": "user", "content": "1x1"}, {"role": "assistant", "content": "2x2"}
        late = {"role": "system", "content": "3x3"}
        ends = [[ask, said, ask, late], [ask, said, late, ask], [ask, late], [ask, said, late]]
        try:
            before, *texts = self._render([[ask], *ends], None, [None] * 5, answer=False)
        except CheckpointError:
            return False
        order = [[m["content"] for m in messages] for messages in ends]
        found = [re.findall(r"(\d)x\1", text) for text in texts]
        places = [[content[0] for content in contents] for contents in order]
        return found == places and all(text.startswith(before) for text in texts)


def _can_go_on(message: dict[str, Any]) -> bool:
    """Return whether a message is a turn of the assistant that is not complete."""
    begun = message["role"] == "assistant" and "tool_calls" not in message
    return begun and bool(message["content"] or message.get("reasoning_content"))


def _break_special_tokens(tokenizer: Any, value: Any) -> tuple[str, Any]:
    """Put a seam into each special token that strings in `value` contain as text.

    A user who writes "<|im_end|>" means the characters. Encoded in one piece, they would become the
    special token, and the text after it could pose as another role. Split at the seam, they cannot.

    Returns:
        (the seam, a character that occurs in none of the strings; the value with seams).
    """
    used = {c for text in _strings(value) for c in text}
    seam = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def broken(value: Any) -> Any:
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


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested data, the keys of dicts included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _strings(list(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
