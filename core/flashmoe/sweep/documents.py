"""The text that versions of a model are compared on: a file, or answers of the exact model.

Documents are independent of each other. Each is short enough to be one piece of a prompt, so that
all of them go through a layer together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..models.streaming_moe import StreamingMoE

#: Predicted tokens of each window of a file.
WINDOW = 256
#: Maximum tokens of an answer.
ANSWER = 128

QUESTIONS = [f"Tell me a short story about {x}." for x in ("a cat", "the sea", "rain", "bread")] + [
    "What is a friend?",
    "Why do leaves fall?",
    "How do I make tea?",
    "Write a poem about snow.",
    "Explain why the sky is blue.",
    "Give me a tip for sleeping well.",
    "What can I cook with eggs?",
    "Describe a forest.",
    "How does a bicycle stay upright?",
    "Write a letter to an old teacher.",
    "What should I pack for a week by the sea?",
    "Explain to a child where rain comes from.",
    "Name three ways to save water at home.",
    "Tell me a joke about a dog.",
    "How is bread made?",
    "Why do people keep diaries?",
    "Describe a busy market.",
    "What makes a good neighbour?",
    "Write a short dialogue between the sun and the moon.",
    "How can I learn to draw?",
]


@dataclass(frozen=True)
class EvalDocument:
    """A text that models are evaluated on.

    Attributes:
        tokens: all tokens.
        first: index of the first token that is predicted. Each token from there on is predicted
            from all tokens before it.
    """

    tokens: list[int]
    first: int

    @property
    def predicted(self) -> list[int]:
        """The tokens that are predicted."""
        return self.tokens[self.first :]


def sample_answers(
    model: StreamingMoE,
    tokenizer: TokenizerWrapper,
    questions: Sequence[str] = QUESTIONS,
    *,
    max_tokens: int = ANSWER,
    total: int | None = None,
    seed: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[EvalDocument]:
    """Let a model answer questions, sampled at temperature 1.

    At that temperature each token occurs with the probability that the model gives it.

    Args:
        model, tokenizer: from `flashmoe.load`.
        max_tokens: maximum tokens of an answer.
        total: exact number of tokens of all answers together; the questions are repeated until it
            is reached. None: each question is asked once.
        advance: called with the number of tokens that were generated.
    """
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    documents: list[EvalDocument] = []
    left = total
    while left is None or left > 0:
        for question in questions:
            message = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)
            limit = max_tokens if left is None else min(max_tokens, left)
            steps = mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=limit, sampler=make_sampler(temp=1.0)
            )
            answer = []
            for step in steps:
                answer.append(step.token)
                advance(1)
            documents.append(EvalDocument([*prompt, *answer], len(prompt)))
            if left is not None:
                left -= len(answer)
                if left == 0:
                    break
        if left is None:
            break
    return documents


def split_file(file: Path, tokenizer: TokenizerWrapper, total: int) -> list[EvalDocument]:
    """Split the beginning of a text into windows, each of which starts without context.

    Args:
        file: a UTF-8 text.
        total: number of tokens that are predicted in all windows together.

    Raises:
        SettingError: the file cannot be read, or is too short.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise SettingError(f"cannot read {file} ({e.strerror}): pass another file to --text") from e
    except UnicodeDecodeError as e:
        raise SettingError(f"{file} is not UTF-8 text: pass another file to --text") from e
    ids = tokenizer.encode(text)
    documents = []
    left = total
    for start in range(0, len(ids), WINDOW + 1):
        window = ids[start : start + WINDOW + 1][: left + 1]
        if len(window) > 1 and left > 0:
            documents.append(EvalDocument(window, 1))
            left -= len(window) - 1
    if left > 0:
        available = total - left
        way_out = f"use a longer one, or --tokens {available}" if available else "use another one"
        raise SettingError(
            f"{file} has {len(ids)} tokens, of which {available} can be predicted, and {total} are "
            f"needed: {way_out}"
        )
    return documents
