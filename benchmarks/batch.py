"""How much more a model gives in all when several answers are generated together.

    python benchmarks/synth.py /tmp/synth --layers 4 --experts 256
    python benchmarks/batch.py /tmp/synth --limit 4GB --memory 3.2GB --io direct --rounds 3

Each number of rows runs in a process of its own, in a cgroup with the limit, cold; they take turns,
and figures are medians over the rounds. A run reads a short prompt for each row, lets the slots
fill, and then decodes given tokens, a sweep of all rows a step, by the project's own code. One row
goes through the model as a single request does.

The physics: a row needs layers * K experts a token, of which the slots hold a share. Rows that go
through a layer together read an expert once, so the bytes of a step are those of the union. Of E
experts and B rows that choose K at random, the union has E * (1 - (1 - K / E) ** B) of them:
`union` below says how many of B * K that is. `routing`: "random", as the random routers of the
checkpoint choose; "real", drawn at the frequencies with which a real model took its experts
(traces/), which share more. Real tokens that follow each other share more than that.

    tokens_per_second         of all rows: rows / median step
    row_seconds               of a token of one row: the median step
    bytes_per_token           read, by rows
    needed_per_token          experts needed of all layers, by rows, each once a step
    hit_rate                  of these
    wait_ms, cpu_ms           a token: standing still for the disk; of all cores

With `--requests N` it is whole requests instead, from cold slots: N prompts of `--prompt` tokens
and answers of `--steps`, so many at a time as there are rows. Prompts that are read together read
each expert once:

    request_tokens_per_second of prompts and answers of all, by the time of all
    prompt_seconds            of that, reading prompts
    request_bytes             read, by requests

Ends with one JSON line; `speedup` is of tokens_per_second over those of one row.
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
    """Let the routers choose as those of the trace, spread over its layers, whatever they see."""
    import mlx.core as mx

    from flashmoe.models import qwen_moe as models

    shares = read_frequencies(TRACES / "qwen3.5-397b.freq")
    experts = model.checkpoint.num_experts
    if shares.shape[1] != experts:
        raise SystemExit(f"the trace has {shares.shape[1]} experts a layer, not {experts}")
    places = np.linspace(0, len(shares) - 1, len(model.layers)).round().astype(int)
    drawn = draw(shares[places], tokens, model.experts, seed)
    left = {id(x.mlp): iter(d) for x, d in zip(model.layers, drawn, strict=True)}
    own = models.route

    def route(block, x):
        indices, scores = own(block, x)
        rows = indices.size // block.top_k
        chosen = [next(left[id(block)]) for _ in range(rows)]
        return mx.array(chosen, indices.dtype).reshape(indices.shape), scores

    models.route = route


def child(args: argparse.Namespace, case: dict) -> dict:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.models.layerwise import Chunk, sweep

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
        sweep(model, [Chunk(row[: args.prompt].tolist(), cache)])
    model.elastic_slots.fit_decoding([each] * rows)

    def step(tokens: list[int]) -> None:
        if rows == 1:
            mx.eval(model.next_logits(tokens, caches[0]), [c.state for c in caches[0]])
            return
        pieces = [Chunk([t], c, step=True) for t, c in zip(tokens, caches, strict=True)]
        mx.eval(model.logits_of([s.hidden for s in sweep(model, pieces)]))

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
    found = {
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
    return found


def whole(args: argparse.Namespace, case: dict, rows: int) -> dict:
    """Requests from the first token of a prompt to the last of the answer, in groups of rows."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.models.layerwise import Chunk, fitting, split, sweep

    model = streaming.load(args.path, case)
    each = args.prompt + args.steps
    vocab = model.checkpoint.text_config["vocab_size"]
    count = args.requests * each
    ids = np.array(runs.tokens(args.tokens, count, vocab, args.seed)).reshape(-1, each)
    start, used, reading = time.perf_counter(), runs.Usage(), 0.0
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
            taken = fitting(left, limit)
            mx.eval([model.logits(s.hidden) for s in sweep(model, left[:taken])])
            left = left[taken:]
        reading += time.perf_counter() - began
        model.elastic_slots.fit_decoding([each] * len(group))
        for tokens in group[:, args.prompt :].T.tolist():
            if len(group) == 1:
                mx.eval(model.next_logits(tokens, caches[0]), [c.state for c in caches[0]])
                continue
            pieces = [Chunk([t], c, step=True) for t, c in zip(tokens, caches, strict=True)]
            mx.eval(model.logits_of([s.hidden for s in sweep(model, pieces)]))
    seconds, stats = time.perf_counter() - start, model.stats
    found = {
        "request_tokens_per_second": round(ids.size / seconds, 3),
        "request_seconds": round(seconds / args.requests, 2),
        "prompt_seconds": round(reading / args.requests, 2),
        "request_bytes": stats.reads.bytes // args.requests,
        "wait_seconds": round(stats.reads.wait_seconds / args.requests, 2),
        "cores_of_others": used.so_far()["others"],
        "slots": model.elastic_slots.per_layer,
    }
    model.close()
    return found


def run_case(args: argparse.Namespace, case: dict) -> dict:
    """`child` in a process of its own, under the limit of the case."""
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
    parser.add_argument("--fill", type=int, default=24, help="tokens decoded before it is measured")
    parser.add_argument("--routing", choices=("random", "real"), default="random")
    parser.add_argument("--requests", type=int, default=0, help="measure whole requests, so many")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args, json.loads(args.child))))
        return
    base = streaming.base_case(args, memory=args.memory, limit=args.limit)
    cases = {f"{n} rows": base | {"rows": n} for n in args.rows}
    found = runs.alternated(cases, args.rounds, lambda case: run_case(args, case))
    speed = "request_tokens_per_second" if args.requests else "tokens_per_second"
    first = next(iter(found.values()))[speed]
    for case in found.values():
        case["speedup"] = round(case[speed] / first, 3)
    print(json.dumps({"routing": args.routing, **found}))


if __name__ == "__main__":
    main()
