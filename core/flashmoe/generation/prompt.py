"""Prefill prompts: from the longest prompt cache entry, keeping new entries on the way.

A prompt is split at its cuts whether an entry is found or not. How it is split changes the last
bits of what comes out, so only this makes an answer after a restored entry equal, bit for bit, to
the answer after a prefill of the whole prompt.
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
from time import perf_counter
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..chat.template import Prompt
from ..checkpoint.checkpoint import Checkpoint
from ..events import Event, Progress
from ..memory.footprint import CHUNK_TOKENS
from ..models.layerwise import Chunk, ChunkResult, split
from ..models.streaming_moe import StreamingMoE
from .prompt_cache import PromptCache, PromptStore, Trail, entry_name

#: Counts changes of what a prompt cache entry means.
STATE_VERSION = 2

#: Seconds between two reports from inside a pass.
REPORT_SECONDS = 0.25


class ProgressReporter:
    """Reports how far a prefill is, after each pass and a few times a second inside one.

    Args:
        emit: takes the events.
        total: tokens to prefill.
        layers: layers of the model.
    """

    def __init__(self, emit: Callable[[Event], None], total: int, layers: int):
        self._emit = emit
        self._total = total
        self._layers = layers
        self._done = 0
        self._last = perf_counter()

    def layer_entered(self, layer: int) -> None:
        """Report that the pass under way has reached a layer, unless a report was just made."""
        if perf_counter() - self._last >= REPORT_SECONDS:
            self._report(layer)

    def pass_done(self, tokens: int) -> None:
        """Report that a pass has prefilled `tokens` tokens."""
        # Tokens that a grammar forced are prefilled with the prompt, and do not belong to it.
        self._done = min(self._total, self._done + tokens)
        self._report(self._layers)

    def _report(self, layer: int) -> None:
        self._last = perf_counter()
        self._emit(Progress(self._done, self._total, layer, self._layers))


class PromptPrefill:
    """A prompt on its way into the model, pass by pass.

    Args:
        cache: mlx-lm's prompt cache, which takes the prompt.
        cached: tokens that `cache` holds already.
        chunks: the tokens still to be prefilled, with those of the answer that are known already.
        entries: the numbers of the chunks after which the prompt cache is kept -> the names of the
            entries.
        reporter: reports the progress.
        keep: takes the name and the prompt cache of a new entry.

    Attributes:
        left: the chunks that are still to be prefilled.
        context: tokens of the prompt, with those of the answer that are known already.
        logits: (1, vocabulary) after the last token; None before the whole prompt is prefilled.
        new_entries: the prompt cache entries that this prompt made, by name.
    """

    def __init__(
        self,
        model: StreamingMoE,
        cache: list[Any],
        cached: int,
        chunks: list[list[int]],
        entries: dict[int, str],
        reporter: ProgressReporter,
        keep: Callable[[str, list[Any]], None],
    ):
        self._model = model
        self._keep = keep
        self._entries = entries
        self._count = len(chunks)
        self.cache, self.cached = cache, cached
        self.left = [Chunk(tokens, cache, keep=i in entries) for i, tokens in enumerate(chunks)]
        self.context = cached + self.tokens
        self.reporter = reporter
        self.logits: mx.array | None = None
        self.new_entries: dict[str, list[Any]] = {}

    @property
    def tokens(self) -> int:
        """Tokens that are still to be prefilled."""
        return sum(len(chunk.tokens) for chunk in self.left)

    def record(self, results: Sequence[ChunkResult]) -> None:
        """Record that a pass has processed the first of the chunks that were left."""
        if not results:
            return
        self.left = self.left[len(results) :]
        first = self._count - len(self.left) - len(results)
        self.reporter.pass_done(sum(len(r.chunk.tokens) for r in results))
        for i, result in enumerate(results, start=first):
            if result.state is not None:
                self.new_entries[self._entries[i]] = result.state
                self._keep(self._entries[i], result.state)
        if not self.left:
            self.logits = self._model.logits(results[-1].hidden)
            mx.eval(self.logits)


class PromptReader:
    """Starts the prefill of prompts for one model.

    Args:
        memory: holds prompt cache entries for this process.
        store: holds them for the next process; None: nothing does.
    """

    def __init__(self, model: StreamingMoE, memory: PromptCache, store: PromptStore | None):
        self._model = model
        self._memory = memory
        self._store = store
        self._identity = lru_cache(
            partial(
                state_identity,
                model.checkpoint,
                backend=model.backend.name,
                activations=model.activations,
            )
        )

    def start(
        self,
        prompt: Prompt,
        emit: Callable[[Event], None],
        *,
        experts: int,
        keep: bool,
        forced: Sequence[int] = (),
    ) -> PromptPrefill:
        """Look for a prompt cache entry and split the rest of a prompt into chunks.

        No chunk goes through the model yet.

        Args:
            emit: takes the progress.
            experts: K.
            keep: look for a prompt cache entry, and keep new ones.
            forced: tokens of the answer that are known already.
        """
        tokens = prompt.tokens
        identity = self._identity(experts)
        cache, done = self._longest(prompt, identity) if keep else (None, 0)
        chunks = split([*tokens[done:], *forced], [c - done for c in prompt.cuts if c > done])
        # Of a long history the first and the last entry: there the next prompts branch off.
        wanted = {prompt.cuts[0], prompt.cuts[-1]} if keep and prompt.cuts else set()
        ends = accumulate(map(len, chunks), initial=done)
        entries = {
            i: entry_name(identity, tokens[:end])
            for i, end in enumerate(ends, start=-1)
            if end in wanted and end > done
        }
        cache = cache or make_prompt_cache(self._model)
        reporter = ProgressReporter(emit, len(tokens) - done, len(self._model.layers))
        trails = {
            entry_name(identity, tokens[:cut]): Trail(
                identity, tuple(tokens[:cut]), tuple(c for c in prompt.cuts if c <= cut)
            )
            for cut in wanted
        }

        def keep_entry(name: str, state: list[Any]) -> None:
            self._memory.put(name, state, trails[name])

        return PromptPrefill(self._model, cache, done, chunks, entries, reporter, keep_entry)

    def store(self, prefill: PromptPrefill) -> None:
        """Keep the new entries of a prompt for the next process."""
        if self._store is not None:
            for name, cache in prefill.new_entries.items():
                self._store.put(name, cache)

    def _longest(self, prompt: Prompt, identity: str) -> tuple[list[Any] | None, int]:
        """Return the entry that holds most of the prompt, and how many tokens it holds."""
        empty = make_prompt_cache(self._model)
        for cut in reversed(prompt.cuts):
            name = entry_name(identity, prompt.tokens[:cut])
            cache = self._memory.get(name)
            if cache is None:
                cache = self._memory.get_trimmed(identity, prompt.tokens, prompt.cuts, cut)
            if cache is None and self._store is not None:
                cache = self._store.get(name, empty)
                if cache is not None:
                    self._memory.put(name, copy.deepcopy(cache))
            if cache is not None:
                return cache, cut
        return None, 0


def state_identity(checkpoint: Checkpoint, experts: int, *, backend: str, activations: str) -> str:
    """Return a hash of what an entry depends on besides its tokens.

    That is the weights, K, the packages that compute, and how they compute.

    Args:
        experts: K.
        backend: the name of the backend.
    """
    tensors = [(t.name, t.dtype, t.shape, t.start) for t in checkpoint.tensors.values()]
    packages = [version(name) for name in ("llm-flashmoe", "mlx", "mlx-lm", "numba")]
    maths = (backend, activations, CHUNK_TOKENS, platform.machine())
    text = json.dumps(
        [
            STATE_VERSION,
            checkpoint.config,
            checkpoint.files_identity,
            tensors,
            experts,
            packages,
            maths,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()
