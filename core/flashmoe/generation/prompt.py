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
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..chat.template import Prompt
from ..checkpoint.checkpoint import Checkpoint
from ..events import Event
from ..memory.footprint import CHUNK_TOKENS
from ..models.layerwise import Chunk, ChunkResult, Reporter, split
from ..models.qwen_moe import StreamingMoE
from ..ops import backend as ops
from .prompt_cache import PromptCache, key
from .prompt_store import PromptStore

#: Counts changes of what a kept state means.
STATE_VERSION = 2


class PromptPrefill:
    """A prompt on its way into the model, sweep by sweep.

    Attributes:
        cache: mlx-lm's prompt cache, which takes it.
        cached: tokens that need not be read, because a kept state held them.
        context: tokens of the prompt, with those of the answer that are known already.
        logits: (1, vocabulary) after the last token; None before all was read.
        new: the states that this prompt left, by name.
    """

    def __init__(
        self,
        model: StreamingMoE,
        cache: list[Any],
        cached: int,
        pieces: list[list[int]],
        stops: dict[int, str],
        emit: Callable[[Event], None],
        total: int,
        keep: Callable[[str, list[Any]], None],
    ):
        """stops: the numbers of the pieces whose states are kept -> their names. total: tokens of
        the prompt that are read, without those of the answer."""
        self._model = model
        self._keep = keep
        self._names = {i: stops.get(i) for i in range(len(pieces))}
        self.cache, self.cached = cache, cached
        self.left = [Chunk(p, cache, keep=i in stops) for i, p in enumerate(pieces)]
        self.context = cached + self.tokens
        self.reporter = Reporter(emit, total, len(model.layers))
        self.logits: mx.array | None = None
        self.new: dict[str, list[Any]] = {}

    @property
    def tokens(self) -> int:
        """How many are still to be read."""
        return sum(len(piece.tokens) for piece in self.left)

    def took(self, swept: Sequence[ChunkResult]) -> None:
        """The first of the pieces that were left went through a sweep."""
        if not swept:
            return
        self.left = self.left[len(swept) :]
        first = len(self._names) - len(self.left) - len(swept)
        self.reporter.took(sum(len(s.piece.tokens) for s in swept))
        for i, s in enumerate(swept, start=first):
            if s.state is not None:
                self.new[self._names[i]] = s.state
                self._keep(self._names[i], s.state)
        if not self.left:
            self.logits = self._model.logits(swept[-1].hidden)
            mx.eval(self.logits)


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

    def begin(
        self,
        prompt: Prompt,
        emit: Callable[[Event], None],
        *,
        experts: int,
        keep: bool,
        forced: Sequence[int] = (),
    ) -> PromptPrefill:
        """Find what of a prompt has to be read. Nothing is read yet.

        Args:
            emit: takes the progress.
            experts: K.
            keep: look for a kept state, and keep new ones.
            forced: tokens of the answer that are known already.
        """
        tokens = prompt.tokens
        identity = self._identity(experts)
        cache, done = self._longest(prompt, identity) if keep else (None, 0)
        pieces = split([*tokens[done:], *forced], [c - done for c in prompt.cuts if c > done])
        # Of a long history the first and the last state: there the next prompts branch off.
        wanted = {prompt.cuts[0], prompt.cuts[-1]} if keep and prompt.cuts else set()
        ends = accumulate(map(len, pieces), initial=done)
        stops = {
            i: key(identity, tokens[:end])
            for i, end in enumerate(ends, start=-1)
            if end in wanted and end > done
        }
        cache = cache or make_prompt_cache(self._model)
        total = len(tokens) - done
        return PromptPrefill(self._model, cache, done, pieces, stops, emit, total, self._memory.put)

    def store(self, reading: PromptPrefill) -> None:
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
    maths = (ops.pick().NAME, activations, CHUNK_TOKENS, platform.machine())
    text = json.dumps(
        [STATE_VERSION, checkpoint.config, sorted(files.items()), tensors, experts, packages, maths]
    )
    return hashlib.sha256(text.encode()).hexdigest()
