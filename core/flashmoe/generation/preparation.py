"""Prepare requests on threads of their own, while the engine's thread goes on with answers.

Clients write the schemas, grammars and messages, and encoding a long prompt takes seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from .job import Job

if TYPE_CHECKING:  # the engine's module is cheap to import
    from .answer import AnswerState
    from .loaded_model import LoadedModel

#: Seconds for which later requests wait for one that is still being prepared; then they pass it.
HOLD_SECONDS = 0.5
#: How many of the requests that wait are prepared ahead.
AHEAD = 32


class Preparation:
    """The preparation of one request, which begins at once.

    Args:
        done: called when it has ended, on the thread of the preparation.
    """

    def __init__(self, loaded: LoadedModel, job: Job, done: Callable[[], None]):
        self._loaded = loaded
        self._job = job
        self._done = done
        self._begun = monotonic()
        self._answer: AnswerState | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="flashmoe-preparation", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether there is an answer to begin, or an error."""
        return self._answer is not None or self._error is not None

    @property
    def holds(self) -> bool:
        """Whether later requests wait for this one."""
        return self.ended or monotonic() - self._begun < HOLD_SECONDS

    def result(self) -> AnswerState:
        """Return the answer to begin.

        Raises:
            BaseException: what is wrong with the request.
        """
        if self._error is not None:
            raise self._error
        assert self._answer is not None, "callers ask for `ended` first"
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._loaded.prepare_answer(self._job)
        except BaseException as e:  # whatever it is, it belongs to the caller
            self._error = e
        self._done()
