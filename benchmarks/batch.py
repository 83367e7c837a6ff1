"""Measure how much several answers that are generated together speed up the total.

    python benchmarks/synth.py /tmp/synth --layers 4 --experts 256
    python benchmarks/batch.py /tmp/synth --limit 4GB --memory 3.2GB --io direct --rounds 3

Each number of sequences (--rows) runs in a process of its own, in a cgroup with the limit, with an
empty page cache; they alternate, and figures are medians over the rounds. A run prefills a short
prompt for each sequence, lets the slots fill, and then decodes given tokens with the project's own
code: each step is one pass of all sequences. A single sequence goes through the model as a single
request does.

The physics: a sequence needs layers * K experts per token, of which the slots hold a share.
Sequences that go through a layer together read an expert once, so the bytes of a step are those of
the union. If B sequences choose K of E experts at random, the union has
E * (1 - (1 - K / E) ** B) experts; `union` below is its share of B * K. With --routing random, the
random routers of the checkpoint choose; with "real", experts are drawn by the frequencies of a real
model (traces/), whose sequences share more experts. Consecutive real tokens share even more.

    tokens_per_second         all sequences together: sequences / median step
    row_seconds               time of a token of one sequence: the median step
    bytes_per_token           bytes read per token
    needed_per_token          experts needed in all layers, each counted once a step, per token
    hit_rate                  share of the needed experts that were in slots
    wait_ms, cpu_ms           per token: time that computing waits for the disk; time of all cores

With --requests N it measures whole requests instead, from empty slots: N prompts of --prompt tokens
with answers of --steps tokens, in groups of --rows. Prompts that are prefilled together read each
expert once:

    request_tokens_per_second tokens of all prompts and answers / time of all requests
    prompt_seconds            prefill time of a request
    request_bytes             bytes read per request

The last line is JSON; `speedup` is tokens_per_second / that of the first number of sequences.
"""

import argparse
import json
import sys
import time
from statistics import median

import numpy as np
import runs
from replay import TRACES, draw, read_frequencies

import streaming


def route_as_real(model, tokens: int, seed: int) -> None:
    """Replace what the routers choose by random draws with the frequencies of the trace.

    The layers of the model take the frequencies of layers spread over the trace.
    """
    import mlx.core as mx

    from flashmoe.models import qwen_moe as models

    shares = read_frequencies(TRACES / "qwen3.5-397b.freq")
    experts = model.checkpoint.num_experts
    if shares.shape[1] != experts:
        raise SystemExit(
            f"The trace has {shares.shape[1]} experts per layer, the model {experts}: pass "
            "a model with as many, or --routing random."
        )
    places = np.linspace(0, len(shares) - 1, len(model.layers)).round().astype(int)
    drawn = draw(shares[places], tokens, model.experts, seed)
    left = {id(x.mlp): iter(d) for x, d in zip(model.layers, drawn, strict=True)}
    router = models.route

    def route(block, x):
        indices, scores = router(block, x)
        rows = indices.size // block.top_k
        chosen = [next(left[id(block)]) for _ in range(rows)]
        return mx.array(chosen, indices.dtype).reshape(indices.shape), scores

    models.route = route


def child(args: argparse.Namespace, case: dict) -> dict:
    """Measure decode steps of several sequences, in this process."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.models.layerwise import Chunk, run_pass

    rows = case.pop("rows")
    if args.requests:
        return whole(args, case, rows)
    model = streaming.load(args.path, case)
    print(model.plan.describe(), file=sys.stderr)
    vocab = model.checkpoint.text_config["vocab_size"]
    each = args.prompt + args.fill + args.steps
    if args.routing == "real":
        route_as_real(model, rows * each, args.seed)
    ids = np.array(runs.tokens(args.tokens, rows * each, vocab, args.seed)).reshape(rows, each)
    caches = [make_prompt_cache(model) for _ in range(rows)]
    model.elastic_slots.fit_prefill(rows * args.prompt, [each] * rows, model.experts)
    for row, cache in zip(ids, caches, strict=True):
        run_pass(model, [Chunk(row[: args.prompt].tolist(), cache)])
    model.elastic_slots.fit_decoding([each] * rows)

    def step(tokens: list[int]) -> None:
        if rows == 1:
            mx.eval(model.next_logits(tokens, caches[0]), [c.state for c in caches[0]])
            return
        pieces = [Chunk([t], c, step=True) for t, c in zip(tokens, caches, strict=True)]
        mx.eval(model.logits_of([s.hidden for s in run_pass(model, pieces)]))

    seconds = []
    columns = ids[:, args.prompt :].T.tolist()
    for tokens in columns[: args.fill]:
        step(tokens)
    before, used = model.stats, runs.Usage()
    for tokens in columns[args.fill :]:
        start = time.perf_counter()
        step(tokens)
        seconds.append(time.perf_counter() - start)
    usage, stats = used.so_far(), model.stats - before
    count = rows * args.steps
    report = {
        "tokens_per_second": round(rows / median(seconds), 3),
        "row_seconds": round(median(seconds), 4),
        "bytes_per_token": stats.reads.bytes // count,
        "needed_per_token": round(stats.needed / count, 2),
        "union": round(stats.needed / (count * model.experts * len(model.layers)), 3),
        "hit_rate": round(stats.hit_rate, 4),
        "read_gb_s": round(stats.reads.bytes / sum(seconds) / 1e9, 3),
        "wait_ms": round(1e3 * stats.reads.wait_seconds / count, 2),
        "cpu_ms": round(1e3 * usage["cpu"] / count, 1),
        "cores_of_others": usage["others"],
        "slots": model.elastic_slots.per_layer,
    }
    model.close()
    return report


def whole(args: argparse.Namespace, case: dict, rows: int) -> dict:
    """Measure whole requests in groups of `rows`, from the prompt to the end of the answer."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.models.layerwise import Chunk, chunks_within, run_pass, split

    model = streaming.load(args.path, case)
    each = args.prompt + args.steps
    vocab = model.checkpoint.text_config["vocab_size"]
    count = args.requests * each
    ids = np.array(runs.tokens(args.tokens, count, vocab, args.seed)).reshape(-1, each)
    start, used, prefill_seconds = time.perf_counter(), runs.Usage(), 0.0
    for group in np.split(ids, range(rows, args.requests, rows)):
        began = time.perf_counter()
        caches = [make_prompt_cache(model) for _ in group]
        left = [
            Chunk(piece, cache)
            for row, cache in zip(group, caches, strict=True)
            for piece in split(row[: args.prompt].tolist(), [])
        ]
        tokens = len(group) * args.prompt
        limit = model.elastic_slots.fit_prefill(tokens, [args.prompt] * len(group), model.experts)
        while left:
            fitting = chunks_within(left, limit)
            mx.eval([model.logits(s.hidden) for s in run_pass(model, left[:fitting])])
            left = left[fitting:]
        prefill_seconds += time.perf_counter() - began
        model.elastic_slots.fit_decoding([each] * len(group))
        for tokens in group[:, args.prompt :].T.tolist():
            if len(group) == 1:
                mx.eval(model.next_logits(tokens, caches[0]), [c.state for c in caches[0]])
                continue
            pieces = [Chunk([t], c, step=True) for t, c in zip(tokens, caches, strict=True)]
            mx.eval(model.logits_of([s.hidden for s in run_pass(model, pieces)]))
    seconds, stats = time.perf_counter() - start, model.stats
    report = {
        "request_tokens_per_second": round(ids.size / seconds, 3),
        "request_seconds": round(seconds / args.requests, 2),
        "prompt_seconds": round(prefill_seconds / args.requests, 2),
        "request_bytes": stats.reads.bytes // args.requests,
        "wait_seconds": round(stats.reads.wait_seconds / args.requests, 2),
        "cores_of_others": used.so_far()["others"],
        "slots": model.elastic_slots.per_layer,
    }
    model.close()
    return report


def run_case(args: argparse.Namespace, case: dict) -> dict:
    """Run `child` in a process of its own, under the limit of the case."""
    command = [sys.executable, __file__, str(args.path), "--child", json.dumps(case)]
    for name in ("prompt", "fill", "steps", "seed", "routing", "requests"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--tokens", str(args.tokens)] if args.tokens else []
    return runs.run(command, limit=runs.nbytes(case["limit"]), keep=args.keep_cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], parents=[streaming.options()]
    )
    parser.set_defaults(prompt=8, steps=16)
    parser.add_argument("--memory")
    parser.add_argument("--limit")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--fill", type=int, default=24, help="tokens to decode before measuring")
    parser.add_argument("--routing", choices=("random", "real"), default="random")
    parser.add_argument(
        "--requests", type=int, default=0, help="measure this many whole requests instead"
    )
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args, json.loads(args.child))))
        return
    base = streaming.base_case(args, memory=args.memory, limit=args.limit)
    cases = {f"{n} rows": base | {"rows": n} for n in args.rows}
    results = runs.alternated(cases, args.rounds, lambda case: run_case(args, case))
    speed = "request_tokens_per_second" if args.requests else "tokens_per_second"
    first = next(iter(results.values()))[speed]
    for case in results.values():
        case["speedup"] = round(case[speed] / first, 3)
    print(json.dumps({"routing": args.routing, **results}))


if __name__ == "__main__":
    main()
