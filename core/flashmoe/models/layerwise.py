"""Takes pieces of token sequences through the model, layer by layer. Knows no text.

A sweep takes several pieces through one layer before the next layer begins, so each expert is read
once for all of them: a prompt of 4,096 tokens needs most experts of every layer, and would read
them all eight times if each piece of 512 tokens went through the whole model alone. The pieces may
be of one sequence or of several. A piece goes through attention and through its experts as if it
were alone: attention rounds by the size of a piece, and experts by how many of its tokens they
have. So the split of a sequence into pieces settles every bit of what comes out, and the split of
pieces into sweeps, or what else is in one, none. Where the ops can, pieces of one token are one
array, which costs less and gives the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from ..events import Progress
from ..memory.footprint import CHUNK_TOKENS
from .qwen_moe import StreamingMoE

#: Pieces of prompts in a sweep.
MAX_CHUNKS = 64

#: Seconds between two reports from inside a sweep.
REPORT_SECONDS = 0.25


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens that go through the model at one time.

    Attributes:
        cache: mlx-lm's prompt cache of their sequence, which takes them.
        step: they are of an answer, and are computed as a call of the model computes them, which
            on a GPU is not as those of a prompt are.
        keep: copy the state after them.
    """

    tokens: Sequence[int]
    cache: list[Any]
    step: bool = False
    keep: bool = False


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """What a sweep left of a piece.

    Attributes:
        hidden: (1, 1, hidden), normed, of its last token.
        state: a copy of the prompt cache after it, if it was asked for.
    """

    piece: Chunk
    hidden: mx.array
    state: list[Any] | None


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """Pieces of at most PIECE_TOKENS tokens, none across one of the cuts, which ascend."""
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        for first in range(start, stop, CHUNK_TOKENS):
            pieces.append(list(tokens[first : min(stop, first + CHUNK_TOKENS)]))
    return pieces


def prefill(
    model: StreamingMoE,
    pieces: Sequence[list[int]],
    cache: list[Any],
    *,
    limit: int = CHUNK_TOKENS,
    keep: Collection[int] = (),
) -> Iterator[list[ChunkResult]]:
    """Take the pieces of a prompt into its cache, sweep by sweep.

    Args:
        limit: tokens of a sweep; a piece alone may have more.
        keep: numbers of the pieces after which the state is copied.
    """
    left = [Chunk(tokens, cache, keep=i in keep) for i, tokens in enumerate(pieces)]
    while left:
        count = fitting(left, limit)
        yield sweep(model, left[:count])
        left = left[count:]


def fitting(pieces: Sequence[Chunk], limit: int) -> int:
    """How many of the pieces have at most `limit` tokens together; one at least."""
    count = 1
    while (
        count < min(len(pieces), MAX_CHUNKS)
        and sum(len(p.tokens) for p in pieces[: count + 1]) <= limit
    ):
        count += 1
    return count


def sweep(model: StreamingMoE, pieces: Sequence[Chunk]) -> list[ChunkResult]:
    """Take pieces into their caches. Those of one sequence are in its order."""
    if not _in_halves(model, pieces):
        (run,) = runs = [_Run(model, pieces)]
        for _ in run.phases():
            pass
    else:
        middle = len(pieces) // 2
        runs = [_Run(model, part) for part in (pieces[:middle], pieces[middle:])]
        first, second = (run.phases() for run in runs)
        # One half looks at its attention while the other one's experts are read.
        next(first)
        while next(first, _OVER) is not _OVER:
            next(second)
        for _ in second:
            pass
    return [swept for run in runs for swept in run.end()]


def together(model: StreamingMoE, texts: Sequence[list[int]]) -> list[mx.array]:
    """The hidden states (1, tokens, hidden), normed, of texts that know nothing of each other: one
    sweep, so that each expert is read once for all of them. Each has at most PIECE_TOKENS tokens,
    and the same bits as if it were alone."""
    no_cache = [None] * len(model.layers)  # nothing comes after these texts
    run = _Run(model, [Chunk(text, no_cache) for text in texts])
    for _ in run.phases():
        pass
    return run.all_hidden()


_OVER = object()


def _in_halves(model: StreamingMoE, pieces: Sequence[Chunk]) -> bool:
    """Answers of several sequences, whose experts need not leave for each other's."""
    return (
        len(pieces) > 1
        and all(piece.step for piece in pieces)
        and sum(len(piece.tokens) for piece in pieces) * model.experts <= model.room.slots
    )


class _Run:
    """Pieces on their way through the layers, in groups that are one array each."""

    def __init__(self, model: StreamingMoE, pieces: Sequence[Chunk]):
        self._inner = model.text.model
        self._pieces = pieces
        self._groups = _groups(pieces, model.stacks)
        self._hidden = [
            self._inner.embed_tokens(mx.array([piece.tokens for piece in group]))
            for group in self._groups
        ]
        self._states: dict[Chunk, list[Any]] = {piece: [] for piece in pieces}

    def phases(self) -> Iterator[None]:
        """Three for each layer: attention was computed; the reads have been started; its experts
        were computed."""
        hidden, steps = self._hidden, [group[0].step for group in self._groups]
        for index, layer in enumerate(self._inner.layers):
            normed = [self._attend(i, index, layer) for i in range(len(hidden))]
            yield
            results = _through_block(layer.mlp, normed, hidden, steps)
            yield
            for i, y in enumerate(results):
                hidden[i] = y
                if not steps[i]:
                    mx.eval(y)
            if not all(steps):
                mx.clear_cache()
            yield

    def _attend(self, i: int, index: int, layer: nn.Module) -> mx.array:
        """Add what attention does to a group; its norm."""
        piece, *others = self._groups[i]
        c = piece.cache[index]
        if others:
            caches = [piece.cache[index] for piece in self._groups[i]]
            self._hidden[i], normed = _attended_rows(layer, self._hidden[i], caches)
            return normed
        self._hidden[i], normed = _attended(layer, self._hidden[i], c, piece.step)
        if not piece.step:
            # One piece at a time: its scores are what takes the memory.
            mx.eval(self._hidden[i], normed, [] if c is None else c.state)
        if piece.keep:
            self._states[piece].append(copy.deepcopy(c))
        return normed

    def all_hidden(self) -> list[mx.array]:
        """(1, tokens, hidden) of each piece, normed. None is in a group with others."""
        found = [self._inner.norm(h) for h in self._hidden]
        mx.eval(found)
        return found

    def end(self) -> list[ChunkResult]:
        ends: dict[Chunk, mx.array] = {}
        for group, h in zip(self._groups, self._hidden, strict=True):
            normed = self._inner.norm(h[:, -1:])
            ends |= {piece: normed[i : i + 1] for i, piece in enumerate(group)}
        mx.eval(
            list(ends.values()),
            [[c.state for c in piece.cache] for piece in self._pieces if piece.step],
        )
        return [
            ChunkResult(piece, ends[piece], self._states[piece] if piece.keep else None)
            for piece in self._pieces
        ]


def _groups(pieces: Sequence[Chunk], stacks: bool) -> list[list[Chunk]]:
    """Those of answers and of one token in one group, at the end, where they can be one array."""
    ones = [p for p in pieces if stacks and p.step and len(p.tokens) == 1 and not p.keep]
    groups = [[p] for p in pieces if p not in ones]
    return [*groups, ones] if ones else groups


def _attended(layer: nn.Module, x: mx.array, cache: Any, step: bool) -> tuple[mx.array, mx.array]:
    """x with what attention adds to it, and its norm."""
    r = _attention(layer, x, cache)
    if step and hasattr(type(layer), "sum_and_norm"):
        return layer.sum_and_norm(x, r)
    h = x + r
    return h, layer.post_attention_layernorm(h)


def _attended_rows(layer: nn.Module, x: mx.array, caches) -> tuple[mx.array, mx.array]:
    """The same for one token of each of several sequences, x (R, 1, hidden)."""
    attention = layer.linear_attn if getattr(layer, "is_linear", False) else layer.self_attn
    h = x + attention.rows(layer.input_layernorm(x), caches)
    return h, layer.post_attention_layernorm(h)


def _through_block(block: nn.Module, normed, hidden, steps: Sequence[bool]) -> Iterator[mx.array]:
    """What a layer gives for each group: hidden + block(normed). Starts the reads at once.

    steps: whether they are of answers.
    """
    if not hasattr(type(block), "with_residual"):
        outputs = block.sweep(normed) if hasattr(block, "sweep") else map(block, normed)
        return (h + y for h, y in zip(hidden, outputs, strict=True))
    # Answers leave the last sum to the block.
    left = [h if step else None for h, step in zip(hidden, steps, strict=True)]
    outputs = block.sweep(normed, left)
    return (y if r is not None else h + y for h, r, y in zip(hidden, left, outputs, strict=True))


def _attention(layer: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """What attention adds to x. The masks are those that mlx-lm's models make."""
    if getattr(layer, "is_linear", False):
        return layer.linear_attn(layer.input_layernorm(x), create_ssm_mask(x, cache), cache)
    return layer.self_attn(layer.input_layernorm(x), create_attention_mask(x, cache), cache)


class Reporter:
    """Tells how far a prompt has been read, after each sweep and a few times a second inside one.

    Args:
        emit: takes the events.
        total: tokens to read. layers: of the model.
    """

    def __init__(self, emit: Callable[[Progress], None], total: int, layers: int):
        self._emit = emit
        self._total = total
        self._layers = layers
        self._done = 0
        self._last = perf_counter()

    def entered(self, layer: int) -> None:
        """The sweep under way has reached a layer."""
        if perf_counter() - self._last >= REPORT_SECONDS:
            self._report(layer)

    def took(self, tokens: int) -> None:
        """A sweep is done."""
        # Tokens that a grammar forced are read with the prompt, and are not of it.
        self._done = min(self._total, self._done + tokens)
        self._report(self._layers)

    def _report(self, layer: int) -> None:
        self._last = perf_counter()
        self._emit(Progress(self._done, self._total, layer, self._layers))
