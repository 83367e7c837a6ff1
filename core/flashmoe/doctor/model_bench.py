"""Measure how fast a model runs on this machine, in the form that people compare (`bench model`).

The first answer begins with a cold page cache and empty slots, as the first answer of a day does;
the others are of the same process. Prompts differ, and nothing is taken from a prompt cache.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..engine import Engine
from ..events import End, Progress
from ..options import EngineOptions
from ..requests import Request
from ..sizes import format_size
from ..streaming.disk_bench import forget
from ..terminal import format_number, format_seconds
from . import machine

SUBJECTS = ("bicycle", "lighthouse", "river", "bakery", "violin", "glacier", "market", "orchard")
#: Words of the long prompt; most tokenizers make some 500 tokens of them.
LONG_PROMPT_WORDS = 420


@dataclass(frozen=True)
class Speed:
    """The figures of one answer, or the medians of several.

    Attributes:
        prompt_tokens, first_token_seconds: the prompt, and the time from the request to the first
            token.
        tokens_per_second: of decode.
        hit_rate: share of the needed experts that were resident, 0 to 1.
        gb_per_s: expert bytes read, in 10**9 a second, from the request to the last token.
    """

    prompt_tokens: float
    first_token_seconds: float
    tokens_per_second: float
    hit_rate: float
    gb_per_s: float

    @classmethod
    def of(cls, end: End) -> Speed:
        """Return the figures of an answer."""
        seconds = end.prompt_seconds + end.seconds
        return cls(
            end.prompt_tokens,
            end.prompt_seconds,
            end.tokens_per_second,
            end.hit_rate,
            end.bytes_read / seconds / 1e9 if seconds else 0.0,
        )

    @classmethod
    def median_of(cls, speeds: list[Speed]) -> Speed:
        """Return the median of each figure."""
        columns = zip(*(asdict(speed).values() for speed in speeds), strict=True)
        return cls(*map(median, columns))


@dataclass(frozen=True)
class ModelBench:
    """All figures of a model on this machine.

    Attributes:
        machine, system, versions: where it was measured; no names of users or hosts.
        model: its name, type, bytes, and bits of its experts.
        experts, trained_experts: K in use, and in training.
        ops, activations: what computed the experts.
        memory: the limit that was asked for, or None.
        peak: the most bytes of memory that the process held.
        load_seconds: from the start to the first request's turn.
        cold, warm, long_prompt: the first answer, the medians of the next ones, and a long prompt.
        answers: how many `warm` is of.
    """

    machine: str
    system: str
    versions: dict[str, str | None]
    model: dict[str, Any]
    experts: int
    trained_experts: int
    ops: str
    activations: str
    memory: str | int | None
    peak: int
    load_seconds: float
    cold: Speed
    warm: Speed
    long_prompt: Speed
    answers: int

    def markdown_row(self) -> str:
        """Return the figures as one row of the table of measurements."""
        long = self.long_prompt
        cells = (
            self.machine,
            self.system,
            f"{self.model['name']}, {format_number(self.model['bits'])} bits",
            f"{self.experts} of {self.trained_experts}",
            f"{self.memory or 'default'}, peak {format_size(self.peak)}",
            " + ".join(map(format_seconds, (self.cold.first_token_seconds, self.load_seconds))),
            f"{format_number(self.cold.tokens_per_second)}",
            f"{format_number(self.warm.tokens_per_second)}",
            f"{self.warm.hit_rate:.0%}",
            f"{self.warm.gb_per_s:.2f}",
            f"{format_number(long.prompt_tokens / long.first_token_seconds)}",
            f"{self.versions['flashmoe']}, {self.ops}",
        )
        return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "| machine | system | model | K | memory | first token + load | tokens/s cold | warm | hits | "
    "GB/s | prompt tokens/s | version |"
)


def measure(
    name: str,
    path: Path,
    options: EngineOptions,
    *,
    tokens: int,
    answers: int,
    report: Callable[[str], None] = lambda text: None,
) -> ModelBench:
    """Measure a model; it takes the time of `answers` + 2 answers and of loading.

    Args:
        name: what to call the model.
        path: its checkpoint.
        options: how to load it.
        tokens: the length of an answer.
        answers: answers after the first one.
        report: called with what is measured next.
    """
    checkpoint = Checkpoint.open(path)
    for file in checkpoint.files:
        forget(file)
    with Engine(path, options) as engine:

        def ask(prompt: str, max_tokens: int) -> tuple[End, float]:
            request = Request(
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_tokens,
                temperature=0.0,
                cache=False,
            )
            start = perf_counter()
            first = 0.0
            for event in engine.stream(request):
                if not isinstance(event, Progress) and not first:
                    first = perf_counter() - start
            assert isinstance(event, End)
            return event, first

        report("loading, and the first answer")
        subjects = [SUBJECTS[i % len(SUBJECTS)] for i in range(answers + 1)]
        cold, first = ask(_story(subjects[0], 0), tokens)
        warm = []
        for i, subject in enumerate(subjects[1:], 1):
            report(f"answer {i} of {answers}")
            warm.append(Speed.of(ask(_story(subject, i), tokens)[0]))
        report("a long prompt")
        words = [f"{SUBJECTS[i % len(SUBJECTS)]} {i}" for i in range(LONG_PROMPT_WORDS // 2)]
        last, _ = ask("Which word is the first one? " + " ".join(words), 1)
    facts = machine.versions()
    return ModelBench(
        machine=_machine_name(),
        system=facts.pop("system") or "",
        versions=facts,
        model={
            "name": name,
            "type": checkpoint.model_type,
            "nbytes": checkpoint.nbytes,
            "bits": cold.bits,
        },
        experts=cold.experts,
        trained_experts=cold.trained_experts,
        ops=cold.ops,
        activations=cold.activations,
        memory=options.memory,
        peak=last.peak_nbytes,
        load_seconds=max(0.0, first - cold.prompt_seconds),
        cold=Speed.of(cold),
        warm=Speed.median_of(warm),
        long_prompt=Speed.of(last),
        answers=answers,
    )


def _story(subject: str, number: int) -> str:
    return f"{number + 1}. Tell me a long story about a {subject}, with many details."


def _machine_name() -> str:
    """Return the processor or GPU and the memory, such as "Apple M3 Max, 48 GB"."""
    import mlx.core as mx

    if mx.default_device() == mx.gpu:
        name = str(mx.device_info().get("device_name", "GPU"))
    else:
        name = _processor_name()
    return f"{name}, {format_size(machine.memory_facts()['total'])}"


def _processor_name() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()
