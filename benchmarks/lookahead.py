"""Measure whether it pays to read the next layer's experts before its router has chosen.

    python benchmarks/lookahead.py flashmoe-demo --slots 30
    python benchmarks/lookahead.py /tmp/synth397 --memory 3.2GB

While a layer waits for its experts, the router of the next layer is applied to this layer's hidden
state: the experts that it picks and that are not resident are read after this layer's own reads.
The physics: the disk is idle while attention and the end of the expert block are computed, so right
guesses cost nothing there; a wrong guess costs the time of its bytes, and the slot of an expert
that may be needed.

The numbers of guesses per layer alternate, some tokens each; figures are over all rounds. right:
share of the guessed experts that the next layer picked. The last line is JSON.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from statistics import median

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from flashmoe.catalog import find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.loading import load_streaming
from flashmoe.models.qwen_moe import SharedExpertBlock, route


class Ahead:
    """Guesses experts of the layer that follows each one."""

    def __init__(self, model):
        self.guesses = 0
        self.counts = defaultdict(lambda: [0, 0])  # guesses per layer -> guessed, right
        self._next, self._guessed = {}, {}
        layers = model.layers
        for layer, following in zip(layers, layers[1:], strict=False):
            scale = (
                following.post_attention_layernorm.weight / layer.post_attention_layernorm.weight
            )
            self._next[id(layer.mlp)] = following.mlp, scale

    def run(self, block, xs, residuals):
        """Do what SharedExpertBlock.run does, and guess when its own reads have been started."""
        routed = [route(block, x) for x in xs]
        call = block.switch_mlp.start([(x, i) for x, (i, _) in zip(xs, routed, strict=True)])
        decoding = len(xs) == 1 and xs[0].size == xs[0].shape[-1]
        if decoding and self.guesses:
            self._check(block, routed[0][0])
            self._guess(block, xs[0])
        shared = [block.shared(x) for x in xs]
        mx.async_eval(shared)
        sums = call.finish([scores for _, scores in routed])
        for y, s, residual in zip(sums, shared, residuals, strict=True):
            yield y + s if residual is None else residual + (y + s)

    def _check(self, block, indices):
        guessed = self._guessed.pop(id(block), ())
        picked = set(np.array(indices).ravel().tolist())
        self.counts[self.guesses][0] += len(guessed)
        self.counts[self.guesses][1] += len(picked.intersection(guessed))

    def _guess(self, block, x):
        if id(block) not in self._next:
            return
        following, scale = self._next[id(block)]
        switch = following.switch_mlp
        scores = np.array(following.gate(x * scale)).ravel()
        likely = np.argsort(-scores)[: following.top_k].tolist()
        missing = [e for e in likely if switch._table.lookup(e) is None][: self.guesses]
        self._guessed[id(following)] = missing
        for expert in missing:
            switch.load(expert, set(likely))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--memory")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--guesses", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument(
        "--tokens", type=int, default=10, help="tokens of each number of guesses per round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(find(args.model))
    model = load_streaming(checkpoint, memory=args.memory, slots=args.slots, prompt_cache=None)
    ahead = Ahead(model)
    SharedExpertBlock.run = lambda block, xs, residuals: ahead.run(block, xs, residuals)
    model.elastic_slots.fit_decoding([args.tokens * args.rounds * len(args.guesses)])
    cache = make_prompt_cache(model)
    drawn = random.Random(3)
    token = 1
    seconds: dict[int, list[float]] = defaultdict(list)
    loaded: dict[int, int] = defaultdict(int)
    for number in range(args.rounds + 1):
        for n in args.guesses:
            ahead.guesses = n
            before = model.stats.reads.bytes
            for _ in range(args.tokens):
                start = time.perf_counter()
                logits = model.next_logits([token], cache)
                mx.eval(logits, [c.state for c in cache])
                if number:  # the first round fills the slots
                    seconds[n].append(time.perf_counter() - start)
                # The text is the model's own, sampled, because greedy text repeats itself.
                likely = np.argsort(-np.array(logits[0]))[:5].tolist()
                token = drawn.choice(likely)
            if number:
                loaded[n] += model.stats.reads.bytes - before
    rows = []
    for n in args.guesses:
        guessed, right = ahead.counts[n]
        rows.append(
            {
                "guesses": n,
                "right": round(right / guessed, 3) if guessed else None,
                "ms": round(1e3 * median(seconds[n]), 2),
                "mb_a_token": round(loaded[n] / len(seconds[n]) / 1e6, 2),
            }
        )
        print(rows[-1])
    result = {"benchmark": "lookahead", "model": args.model, "slots": model.elastic_slots.per_layer}
    print(json.dumps(result | {"experts": model.experts, "rows": rows}))


if __name__ == "__main__":
    main()
