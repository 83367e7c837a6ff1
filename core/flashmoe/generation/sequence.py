"""One answer of those that go through the model together: a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import mlx.core as mx

from ..checkpoint.checkpoint import Checkpoint
from ..errors import OutputError
from ..events import End
from ..memory.budget import peak
from ..models.layerwise import Chunk, ChunkResult
from ..models.qwen_moe import StreamingMoE, StreamingStats
from .answer import AnswerState
from .prompt import PromptPrefill
from .sampling import Sampler

#: Tokens for which memory is set aside at a time while an answer grows.
CONTEXT_AHEAD = 1024


class ActiveSequence:
    """An answer under way. First its prompt is read, then it grows by a token a step, or by several
    when a grammar leaves no choice.

    Args:
        experts: K.
        forced: tokens that the answer begins with, whatever the model says; `reading` has them.
    """

    def __init__(
        self,
        model: StreamingMoE,
        turn: AnswerState,
        reading: PromptPrefill,
        sampling: Sampler,
        experts: int,
        forced: list[int],
    ):
        self.turn = turn
        self.reading = reading
        self.experts = experts
        self.reserved = 0
        self._model = model
        self._sampling = sampling
        self._forced = forced
        self._next: list[int] = []
        self._grown = reading.context
        self._first: float | None = None
        self._steps = 0
        self._beside = 1
        self._needed = self._loaded = self._bytes = self._waited = 0.0

    @property
    def reads(self) -> bool:
        """Whether its prompt is still being read."""
        return bool(self.reading.left)

    @property
    def context(self) -> int:
        """Tokens in its cache when the step under way is done."""
        return self._grown

    @property
    def most_context(self) -> int:
        """Tokens that memory has to be there for before it begins. An answer that grows longer
        takes more from the slots."""
        return self.reading.context + min(self.turn.max_tokens, CONTEXT_AHEAD)

    def piece(self) -> Chunk:
        """The tokens of the answer that go through the model next."""
        return Chunk(self._next, self.reading.cache, step=True)

    def logits(self) -> mx.array:
        """A step that no other row shares: (1, vocabulary). It is the model's own call."""
        logits = self._model.next_logits(self._next, self.reading.cache)
        mx.eval(logits, [c.state for c in self.reading.cache])
        return logits

    def shared(self, stats: StreamingStats, rows: int) -> None:
        """Count its part of what a step of so many rows took."""
        self._beside = max(self._beside, rows)
        self._needed += stats.needed / rows
        self._loaded += stats.loaded / rows
        self._bytes += stats.reads.bytes / rows
        self._waited += stats.reads.wait_seconds / rows

    def was_read(self, swept: Sequence[ChunkResult]) -> str | None:
        """Pieces of its prompt were. Why the answer is over, if it is."""
        self.reading.took(swept)
        if self.reads:
            return None
        self._steps = 1
        self._first = perf_counter()
        self.turn.take(self._forced, forced=len(self._forced))
        return self.turn.over() or self.take(self.reading.logits, step=False)

    def take(self, logits: mx.array, *, step: bool = True) -> str | None:
        """Pick the next token. Why the answer is over, if it is: "stop" or "length"."""
        self._steps += step
        turn = self.turn
        token = self._sampling.pick(logits, turn.constraint.mask)
        if turn.constraint.ends(token):
            return "stop"
        self._next = turn.within_limit([token, *turn.constraint.accept(token)])
        self._sampling.took(self._next)
        turn.take(self._next, forced=len(self._next) - 1)
        self._grown += len(self._next)
        return turn.over()

    def end(self, reason: str, checkpoint: Checkpoint) -> None:
        """Emit what was held back and the End.

        Raises:
            OutputError: the answer is not what its format or tool_choice asks for.
        """
        now, turn = perf_counter(), self.turn
        first = self._first or now
        end = End(
            finish_reason=reason,
            prompt_tokens=len(turn.prompt.tokens),
            cached_tokens=0 if self.reads else self.reading.cached,
            generated_tokens=turn.generated,
            reasoning_tokens=turn.thought,
            forced_tokens=turn.forced,
            steps=self._steps,
            prompt_seconds=first - turn.started,
            seconds=now - first,
            batch=self._beside,
            experts=self.experts,
            trained_experts=checkpoint.top_k,
            bits=checkpoint.expert_bits,
            activations=self._model.activations,
            ops=self._model.ops,
            hit_rate=1 - self._loaded / self._needed if self._needed else 0.0,
            bytes_read=round(self._bytes),
            wait_seconds=self._waited,
            peak_nbytes=peak(),
        )
        try:
            turn.emit(replace(end, finish_reason=turn.finish(reason)))
        except OutputError as e:
            e.end = end
            raise
