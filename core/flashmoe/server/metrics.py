"""Counters of the server in Prometheus' text format.

They are plain numbers without locks: only the server's event loop may change them.
"""

from __future__ import annotations

from collections import Counter

from ..engine import Engine
from ..events import End
from ..memory import system as memory


class Metrics:
    """Counts requests, tokens and times of one server.

    Attributes:
        in_flight: chat completions that are not finished, those in the queue included.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, int | str]] = Counter()
        self._totals: Counter[str] = Counter()
        self._summaries: dict[str, tuple[float, int]] = {}

    def count_request(self, path: str, status: int | str) -> None:
        """Count a finished request. `status` is the HTTP status, or "disconnected"."""
        self._requests[path, status] += 1

    def count(self, name: str) -> None:
        """Add 1 to the counter "disconnects", "stream_errors" or "pieces"."""
        self._totals[name] += 1

    def count_answer(self, end: End, seconds: float) -> None:
        """Count a generated answer. `seconds` is the time since it was requested."""
        self._totals["prompt_tokens"] += end.prompt_tokens
        self._totals["cached_tokens"] += end.cached_tokens
        self._totals["completion_tokens"] += end.generated_tokens
        self._totals["expert_bytes_read"] += end.bytes_read
        self._observe("answer_seconds", seconds)
        self._observe("time_to_first_token_seconds", end.prompt_seconds)
        self._observe("tokens_per_second", end.tokens_per_second)
        self._observe("hit_rate", end.hit_rate)

    def mean_answer_seconds(self) -> float:
        """Return the mean time of an answer; 1.0 before the first one."""
        total, count = self._summaries.get("answer_seconds", (1.0, 1))
        return total / count

    def prometheus_text(self, engine: Engine) -> str:
        """Return all metrics in Prometheus' text format, version 0.0.4."""
        lines = _header("requests_total", "counter", "HTTP requests that are finished.")
        for (path, status), count in sorted(self._requests.items(), key=str):
            lines.append(f'flashmoe_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, description in _TOTALS.items():
            lines += _header(f"{name}_total", "counter", description)
            lines.append(f"flashmoe_{name}_total {self._totals[name]}")
        for name, description in _SUMMARIES.items():
            total, count = self._summaries.get(name, (0.0, 0))
            lines += _header(name, "summary", description)
            lines.append(f"flashmoe_{name}_sum {total:.6g}")
            lines.append(f"flashmoe_{name}_count {count}")
        for name, (value, description) in self._gauges(engine).items():
            lines += _header(name, "gauge", description)
            lines.append(f"flashmoe_{name} {value}")
        return "\n".join(lines) + "\n"

    def _gauges(self, engine: Engine) -> dict[str, tuple[int, str]]:
        return {
            "requests_in_flight": (self.in_flight, "Requests that are not finished."),
            "rows": (engine.running, "Answers that are generated together now."),
            "waiting": (engine.waiting, "Requests whose prefill has not started."),
            "model_loaded": (int(engine.loaded), "Whether the model is in memory."),
            "resident_memory_bytes": (memory.resident(), "Memory of the process."),
            "peak_memory_bytes": (memory.peak(), "Peak memory of the process so far."),
        }

    def _observe(self, name: str, value: float) -> None:
        total, count = self._summaries.get(name, (0.0, 0))
        self._summaries[name] = total + value, count + 1


_TOTALS = {
    "prompt_tokens": "Prompt tokens, including those from the prompt cache.",
    "cached_tokens": "Prompt tokens that came from the prompt cache.",
    "completion_tokens": "Generated tokens.",
    "expert_bytes_read": "Expert bytes read from the drive.",
    "pieces": "Pieces of answers, about one for each token, while they are generated.",
    "disconnects": "Chat completions whose client disconnected.",
    "stream_errors": "Streams that ended with an error.",
}
_SUMMARIES = {
    "answer_seconds": "Time from a request to the end of its answer.",
    "time_to_first_token_seconds": "Time from the start of an answer to its first token.",
    "tokens_per_second": "Decode speed of each answer, from its first token on.",
    "hit_rate": "Share of the needed experts that were in slots, for each answer.",
}


def _header(name: str, kind: str, description: str) -> list[str]:
    return [f"# HELP flashmoe_{name} {description}", f"# TYPE flashmoe_{name} {kind}"]
