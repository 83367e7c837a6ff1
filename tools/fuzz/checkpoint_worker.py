"""Open, load and run mutated checkpoints in this process, which the supervisor may have to end.

It gets the number of a mutant in each line of its input, and answers with one line of JSON. A crash
of the process, or no answer, is what the supervisor sees of the worst mutants.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from .checkpoint_mutations import mutated
from .known_checkpoints import KNOWN, known
from .toy_files import TOYS, Mutant, read_toy

#: The longest text of an error: people read it in a terminal.
LONGEST = 2000
#: Contains what patterns with repetitions inside repetitions are slow at.
QUESTION = "hello " + "a" * 40 + "! What is 3 + 4?"
DOG = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}
KINDS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "schema": DOG}},
    {"tools": [{"name": "f", "parameters": DOG}], "tool_choice": "required"},
    {"think": True},
    {"temperature": 0.7, "seed": 1},
    {"temperature": None, "seed": 1},
    {"repetition_penalty": 1.5},
]


def make(seed: int, number: int, toys: dict[str, Mutant]) -> tuple[Mutant, Mutant, dict]:
    """Return a mutant, the toy that it was made from, and fields of the request to send."""
    random = Random(f"{seed}:{number}")
    if number < len(KNOWN):
        original = toys[KNOWN[number][1]]
        return known(number, toys), original, {}
    original = toys[random.choice(list(TOYS))]
    mutant = mutated(random, original)
    return mutant, original, random.choice(KINDS) if random.random() < 0.1 else {}


def answer(directory: Path, fields: dict) -> str:
    """Return the text of a short answer, reasoning and calls included."""
    from flashmoe.engine import Engine
    from flashmoe.errors import OutputError
    from flashmoe.events import Progress
    from flashmoe.requests import Request

    messages = [{"role": "user", "content": QUESTION}]
    request = Request(messages, **({"temperature": 0, "max_tokens": 2} | fields))
    events = []
    # A grammar's answer is longer than the few tokens that are asked for.
    with Engine(directory, prompt_store=0) as engine, suppress(OutputError):
        # How often progress is told depends on the clock.
        for event in engine.stream(request):
            if not isinstance(event, Progress):
                events.append((type(event).__name__, getattr(event, "text", "")))
    return repr(events)


def outcome(directory: Path, fields: dict) -> dict[str, str]:
    """Run a checkpoint; return what came of it, and where an error was raised."""
    from flashmoe.errors import FlashMoEError

    try:
        return {"outcome": "loaded", "answer": answer(directory, fields)}
    except FlashMoEError as e:
        text = str(e)
        if len(text) > LONGEST:
            return {"outcome": "long text", "where": _where(e), "text": f"{len(text)} characters"}
        if "Traceback (most recent" in text:
            return {"outcome": "traceback in text", "where": _where(e), "text": text[-300:]}
        return {"outcome": "refused", "text": text[:200], "where": type(e).__name__}
    except BaseException as e:
        name = type(e).__name__
        return {
            "outcome": f"bare {name}",
            "where": _where(e),
            "text": " ".join(str(e)[:300].split()),
        }


def _where(error: BaseException) -> str:
    """Return the last place in flashmoe that an error passed, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/flashmoe/" in f.filename]
    places = [
        f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}"
        for f in (*ours[-1:], *frames[-1:])
    ]
    return " < ".join(dict.fromkeys(places))


def run(root: Path, work: Path, seed: int, out: int) -> None:
    """Answer numbers on standard input with outcomes on a descriptor, until the input ends."""
    toys = {name: read_toy(root / name) for name in TOYS}
    right = {name: answer(root / name, {}) for name in toys}
    for fields in KINDS:
        answer(root / "qwen3_5", fields)
    # What was imported is not looked at by each collection.
    gc.collect()
    gc.freeze()
    with os.fdopen(out, "w") as replies:

        def reply(**values: Any) -> None:
            replies.write(json.dumps(values) + "\n")
            replies.flush()

        reply(ready=True)
        loads = 0
        for line in sys.stdin:
            number = int(line)
            mutant, original, fields = make(seed, number, toys)
            mutant.write(work / "mutant", original)
            faulthandler.dump_traceback_later(15)
            result = outcome(work / "mutant", fields)
            if mutant.neutral and not fields:
                if result["outcome"] == "refused":
                    result["outcome"] = "valid refused"
                elif result.get("answer", right[original.toy.name]) != right[original.toy.name]:
                    result["outcome"] = "wrong answer"
            loads += result["outcome"] == "loaded"
            if result["outcome"] == "loaded" and loads % 50 == 0:
                name = original.toy.name
                after = outcome(root / name, {})
                if after.get("answer") != right[name]:
                    result = after | {"outcome": "next answer wrong"}
            faulthandler.cancel_dump_traceback_later()
            result.pop("answer", None)
            reply(number=number, changes=mutant.changes, toy=original.toy.name, **result)


if __name__ == "__main__":
    faulthandler.enable()
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
