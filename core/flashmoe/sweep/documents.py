"""The text that versions of a model are compared on: a file, or what the exact model answers.

Documents know nothing of each other. Each is short enough to be one piece of a prompt, so that all
of them go through a layer together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError

#: Tokens of a window of a file that are predicted, and of an answer at most.
WINDOW = 256
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
class Document:
    """tokens; those from number `first` on are predicted, each from all before it."""

    tokens: list[int]
    first: int

    @property
    def predicted(self) -> list[int]:
        return self.tokens[self.first :]


def own_answers(
    model,
    tokenizer,
    questions: Sequence[str] = QUESTIONS,
    *,
    most: int = ANSWER,
    total: int | None = None,
    seed: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Document]:
    """What a model answers, sampled at temperature 1, so that the text is as likely as it says.

    Args:
        model, tokenizer: as from `flashmoe.load`.
        most: tokens of an answer.
        total: tokens of all answers, exactly; the questions are asked again until there are as
            many. None: each question once.
        advance: told of tokens that were generated.
    """
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    found: list[Document] = []
    left = total
    while left is None or left > 0:
        for question in questions:
            message = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)
            count = most if left is None else min(most, left)
            steps = mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=count, sampler=make_sampler(temp=1.0)
            )
            answer = []
            for step in steps:
                answer.append(step.token)
                advance(1)
            found.append(Document([*prompt, *answer], len(prompt)))
            if left is not None:
                left -= len(answer)
                if left == 0:
                    break
        if left is None:
            break
    return found


def windows(file: Path, tokenizer, total: int) -> list[Document]:
    """The first tokens of a text, in windows that each begin anew; `total` of them are predicted.

    Raises:
        SettingError: the file cannot be read, or is too short.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise SettingError(f"cannot read {file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise SettingError(f"{file} is no UTF-8 text: give one for --text") from e
    ids = tokenizer.encode(text)
    found = []
    for start in range(0, len(ids), WINDOW + 1):
        window = ids[start : start + WINDOW + 1][: total + 1]
        if len(window) > 1 and total > 0:
            found.append(Document(window, 1))
            total -= len(window) - 1
    if total > 0:
        there = sum(len(d.predicted) for d in found)
        way_out = f"a longer one, or --tokens {there}" if there else "another one"
        raise SettingError(
            f"{file} has {len(ids)} tokens, of which {there} can be predicted, and "
            f"{there + total} are asked for: give {way_out}"
        )
    return found
