"""What the server counts, as text for Prometheus. Knows no server; lives on its event loop."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..events import End
from ..memory import budget as memory

if TYPE_CHECKING:
    from ..engine import Engine


class Metrics:
    """
    Attributes:
        in_flight: chat completions that are not over, those that wait included.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, int | str]] = Counter()
        self._totals: Counter[str] = Counter()
        self._summaries: dict[str, tuple[float, int]] = {}

    def answered(self, path: str, status: int | str) -> None:
        """A request is over. status: of HTTP, or "disconnected"."""
        self._requests[path, status] += 1

    def add(self, name: str) -> None:
        """One more of what is counted: "disconnects", "stream_errors"."""
        self._totals[name] += 1

    def ended(self, end: End, seconds: float) -> None:
        """An answer was generated. seconds: since it was asked for."""
        self._totals["prompt_tokens"] += end.prompt_tokens
        self._totals["cached_tokens"] += end.cached_tokens
        self._totals["completion_tokens"] += end.generated_tokens
        self._totals["expert_bytes_read"] += end.bytes_read
        self._add("answer_seconds", seconds)
        self._add("time_to_first_token_seconds", end.prompt_seconds)
        self._add("tokens_per_second", end.tokens_per_second)
        self._add("hit_rate", end.hit_rate)

    def answer_seconds(self) -> float:
        """Of an answer, on average; 1 before there was any."""
        total, count = self._summaries.get("answer_seconds", (1.0, 1))
        return total / count

    def text(self, engine: Engine) -> str:
        """In Prometheus' format, version 0.0.4."""
        lines = _header("requests_total", "counter", "HTTP requests that are over.")
        for (path, status), count in sorted(self._requests.items(), key=str):
            lines.append(f'flashmoe_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, words in _TOTALS.items():
            lines += _header(f"{name}_total", "counter", words)
            lines.append(f"flashmoe_{name}_total {self._totals[name]}")
        for name, words in _SUMMARIES.items():
            total, count = self._summaries.get(name, (0.0, 0))
            lines += _header(name, "summary", words)
            lines.append(f"flashmoe_{name}_sum {total:.6g}")
            lines.append(f"flashmoe_{name}_count {count}")
        for name, (value, words) in self._gauges(engine).items():
            lines += _header(name, "gauge", words)
            lines.append(f"flashmoe_{name} {value}")
        return "\n".join(lines) + "\n"

    def _gauges(self, engine: Engine) -> dict[str, tuple[int, str]]:
        return {
            "requests_in_flight": (self.in_flight, "Chat completions that are not over."),
            "rows": (engine.rows, "Answers that are computed together now."),
            "waiting": (engine.waiting, "Requests whose prompt has not been begun."),
            "model_loaded": (int(engine.loaded), "Whether the model is in memory."),
            "resident_memory_bytes": (memory.resident(), "Memory of the process."),
            "peak_memory_bytes": (memory.peak(), "The most it was so far."),
        }

    def _add(self, name: str, value: float) -> None:
        total, count = self._summaries.get(name, (0.0, 0))
        self._summaries[name] = total + value, count + 1


_TOTALS = {
    "prompt_tokens": "Tokens of prompts, cached ones included.",
    "cached_tokens": "Tokens of prompts that the prompt cache held.",
    "completion_tokens": "Tokens that were generated.",
    "expert_bytes_read": "Expert bytes that were read from the drive.",
    "disconnects": "Chat completions whose client went away.",
    "stream_errors": "Streams that ended with an error.",
}
_SUMMARIES = {
    "answer_seconds": "From a request to the end of its answer.",
    "time_to_first_token_seconds": "From the start of an answer to its first token.",
    "tokens_per_second": "Of each answer, from its first token on.",
    "hit_rate": "Share of the needed experts that were resident, of each answer.",
}


def _header(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP flashmoe_{name} {words}", f"# TYPE flashmoe_{name} {kind}"]
