"""What an engine answers with. Plain data: no MLX, cheap to import.

The events of an answer, in order: Progress while the prompt is read; then Reasoning, Text and tool
calls as they are generated; End. A tool call is ToolCallStart, ToolCallArguments pieces, ToolCall.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far the prompt has been read: `done` of `total` tokens, and the chunk that is under way
    has reached `layer` of `layers`. Tokens that the prompt cache held are in neither count."""

    done: int
    total: int
    layer: int
    layers: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thought before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call whose function is known; its arguments follow. index counts the calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of a call's arguments: the pieces of a call, joined, are a JSON object."""

    index: int
    id: str
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call.

    Attributes:
        name: the function; "" when the model gave none.
        arguments: typed by the tool's schema; None when `error` is set.
        text: what the model wrote, without the markers.
        error: why the call cannot be used; None for a good one.
    """

    index: int
    id: str
    name: str
    arguments: dict | None
    text: str
    error: str | None = None


@dataclass(frozen=True)
class End:
    """The last event.

    Attributes:
        finish_reason: "stop" (the model ended, or a stop string), "length" (max_tokens),
            "tool_calls" (it ended with calls), "cancelled".
        prompt_tokens, cached_tokens, generated_tokens, reasoning_tokens: counts; the cached ones
            are a part of the prompt, the reasoning ones of the generated.
        forced_tokens: generated tokens that a grammar left no choice for; they go through the
            model together, so that the answer took `steps` calls of it.
        prompt_seconds: from the start of the request to its first token.
        seconds: from the first token to the last.
        batch: the most answers that a step of this one had beside it, itself included. They share
            what was read: hit_rate, bytes_read and wait_seconds are its part of each step.
        experts: K in use; trained_experts: the K of training.
        bits: of the expert weights, 16 or 32 when they are not quantised.
        activations: "float32" or "int8", see `flashmoe.ops.activations`.
        ops: what computed the experts, a module of `flashmoe.ops`: "cpu", "fused" (our GPU
            kernels), or "gather" or "reference", which FLASHMOE_OPS selects to find a fault.
        hit_rate: share of the needed experts that were resident, 0..1.
        bytes_read: expert bytes read from disk.
        wait_seconds: time that computing stood still for the disk.
        peak_nbytes: peak memory of the process so far.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    reasoning_tokens: int
    forced_tokens: int
    steps: int
    prompt_seconds: float
    seconds: float
    batch: int
    experts: int
    trained_experts: int
    bits: float
    activations: str
    ops: str
    hit_rate: float
    bytes_read: int
    wait_seconds: float
    peak_nbytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of decode: the first token belongs to the prompt."""
        return max(0, self.generated_tokens - 1) / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read for each token that went through the model, of prompt and answer."""
        tokens = self.prompt_tokens - self.cached_tokens + self.generated_tokens
        return self.bytes_read / tokens if tokens else 0.0

    def figures(self) -> dict:
        """What front ends record beside an answer, apart from token counts: rounded, JSON."""
        return {
            "finish_reason": self.finish_reason,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "time_to_first_token": round(self.prompt_seconds, 3),
            "batch": self.batch,
            "experts": self.experts,
            "trained_experts": self.trained_experts,
            "bits": self.bits,
            "activations": self.activations,
            "ops": self.ops,
            "hit_rate": round(self.hit_rate, 4),
            "bytes_read": self.bytes_read,
            "bytes_per_token": round(self.bytes_per_token),
            "io_wait_seconds": round(self.wait_seconds, 3),
            "steps": self.steps,
            "peak_memory": self.peak_nbytes,
        }


Event = Progress | Text | Reasoning | ToolCallStart | ToolCallArguments | ToolCall | End
