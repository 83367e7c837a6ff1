"""Measure what `flashmoe quantize` costs in quality, on text of the model's own.

The model answers the questions of benchmarks/perplexity.py, sampled at temperature 1. Every other
answer is the calibration text. The others are the test text: the model and versions of it with
fewer bits compute the probabilities of their tokens. The versions are plain rounding as MLX does
it, the search, and the search with calibration. Prints one JSON line for each version.

    python benchmarks/quantised.py [MODEL] [--gate-up 2] [--down 4] [--tokens 80]

kl: mean KL divergence of a version's distribution from the model's. same_top: share of tokens for
which both have the same most likely token.
"""

import argparse
import json
import tempfile
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from perplexity import ASKED

import flashmoe
from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.safetensors_writer import SHARD_NBYTES
from flashmoe.quantize import writer as quantize
from flashmoe.quantize.calibration import calibrate
from flashmoe.quantize.recipe import Recipe, make_plan
from flashmoe.quantize.rounding import Rounded
from flashmoe.sweep.documents import sample_answers
from flashmoe.sweep.fidelity import compare_with_exact, save_exact_logits


def plain(w, importance, bits, group_size, dtype) -> Rounded:
    """Round as MLX does, in the dtype of the checkpoint; the errors are not computed."""
    kind = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]
    weight, *scales_biases = mx.quantize(mx.array(w).astype(kind), group_size, bits)
    scales, biases = (np.array(a.astype(mx.float32)) for a in scales_biases)
    return Rounded(np.array(weight), scales, biases, 0.0, float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--gate-up", type=int, default=2)
    parser.add_argument("--down", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=80, help="the most tokens of an answer")
    args = parser.parse_args()
    path = find(args.model)
    scratch = tempfile.TemporaryDirectory()
    exact = Path(scratch.name, "exact")
    model, tokenizer = flashmoe.load(path)
    documents = sample_answers(model, tokenizer, ASKED, max_tokens=args.tokens)
    texts = documents[1::2]
    save_exact_logits(model, texts, exact)
    model.close()
    plan = make_plan(Checkpoint.open(path), Recipe(args.gate_up, args.down))
    for name in ("plain", "search", "calibrated"):
        with tempfile.TemporaryDirectory() as out:
            run = quantize.Quantizer(plan, Path(out, "model"), {})
            if name == "calibrated":
                text = Path(out, "text")
                text.write_text("\n".join(tokenizer.decode(d.tokens) for d in documents[::2]))
                run.importance = calibrate(plan.checkpoint, text)
            settings = quantize.run_settings(plan, SHARD_NBYTES, None)
            quantize.prepare_directory(plan, run.directory, settings)
            with mock.patch.object(
                quantize, "round_weights", plain if name == "plain" else quantize.round_weights
            ):
                run.write()
            version, _ = flashmoe.load(run.directory)
            rounded = compare_with_exact(version, texts, exact)
            version.close()
        result = {
            "version": name,
            "tokens": rounded.tokens,
            "perplexity": round(rounded.perplexity, 4),
            "kl": round(rounded.kl, 5),
            "same_top": round(rounded.same_top, 4),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
