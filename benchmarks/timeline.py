"""Show where each millisecond of a decoded token goes: the main thread above, the disk below.

    python benchmarks/timeline.py /tmp/synth --limit 4GB --memory 3.2GB --io direct \\
        --plot docs/plots/timeline.svg

Spans are recorded from outside: `StreamingSwitchGLU.start`, `ExpertCall.finish` and `_run`,
`Reader.submit`, `PendingRead.wait` and the jobs of the reader's threads are wrapped, which costs
some microseconds per call; the engine itself does not change. What the main thread does:

    dense      attention, GatedDeltaNet, router, shared expert, head: everything not listed below
    experts    computing the routed experts
    waiting    no expert is left to compute and none has arrived: here the disk is the limit
    slots      choosing slots and submitting reads

The plot shows the token whose time is the median. If the disk is always busy and the main thread
waits, only fewer bytes or a faster disk would help; if the disk has gaps, reads start too late,
since the choice of a layer's router is known only when the layer before is done. The threads of the
reader use the same cores as the computation, so copies of what was read show as longer computing.
The last line is JSON: ms of each kind, for the token of the plot and the mean of all.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter

import runs

import streaming

KINDS = ("dense", "experts", "waiting", "slots")
COLOURS = dict(zip((*KINDS, "read"), ("C0", "C2", "C3", "C1", "C7"), strict=True))


@dataclass(frozen=True)
class Span:
    """What a thread did from `start` to `end`, in seconds of perf_counter.

    thread: 0 is the main thread; the threads of the reader follow.
    """

    kind: str
    thread: int
    start: float
    end: float


class Recorder:
    """Records spans of this process inside of `recording`."""

    def __init__(self):
        self.spans: list[Span] = []
        self._threads = {threading.get_ident(): 0}

    @contextmanager
    def recording(self, backend):
        """Wrap the functions whose time is recorded; restore them at the end.

        backend: the backend that computes the model.
        """
        from flashmoe.streaming import reader
        from flashmoe.streaming import switch_glu as switch

        # On a GPU the launches of an expert block are lazy: the next `start` waits for them.
        if backend.name == "fused":
            from flashmoe.ops.gpu.fused import FewTokensWork

            computing = FewTokensWork, "combined_with", "experts"
        else:
            computing = switch.ExpertCall, "_run", "experts"
        originals = []
        for owner, name, kind in (
            (switch.StreamingSwitchGLU, "start", "start"),
            (switch.ExpertCall, "finish", "slots"),
            computing,
            (reader.Reader, "submit", "slots"),
            (reader.PendingRead, "wait", "waiting"),
            (reader._Pool, "run", "read"),
        ):
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._wrapped(getattr(owner, name), kind))
        try:
            yield self
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)

    def _wrapped(self, function, kind: str):
        @wraps(function)
        def spanned(*args, **kwargs):
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                thread = self._threads.setdefault(threading.get_ident(), len(self._threads))
                self.spans.append(Span(kind, thread, start, perf_counter()))

        return spanned


def lane(spans: list[Span], start: float, end: float) -> list[Span]:
    """Return what the main thread did between two moments, as consecutive spans.

    Where spans are nested, the inner one counts. Time in no span is "dense", and so is the time of
    `start` itself, which evaluates the dense part of its layer.
    """
    mine = [s for s in spans if s.thread == 0 and s.kind != "start" and s.end > start < end]
    moments = sorted({start, end, *(s.start for s in mine), *(s.end for s in mine)})
    merged: list[Span] = []
    for left, right in zip(moments, moments[1:], strict=False):
        if left < start or right > end:
            continue
        around = [s for s in mine if s.start <= left and s.end >= right]
        kind = min(around, key=lambda s: s.end - s.start).kind if around else "dense"
        if merged and merged[-1].kind == kind:
            merged[-1] = Span(kind, 0, merged[-1].start, right)
        else:
            merged.append(Span(kind, 0, left, right))
    return merged


def busy(spans: list[Span], start: float, end: float) -> float:
    """Return the seconds between two moments in which at least one read was in flight."""
    total, until = 0.0, start
    for s in sorted((s for s in spans if s.thread), key=lambda s: s.start):
        left, right = max(s.start, until), min(s.end, end)
        if right > left:
            total += right - left
            until = right
    return total


def by_kind(spans: list[Span], start: float, end: float) -> dict[str, float]:
    """Return the milliseconds of the step, of each kind, and in which the disk was busy."""
    milliseconds = dict.fromkeys(("step", *KINDS), 0.0) | {"step": 1e3 * (end - start)}
    for s in lane(spans, start, end):
        milliseconds[s.kind] += 1e3 * (s.end - s.start)
    milliseconds["disk"] = 1e3 * busy(spans, start, end)
    return {kind: round(ms, 2) for kind, ms in milliseconds.items()}


def plot(path: Path, spans: list[Span], start: float, end: float, title: str) -> None:
    """Draw what each thread did between two moments."""
    figure, axes = runs.figure()
    threads = sorted({s.thread for s in spans if s.thread and s.end > start and s.start < end})
    rows = {0: 0} | {thread: row for row, thread in enumerate(threads, 2)}
    shown = lane(spans, start, end) + [s for s in spans if s.thread in threads]
    for kind, colour in COLOURS.items():
        for row in rows.values():
            bars = [
                (1e3 * (max(s.start, start) - start), 1e3 * (min(s.end, end) - max(s.start, start)))
                for s in shown
                if s.kind == kind and rows[s.thread] == row and s.end > start and s.start < end
            ]
            if bars:
                axes.broken_barh(bars, (row - 0.4, 0.8 if row else 1.4), color=colour)
        axes.bar(0, 0, color=colour, label=kind)
    axes.set(xlabel="ms", title=title, xlim=(0, 1e3 * (end - start)))
    axes.set_yticks([0.3, *range(2, len(threads) + 2)])
    axes.set_yticklabels(["main thread", *(f"reader {i + 1}" for i in range(len(threads)))])
    axes.invert_yaxis()
    runs.save(figure, axes, path)


def child(args: argparse.Namespace, case: dict) -> dict:
    """Record the decode steps of a model that is loaded in this process."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from flashmoe.models.layerwise import prefill, split
    from flashmoe.ops import backend as ops

    model = streaming.load(args.path, case)
    print(model.plan.describe(), file=sys.stderr)
    vocab = model.checkpoint.text_config["vocab_size"]
    ids = runs.tokens(args.tokens, args.prompt + args.steps + 1, vocab, args.seed)
    cache = make_prompt_cache(model)
    for _ in prefill(model, split(ids[: args.prompt], []), cache):
        pass
    steps = []
    recorder = Recorder()
    with recorder.recording(ops.pick()):
        for token in ids[args.prompt :]:
            start = perf_counter()
            mx.eval(model.next_logits([token], cache), [c.state for c in cache])
            steps.append((start, perf_counter()))
    model.close()
    del steps[0]  # the first step after a prompt is not like the others
    each = [by_kind(recorder.spans, *step) for step in steps]
    shown = sorted(range(len(steps)), key=lambda i: each[i]["step"])[len(steps) // 2]
    if args.plot:
        title = f"One token: {each[shown]['step']:.0f} ms, K={model.experts}, io={case['io']}"
        plot(args.plot, recorder.spans, *steps[shown], title)
    means = {kind: round(sum(e[kind] for e in each) / len(each), 2) for kind in each[0]}
    return {"token_ms": each[shown], "mean_ms": means}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], parents=[streaming.options()]
    )
    parser.add_argument("--limit", default="none", help="memory limit of the cgroup, such as 4GB")
    parser.add_argument("--memory", help="memory budget of flashmoe, such as 3.2GB")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(prompt=64)
    args = parser.parse_args()
    case = streaming.base_case(args, memory=args.memory, limit=args.limit)
    if args.child:
        print(json.dumps(child(args, case)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    report = runs.run(command, limit=runs.nbytes(args.limit), keep=args.keep_cache)
    print(json.dumps({"benchmark": "timeline", "settings": case} | report))


if __name__ == "__main__":
    main()
