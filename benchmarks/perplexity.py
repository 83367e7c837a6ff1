"""What activations in int8 cost in quality, on text of the model's own.

The model answers questions in float32, sampled at temperature 1. Then the answers are forced token
by token, so that every product is one of decode, in float32 and in int8. Ends with one JSON line.

    python benchmarks/perplexity.py [MODEL] [--tokens 50]

nll: mean of -log p of the answers' tokens; standard_error: of the difference of the two. kl: of the
int8 distribution from the float32 one. same_top: share of tokens whose likeliest token is the same.
"""

import argparse
import json
import math

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

import flashmoe
from flashmoe.catalog import DEMO, find

QUESTIONS = [f"Tell me a short story about {x}." for x in ("a cat", "the sea", "rain", "bread")] + [
    "What is a friend?",
    "Why do leaves fall?",
    "How do I make tea?",
    "Write a poem about snow.",
    "Explain why the sky is blue.",
    "Give me a tip for sleeping well.",
    "What can I cook with eggs?",
    "Describe a forest.",
]


def answers(model, tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each question, in tokens."""
    mx.random.seed(1)
    found = []
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        steps = mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=count, sampler=make_sampler(temp=1.0)
        )
        found.append((prompt, [step.token for step in steps]))
    return found


def log_probabilities(model, texts) -> np.ndarray:
    """(tokens of all answers, vocabulary), each row given what is before its token."""
    rows = []
    for prompt, answer in texts:
        cache = make_prompt_cache(model)
        for i, token in enumerate([*prompt, *answer[:-1]]):
            logits = model.next_logits([token], cache)[0]
            mx.eval(logits, [c.state for c in cache])
            if i >= len(prompt) - 1:
                rows.append(np.array(logits - mx.logsumexp(logits)))
    return np.array(rows, np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--tokens", type=int, default=50, help="of an answer, at most")
    args = parser.parse_args()
    found, texts = {}, None
    for activations in ("float32", "int8"):
        model, tokenizer = flashmoe.load(find(args.model), activations=activations)
        texts = texts or answers(model, tokenizer, args.tokens)
        found[activations] = log_probabilities(model, texts)
        model.close()
    exact, rounded = found["float32"], found["int8"]
    tokens = [token for _, answer in texts for token in answer]
    nll = {name: -rows[np.arange(len(tokens)), tokens] for name, rows in found.items()}
    difference = nll["int8"] - nll["float32"]
    result = {
        "tokens": len(tokens),
        "nll": {name: round(values.mean(), 5) for name, values in nll.items()},
        "perplexity": {name: round(math.exp(v.mean()), 4) for name, v in nll.items()},
        "standard_error": round(difference.std() / len(tokens) ** 0.5, 5),
        "kl": round((np.exp(exact) * (exact - rounded)).sum(axis=1).mean(), 6),
        "same_top": round((exact.argmax(axis=1) == rounded.argmax(axis=1)).mean(), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
