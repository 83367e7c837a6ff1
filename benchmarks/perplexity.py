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
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe.catalog import DEMO, find
from flashmoe.sweep.documents import QUESTIONS, EvalDocument, sample_answers
from flashmoe.sweep.fidelity import token_differences

#: Those of the figures in the README.
ASKED = QUESTIONS[:12]


def forced(model, texts: list[EvalDocument]) -> np.ndarray:
    """Logits (tokens of all answers, vocabulary), each row given what is before its token."""
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
    parser.add_argument("--tokens", type=int, default=50, help="of an answer, at most")
    args = parser.parse_args()
    found, texts = {}, None
    for activations in ("float32", "int8"):
        model, tokenizer = flashmoe.load(find(args.model), activations=activations)
        texts = texts or sample_answers(model, tokenizer, ASKED, max_tokens=args.tokens)
        found[activations] = forced(model, texts)
        model.close()
    tokens = np.array([token for text in texts for token in text.predicted])
    nll, excess, kl, same = token_differences(found["float32"], found["int8"], tokens).T
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
