"""Reads prompts into the model: from the longest state that is kept, keeping new ones on the way.

A prompt is split at its cuts whether a state is found or not. How it is split changes the last
bits of what comes out, so only this makes an answer after a restored state equal, bit for bit, to
the answer after reading the whole prompt.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from . import ops
from .chat import Prompt
from .checkpoint import Checkpoint
from .events import Event
from .footprint import PIECE_TOKENS
from .models import StreamingMoE
from .prefill import Reporter, prefill, split
from .prompt_cache import PromptCache, key
from .prompt_store import PromptStore

#: Counts changes of what a kept state means.
STATE_VERSION = 2


@dataclass
class Reading:
    """A prompt that was read.

    Attributes:
        cache: mlx-lm's prompt cache.
        cached: tokens that were not read, because a kept state held them.
        logits: (1, vocabulary) after the last token.
        new: the states that this prompt left, by name.
    """

    cache: list[Any]
    cached: int
    logits: mx.array
    new: dict[str, list[Any]] = field(default_factory=dict)


class PromptReader:
    """Reads prompts for one model.

    Args:
        memory: keeps states for this process.
        store: keeps states for the next one; None: does not.
    """

    def __init__(self, model: StreamingMoE, memory: PromptCache, store: PromptStore | None):
        self._model = model
        self._memory = memory
        self._store = store
        self._identity = lru_cache(
            partial(state_identity, model.checkpoint, activations=model.activations)
        )

    def read(
        self,
        prompt: Prompt,
        emit: Callable[[Event], None],
        *,
        keep: bool,
        forced: Sequence[int] = (),
    ) -> Reading:
        """Read a prompt; `emit` takes the progress.

        Args:
            keep: look for a kept state, and keep new ones.
            forced: tokens of the answer that are known already.
        """
        model, tokens = self._model, prompt.tokens
        identity = self._identity(model.experts)
        cache, done = self._longest(prompt, identity) if keep else (None, 0)
        cache = cache or make_prompt_cache(model)
        new = [*tokens[done:], *forced]
        pieces = split(new, [c - done for c in prompt.cuts if c > done])
        # Of a long history the first and the last state: there the next prompts branch off.
        wanted = {prompt.cuts[0], prompt.cuts[-1]} if keep and prompt.cuts else set()
        ends = accumulate(map(len, pieces), initial=done)
        stops = {i: end for i, end in enumerate(ends, start=-1) if end in wanted and end > done}
        reporter = Reporter(emit, len(tokens) - done, len(model.layers))
        model.watch.entered = reporter.entered
        limit = model.room.for_prompt(len(new), len(tokens) + len(forced), model.experts)
        states: dict[str, list[Any]] = {}
        for swept in prefill(model, pieces, cache, limit=limit, keep=stops):
            reporter.took(swept.tokens)
            for i, state in swept.states.items():
                name = key(identity, tokens[: stops[i]])
                states[name] = state
                self._memory.put(name, state)
        logits = model.logits(swept.hidden)
        mx.eval(logits)
        return Reading(cache, done, logits, states)

    def store(self, reading: Reading) -> None:
        """Keep the new states of a prompt for the next process."""
        if self._store is not None:
            for name, cache in reading.new.items():
                self._store.put(name, cache)

    def _longest(self, prompt: Prompt, identity: str) -> tuple[list[Any] | None, int]:
        empty = make_prompt_cache(self._model)
        for cut in reversed(prompt.cuts):
            name = key(identity, prompt.tokens[:cut])
            cache = self._memory.get(name)
            if cache is None and self._store is not None:
                cache = self._store.get(name, empty)
                if cache is not None:
                    self._memory.put(name, copy.deepcopy(cache))
            if cache is not None:
                return cache, cut
        return None, 0


def state_identity(checkpoint: Checkpoint, experts: int, activations: str = "float32") -> str:
    """What a state depends on besides its tokens: the weights, K, and what computes."""
    files = {
        file.name: (identity.nbytes, identity.mtime_ns)
        for file, identity in checkpoint.identities.items()
    }
    tensors = [(t.name, t.dtype, t.shape, t.start) for t in checkpoint.tensors.values()]
    packages = [version(name) for name in ("llm-flashmoe", "mlx", "mlx-lm", "numba")]
    maths = (ops.pick().__name__, activations, PIECE_TOKENS, platform.machine())
    text = json.dumps(
        [STATE_VERSION, checkpoint.config, sorted(files.items()), tensors, experts, packages, maths]
    )
    return hashlib.sha256(text.encode()).hexdigest()
