"""Advance one sequence of the batch: first its prompt is prefilled, then its answer grows."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import mlx.core as mx

from ..checkpoint.checkpoint import Checkpoint
from ..events import End
from ..memory.system import peak
from ..models.layerwise import Chunk, ChunkResult
from ..models.streaming_moe import StreamingMoE, StreamingStats
from .answer import AnswerState
from .prompt import PromptPrefill
from .sampling import Sampler

#: Tokens for which memory is set aside at a time while an answer grows.
CONTEXT_AHEAD = 1024


class ActiveSequence:
    """A prompt and its answer, with their own prompt cache and sampler.

    The answer grows by a token a step, or by several when a grammar leaves no choice.

    Args:
        answer: limits, constraint and events of the answer.
        prefill: the prompt on its way into the model.
        experts: K.
        forced: tokens that the answer begins with, whatever the model says; `prefill` has them.

    Attributes:
        reserved: tokens of context for which memory is set aside.
    """

    def __init__(
        self,
        model: StreamingMoE,
        answer: AnswerState,
        prefill: PromptPrefill,
        sampler: Sampler,
        experts: int,
        forced: list[int],
    ):
        self.answer = answer
        self.prefill = prefill
        self.experts = experts
        self.reserved = 0
        self._model = model
        self._sampler = sampler
        self._forced = forced
        self._next: list[int] = []
        self._context = prefill.context
        self._first_token: float | None = None
        self._steps = 0
        self._batch = 1
        self._needed = self._loaded = self._bytes = self._waited = 0.0

    @property
    def in_prefill(self) -> bool:
        """Whether its prompt is still being prefilled."""
        return bool(self.prefill.left)

    @property
    def context(self) -> int:
        """Tokens in its cache when the step under way is done."""
        return self._context

    @property
    def planned_context(self) -> int:
        """Tokens that memory must be available for before it begins.

        An answer that grows longer takes more memory from the slots.
        """
        return self.prefill.context + min(self.answer.max_tokens, CONTEXT_AHEAD)

    def next_chunk(self) -> Chunk:
        """Return the tokens of the answer that go through the model next."""
        return Chunk(self._next, self.prefill.cache, step=True)

    def next_logits(self) -> mx.array:
        """Do a step that no other sequence shares, by the model's own call: (1, vocabulary)."""
        logits = self._model.next_logits(self._next, self.prefill.cache)
        mx.eval(logits, [c.state for c in self.prefill.cache])
        return logits

    def add_stats(self, stats: StreamingStats, sequences: int) -> None:
        """Add this sequence's share of what a step of `sequences` sequences read."""
        self._batch = max(self._batch, sequences)
        self._needed += stats.needed / sequences
        self._loaded += stats.loaded / sequences
        self._bytes += stats.reads.bytes / sequences
        self._waited += stats.reads.wait_seconds / sequences

    def record_prefill(self, results: Sequence[ChunkResult]) -> str | None:
        """Record prompt chunks that were just processed; sample when they were the last ones.

        Returns:
            The finish reason, or None when the answer goes on.
        """
        self.prefill.record(results)
        if self.in_prefill:
            return None
        self._steps = 1
        self._first_token = perf_counter()
        self._sampler.record(self._forced)
        self.answer.emit_tokens(self._forced)
        assert self.prefill.logits is not None, "the whole prompt is prefilled"
        return self.answer.finish_reason() or self._sample(self.prefill.logits)

    def sample_next(self, logits: mx.array) -> str | None:
        """Sample the next token from the logits (1, vocabulary) of a step.

        Returns:
            The finish reason, "stop" or "length", or None when the answer goes on.
        """
        self._steps += 1
        return self._sample(logits)

    def _sample(self, logits: mx.array) -> str | None:
        answer = self.answer
        sampled = self._sampler.sample(logits, answer.constraint.mask)
        token = sampled.token
        if answer.constraint.is_end(token):
            return "stop"
        self._next = answer.within_limit([token, *answer.constraint.accept(token)])
        self._sampler.record(self._next)
        answer.emit_tokens(self._next, sampled)
        self._context += len(self._next)
        return answer.finish_reason()

    def finish(self, reason: str, checkpoint: Checkpoint) -> None:
        """Emit what was held back, and the End or the error that the answer ends with."""
        now, answer = perf_counter(), self.answer
        first = self._first_token or now
        end = End(
            finish_reason=reason,
            prompt_tokens=len(answer.prompt.tokens),
            cached_tokens=0 if self.in_prefill else self.prefill.cached,
            generated_tokens=answer.generated,
            reasoning_tokens=answer.reasoning,
            forced_tokens=answer.forced,
            steps=self._steps,
            prompt_seconds=first - answer.started,
            seconds=now - first,
            batch=self._batch,
            experts=self.experts,
            trained_experts=checkpoint.top_k,
            bits=checkpoint.expert_bits,
            activations=self._model.activations,
            ops=self._model.backend.name,
            hit_rate=1 - self._loaded / self._needed if self._needed else 0.0,
            bytes_read=round(self._bytes),
            wait_seconds=self._waited,
            peak_nbytes=peak(),
        )
        answer.finish(reason, end)
