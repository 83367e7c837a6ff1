"""Define the events of an answer.

In order: Progress during prefill; Reasoning, Text and tool calls while they are generated; End. A
tool call is a ToolCallStart, any number of ToolCallArguments, and a ToolCall. Events are plain
data: this module is cheap to import and does not import MLX.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Reports how far prefill has come.

    Attributes:
        done, total: prompt tokens that are done, and in all. Tokens from the prompt cache are in
            neither count.
        layer, layers: the layer that the current chunk of the prompt has reached, and the number of
            layers.
    """

    done: int
    total: int
    layer: int
    layers: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability.

    Attributes:
        text, data: what it stands for, which may be a part of a character.
        logprob: after penalties and grammar, before temperature and the options that leave out
            tokens.
    """

    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True)
class Logprobs:
    """The log probability of a token of the text, for a request that asks for it.

    It comes before the Text that the token completes. A token that a grammar forced has the
    probability 1. Tokens of the reasoning and of tool calls have no such event.

    Attributes:
        token: the token that was chosen.
        top: the likeliest tokens in its place, in order.
    """

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Announces a tool call, as soon as its function is known.

    Attributes:
        index: the number of the call in the answer, from 0.
        id: identifies the call in the conversation.
        name: the function.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of a call's arguments.

    The pieces of a call, joined, are a JSON object. Those of a call that turns out to have an error
    are none: its last brace is missing, so that it cannot be taken for a call that can be made.
    """

    index: int
    id: str
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete tool call.

    Attributes:
        index, id: as in `ToolCallStart`.
        name: the function; "" if the model gave no name.
        arguments: the arguments, with the types of the tool's schema; None if there is an `error`.
        text: the text of the call as the model wrote it, without the markers.
        error: why the call cannot be used; None if it can.
    """

    index: int
    id: str
    name: str
    arguments: dict | None
    text: str
    error: str | None = None


@dataclass(frozen=True)
class End:
    """The last event of an answer, with its statistics.

    Attributes:
        finish_reason: "stop" (the model or a stop string ended it), "length" (max_tokens),
            "tool_calls" (it ended with tool calls, each of which can be made) or "cancelled".
        prompt_tokens, cached_tokens, generated_tokens, reasoning_tokens: token counts. Cached
            tokens are part of the prompt, reasoning tokens part of the generated tokens.
        forced_tokens: generated tokens for which a grammar left no choice. They go through the
            model together with the token before them.
        steps: the number of model calls that generated the answer.
        prompt_seconds: time from the start of the request to its first token.
        seconds: time from the first token to the last.
        batch: the largest number of answers that shared a step with this one, itself included.
            Answers share the expert bytes of a step: hit_rate, bytes_read and wait_seconds are this
            answer's part of its steps.
        experts, trained_experts: the experts per token (K) in use, and in training.
        bits: bits per expert weight; 16 or 32 if the weights are not quantized.
        activations: "float32" or "int8"; see `flashmoe.ops.activations`.
        ops: the back end that computed the experts: "cpu", "fused" (flashmoe's GPU kernels), or
            "gather" or "reference", which FLASHMOE_OPS selects for debugging.
        hit_rate: the share of the needed experts that were resident, 0 to 1.
        bytes_read: expert bytes read from the disk.
        wait_seconds: time that computation waited for the disk.
        peak_nbytes: peak memory of the process so far, in bytes.
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
        """The speed of decode. The first token is not counted: its time is prompt_seconds."""
        return max(0, self.generated_tokens - 1) / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read per token of prompt and answer that went through the model."""
        tokens = self.prompt_tokens - self.cached_tokens + self.generated_tokens
        return self.bytes_read / tokens if tokens else 0.0

    def figures(self) -> dict[str, str | int | float]:
        """Return the statistics that front ends log with an answer, rounded, as a JSON object.

        Token counts are left out, since front ends have fields of their own for them.
        """
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


Event = Progress | Text | Logprobs | Reasoning | ToolCallStart | ToolCallArguments | ToolCall | End
