"""Measure what int8 activations cost in quality, on text of the model's own.

The model answers questions in float32, sampled at temperature 1. Then the tokens of the answers are
decoded one by one, so that decode computes every product, in float32 and in int8. The last line is
JSON.

    python benchmarks/perplexity.py [MODEL] [--tokens 50]

nll: mean of -log p of the answers' tokens; standard_error: standard error of the difference of the
two. kl: mean KL divergence of the int8 distribution from the float32 one. same_top: share of tokens
for which both have the same most likely token.
"""

import argparse
import json
import math

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe.catalog import DEMO, find
from flashmoe.sweep.documents import QUESTIONS, EvalDocument, sample_answers
from flashmoe.sweep.fidelity import token_differences

#: The questions behind the figures of docs/benchmarks.md.
ASKED = QUESTIONS[:12]


def forced(model, texts: list[EvalDocument]) -> np.ndarray:
    """Return logits (tokens of all answers, vocabulary): each row comes before its token."""
    rows = []
    for text in texts:
        cache = make_prompt_cache(model)
        for i, token in enumerate(text.tokens[:-1]):
            logits = model.next_logits([token], cache)[0]
            mx.eval(logits, [c.state for c in cache])
            if i >= text.first - 1:
                rows.append(np.array(logits))
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--tokens", type=int, default=50, help="the most tokens of an answer")
    args = parser.parse_args()
    logits, texts = {}, None
    for activations in ("float32", "int8"):
        model, tokenizer = flashmoe.load(find(args.model), activations=activations)
        texts = texts or sample_answers(model, tokenizer, ASKED, max_tokens=args.tokens)
        logits[activations] = forced(model, texts)
        model.close()
    tokens = np.array([token for text in texts for token in text.predicted])
    nll, excess, kl, same = token_differences(logits["float32"], logits["int8"], tokens).T
    means = {"float32": (nll - excess).mean(), "int8": nll.mean()}
    result = {
        "tokens": len(tokens),
        "nll": {name: round(value, 5) for name, value in means.items()},
        "perplexity": {name: round(math.exp(value), 4) for name, value in means.items()},
        "standard_error": round(excess.std() / len(tokens) ** 0.5, 5),
        "kl": round(kl.mean(), 6),
        "same_top": round(same.mean(), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
