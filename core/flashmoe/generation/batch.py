"""Run the answers under way together: each step takes all of them through the model once.

Sequences share the reads of experts, and nothing else. A sequence is computed as if it were alone,
from its own prompt cache, so its text does not depend on what runs beside it. mlx-lm's
`BatchGenerator` pads sequences to one length and multiplies them as one matrix, which rounds by the
size of the batch; here all sequences read from one disk, whose bytes are what a step costs.

Lives on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from mlx_lm.generate import wired_limit

from ..errors import Cancelled, ClusterError, ContextError
from ..models.layerwise import chunks_within, run_pass
from ..models.streaming_moe import StreamingStats
from .answer import AnswerState
from .job import Job
from .loaded_model import LoadedModel
from .preparation import Preparation
from .sequence import CONTEXT_AHEAD, ActiveSequence

#: The largest number of sequences, unless another is given.
DEFAULT_BATCH = 16


class Batch:
    """The sequences under way.

    Args:
        limit: the largest number of sequences.

    Attributes:
        sequences: in the order in which they came.
    """

    def __init__(self, loaded: LoadedModel, limit: int = DEFAULT_BATCH):
        self.sequences: list[ActiveSequence] = []
        self._loaded = loaded
        self._model = loaded.model
        self._limit = limit
        self._memory_shape: list[tuple[ActiveSequence, int, bool]] = []
        self._pass_tokens = 0
        self._wired = ExitStack()

    def prepare(self, job: Job, done: Callable[[], None]) -> Preparation:
        """Begin to prepare a job; see `Preparation`."""
        return Preparation(self._loaded, job, done)

    def admit(self, answer: AnswerState) -> bool:
        """Let an answer join the batch. To be called in the order of the requests.

        An error of the answer is given to its caller.

        Returns:
            False when the answer has to wait until others are done.
        """
        try:
            if self.sequences and not self._can_hold(answer):
                return False
            sequence = self._loaded.start_sequence(answer)
        except Exception as e:
            answer.delivery.fail(e)
            return True
        if not self.sequences:
            self._wired.enter_context(wired_limit(self._model))
        self.sequences.append(sequence)
        return True

    def step(self) -> None:
        """Take every answer one token further, or prefill some of a prompt.

        Errors of one sequence are given to its caller.

        Raises:
            ReadError: an expert could not be read. No sequence can continue: see `fail`.
        """
        for sequence in [s for s in self.sequences if s.answer.cancelled.is_set()]:
            self._end(sequence, "cancelled")
        if not self.sequences:
            return
        try:
            with self._model.pruned_to(self.sequences[0].experts):
                self._divide_memory()
                self._advance()
        except Cancelled:
            pass  # all of them: the next step ends them
        except ContextError as e:
            # Memory has become short since it was admitted.
            self._remove(self.sequences[-1], e)

    def fail(self, error: BaseException) -> None:
        """End all sequences with an error."""
        for sequence in list(self.sequences):
            self._remove(sequence, error)

    def close(self) -> None:
        """Free the model. The batch cannot be used after that."""
        self._loaded.close()

    def _can_hold(self, answer: AnswerState) -> bool:
        experts = self.sequences[0].experts
        if len(self.sequences) >= self._limit:
            return False
        if self._loaded.experts_per_token(answer.request) != experts:
            return False
        tokens = len(answer.prompt.tokens)
        unread = sum(s.prefill.tokens for s in self.sequences) + tokens
        contexts = [s.planned_context for s in self.sequences]
        contexts.append(tokens + min(answer.max_tokens, CONTEXT_AHEAD))
        return self._model.elastic_slots.can_hold(unread, contexts, experts)

    def _divide_memory(self) -> None:
        """Divide memory anew between prompts and expert slots, if the batch has changed."""
        for s in self.sequences:
            if s.context > s.reserved:
                s.reserved = s.context + (0 if s.in_prefill else CONTEXT_AHEAD)
        shape = [(s, s.reserved, s.in_prefill) for s in self.sequences]
        if shape == self._memory_shape:
            return
        contexts = [s.reserved for s in self.sequences]
        slots, unread = self._model.elastic_slots, sum(s.prefill.tokens for s in self.sequences)
        if unread:
            self._pass_tokens = slots.fit_prefill(unread, contexts, self.sequences[0].experts)
        else:
            slots.fit_decoding(contexts)
        self._memory_shape = shape

    def _advance(self) -> None:
        model, before = self._model, self._model.stats
        prefilling = [s for s in self.sequences if s.in_prefill]
        decoding = [s for s in self.sequences if not s.in_prefill]
        model.hooks.check_cancelled = self._check_cancelled
        if not prefilling and len(decoding) == 1:
            logits = decoding[0].next_logits()
            self._add_stats(decoding, before)
            self._continue(decoding[0], partial(decoding[0].sample_next, logits))
            return
        prompts = [chunk for s in prefilling for chunk in s.prefill.left]
        prompts = prompts[: chunks_within(prompts, self._pass_tokens)] if prompts else []
        taking = [s for s in prefilling if s.prefill.left[0] in prompts]

        def entered(layer: int) -> None:
            for s in taking:
                s.prefill.reporter.layer_entered(layer)

        model.hooks.layer_entered = entered
        try:
            results = run_pass(model, [*prompts, *(s.next_chunk() for s in decoding)])
        finally:
            model.hooks.layer_entered = lambda layer: None
        self._add_stats([*taking, *decoding], before)
        for sequence in taking:
            mine = [r for r in results if r.chunk in sequence.prefill.left]
            self._continue(sequence, partial(sequence.record_prefill, mine))
        logits_of = model.logits_of([r.hidden for r in results[len(prompts) :]])
        for sequence, logits in zip(decoding, logits_of, strict=True):
            self._continue(sequence, partial(sequence.sample_next, logits))

    def _rest(self) -> None:
        with suppress(ClusterError):  # the next request says so
            self._loaded.rest()

    def _continue(self, sequence: ActiveSequence, advance: Callable[[], str | None]) -> None:
        """Let a sequence continue with what the model returned; an error is its own.

        Args:
            advance: returns the finish reason, or None.
        """
        try:
            reason = advance()
        except Exception as e:
            self._remove(sequence, e)
        else:
            if reason is not None:
                self._end(sequence, reason)

    def _add_stats(self, sequences: Sequence[ActiveSequence], before: StreamingStats) -> None:
        stats = self._model.stats - before
        for sequence in sequences:
            sequence.add_stats(stats, len(sequences))

    def _check_cancelled(self) -> None:
        """Leave the model when nobody waits for any of the answers any more."""
        if all(s.answer.cancelled.is_set() for s in self.sequences):
            raise Cancelled

    def _end(self, sequence: ActiveSequence, reason: str) -> None:
        error = None
        try:
            sequence.finish(reason, self._loaded.checkpoint)
        except Exception as e:
            error = e
        self._remove(sequence, error)
        # After the last event, so that nobody waits for the disk. Also when the answer failed.
        if not sequence.in_prefill:
            self._loaded.store_prompt(sequence.prefill)

    def _remove(self, sequence: ActiveSequence, error: BaseException | None) -> None:
        self.sequences.remove(sequence)
        self._memory_shape = []
        if not self.sequences:
            self._wired.close()
            self._rest()
        if error is not None:
            sequence.answer.delivery.fail(error)
