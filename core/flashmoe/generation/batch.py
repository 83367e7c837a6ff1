"""The answers under way. Each step takes all of them through the model once: they share the reads
of experts, and nothing else. Lives on the engine's thread.

A row is computed as if it were alone, from its own prompt cache, so its text does not depend on
what runs beside it. mlx-lm's `BatchGenerator` pads rows to one length and multiplies them as one
matrix, which rounds by the size of the batch. Rows are read from one disk here, whose bytes are
what a step costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from mlx_lm.generate import wired_limit

from ..errors import Cancelled, ClusterError, ContextError
from ..models.layerwise import fitting, sweep
from .answer import AnswerState
from .loaded_model import LoadedModel
from .sequence import CONTEXT_AHEAD, ActiveSequence

if TYPE_CHECKING:
    from ..engine import Job

#: Rows at most, when nothing is asked for.
DEFAULT_ROWS = 16


class Batch:
    """
    Args:
        most: rows at most.

    Attributes:
        rows: in the order in which they came.
    """

    def __init__(self, session: LoadedModel, most: int = DEFAULT_ROWS):
        self.rows: list[ActiveSequence] = []
        self._session = session
        self._model = session.model
        self._most = most
        self._jobs: dict[ActiveSequence, Job] = {}
        self._next: tuple[Job, AnswerState] | None = None
        self._shape: list[tuple[ActiveSequence, int, bool]] = []
        self._limit = 0
        self._wired = ExitStack()

    def admit(self, job: Job) -> bool:
        """Let a job join; False: it has to wait until others are done. To be asked in their order.

        An error of the job is put to it.
        """
        try:
            if self._next is None or self._next[0] is not job:
                self._next = job, self._session.prepare(job.request, job.put, job.cancelled)
            turn = self._next[1]
            if self.rows and not self._has_room(turn):
                return False
            self._next = None
            row = self._session.begin(turn)
        except Exception as e:
            self._next = None
            job.put(e)
            return True
        if not self.rows:
            self._wired.enter_context(wired_limit(self._model))
        self.rows.append(row)
        self._jobs[row] = job
        return True

    def step(self) -> None:
        """Take every row a token further, or some of a prompt.

        Errors of one row are put to its job.

        Raises:
            ReadError: an expert could not be read. No row can go on: see `fail`.
        """
        for row in [row for row in self.rows if row.turn.cancelled.is_set()]:
            self._end(row, "cancelled")
        if not self.rows:
            return
        try:
            with self._model.pruned_to(self.rows[0].experts):
                self._make_room()
                self._advance()
        except Cancelled:
            pass  # all of them: the next step ends them
        except ContextError as e:
            # Memory has become short since it was admitted.
            self._leave(self.rows[-1], e)

    def fail(self, error: BaseException) -> None:
        """End all rows with an error."""
        for row in list(self.rows):
            self._leave(row, error)

    def close(self) -> None:
        """Free the model. The batch cannot be used after that."""
        self._session.close()

    def _has_room(self, turn: AnswerState) -> bool:
        if len(self.rows) >= self._most or self._session.k(turn.request) != self.rows[0].experts:
            return False
        tokens = len(turn.prompt.tokens)
        unread = sum(row.reading.tokens for row in self.rows) + tokens
        contexts = [row.most_context for row in self.rows]
        contexts.append(tokens + min(turn.max_tokens, CONTEXT_AHEAD))
        return self._model.room.holds(unread, contexts, self.rows[0].experts)

    def _make_room(self) -> None:
        """Settle who has the memory, when that has changed."""
        for row in self.rows:
            if row.context > row.reserved:
                row.reserved = row.context + (0 if row.reads else CONTEXT_AHEAD)
        shape = [(row, row.reserved, row.reads) for row in self.rows]
        if shape == self._shape:
            return
        contexts = [row.reserved for row in self.rows]
        room, unread = self._model.room, sum(row.reading.tokens for row in self.rows)
        if unread:
            self._limit = room.for_prompts(unread, contexts, self.rows[0].experts)
        else:
            room.for_decoding(contexts)
        self._shape = shape

    def _advance(self) -> None:
        model, before = self._model, self._model.stats
        reading = [row for row in self.rows if row.reads]
        answering = [row for row in self.rows if not row.reads]
        model.watch.check = self._check
        if not reading and len(answering) == 1:
            logits = answering[0].logits()
            self._count(answering, before)
            self._go_on(answering[0], lambda row: row.take(logits))
            return
        prompts = [piece for row in reading for piece in row.reading.left]
        prompts = prompts[: fitting(prompts, self._limit)] if prompts else []
        taking = [row for row in reading if row.reading.left[0] in prompts]

        def entered(layer: int) -> None:
            for row in taking:
                row.reading.reporter.entered(layer)

        model.watch.entered = entered
        try:
            swept = sweep(model, [*prompts, *(row.piece() for row in answering)])
        finally:
            model.watch.entered = lambda layer: None
        self._count([*taking, *answering], before)
        for row in taking:
            mine = [s for s in swept if s.piece in row.reading.left]
            self._go_on(row, lambda row, mine=mine: row.was_read(mine))
        logits = model.logits_of([s.hidden for s in swept[len(prompts) :]])
        for row, mine in zip(answering, logits, strict=True):
            self._go_on(row, lambda row, mine=mine: row.take(mine))

    def _rest(self) -> None:
        with suppress(ClusterError):  # the next request says so
            self._session.rest()

    def _go_on(self, row: ActiveSequence, take) -> None:
        """Let a row go on with what the model says; an error is its own."""
        try:
            reason = take(row)
        except Exception as e:
            self._leave(row, e)
        else:
            if reason is not None:
                self._end(row, reason)

    def _count(self, rows: Sequence[ActiveSequence], before) -> None:
        stats = self._model.stats - before
        for row in rows:
            row.shared(stats, len(rows))

    def _check(self) -> None:
        """Leave the model when nobody waits for any of the answers any more."""
        if all(row.turn.cancelled.is_set() for row in self.rows):
            raise Cancelled

    def _end(self, row: ActiveSequence, reason: str) -> None:
        error = None
        try:
            row.end(reason, self._session.checkpoint)
        except Exception as e:
            error = e
        self._leave(row, error)
        # After the last event, so that nobody waits for the disk. Also when the answer failed.
        if not row.reads:
            self._session.keep(row.reading)

    def _leave(self, row: ActiveSequence, error: BaseException | None) -> None:
        self.rows.remove(row)
        job = self._jobs.pop(row)
        self._shape = []
        if not self.rows:
            self._wired.close()
            self._rest()
        if error is not None:
            job.put(error)
