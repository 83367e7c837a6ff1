"""Take chunks of token sequences through a model layer by layer. Knows no text.

A pass takes several chunks through one layer before the next layer begins, so each expert is read
once for all of them: a prompt of 4,096 tokens needs most experts of every layer, and would read
them all eight times if each chunk of 512 tokens went through the whole model alone. The chunks may
belong to one sequence or to several. A chunk goes through attention and through its experts as if
it were alone: attention rounds by the size of a chunk, and experts by how many of its tokens they
have. So the split of a sequence into chunks determines every bit of what comes out; the split of
chunks into passes, and what else is in a pass, changes none. Where the backend can, chunks of one
token are one array, which costs less and gives the same bits.

All of this needs to know the layers of a model. Where only mlx-lm knows them, and so
`StreamingMoE.layerwise` is false, each chunk goes through the whole model by mlx-lm's own call.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from ..memory.footprint import CHUNK_TOKENS
from ..streaming.block import ExpertBlock
from ..streaming.compute import Backend
from .streaming_moe import StreamingMoE

#: The most chunks of prompts in a pass.
MAX_CHUNKS = 64


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens of one sequence that go through the model at one time.

    Attributes:
        tokens: their ids.
        cache: mlx-lm's prompt cache of the sequence, which takes them.
        step: they belong to an answer, and are computed as a call of the model computes them, which
            on a GPU is not as those of a prompt are.
        keep: copy the prompt cache after them.
    """

    tokens: Sequence[int]
    cache: list[Any]
    step: bool = False
    keep: bool = False


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """What a pass left of a chunk.

    Attributes:
        hidden: (1, 1, hidden), normed, of its last token; or its logits where the layers are known
            to mlx-lm alone.
        state: a copy of the prompt cache after it, if it was asked for.
    """

    chunk: Chunk
    hidden: mx.array
    state: list[Any] | None


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """Split tokens into chunks of at most CHUNK_TOKENS, none across one of the ascending cuts."""
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        for first in range(start, stop, CHUNK_TOKENS):
            chunks.append(list(tokens[first : min(stop, first + CHUNK_TOKENS)]))
    return chunks


def prefill(
    model: StreamingMoE,
    chunks: Sequence[list[int]],
    cache: list[Any],
    *,
    limit: int = CHUNK_TOKENS,
    keep: Collection[int] = (),
) -> Iterator[list[ChunkResult]]:
    """Take the chunks of a prompt into its cache, pass by pass; yield what each pass left.

    Args:
        limit: tokens of a pass; a single chunk may have more.
        keep: numbers of the chunks after which the prompt cache is copied.
    """
    left = [Chunk(tokens, cache, keep=i in keep) for i, tokens in enumerate(chunks)]
    while left:
        count = chunks_within(left, limit)
        yield run_pass(model, left[:count])
        left = left[count:]


def chunks_within(chunks: Sequence[Chunk], limit: int) -> int:
    """Return how many of the first chunks have at most `limit` tokens together; at least one."""
    count = 1
    while (
        count < min(len(chunks), MAX_CHUNKS)
        and sum(len(c.tokens) for c in chunks[: count + 1]) <= limit
    ):
        count += 1
    return count


def run_pass(model: StreamingMoE, chunks: Sequence[Chunk]) -> list[ChunkResult]:
    """Take chunks into their caches; those of one sequence are given in its order."""
    if not model.layerwise:
        return [_run_alone(model, chunk) for chunk in chunks]
    if not _in_halves(model, chunks):
        (run,) = runs = [_Pass(model, chunks)]
        for _ in run.phases():
            pass
    else:
        middle = len(chunks) // 2
        runs = [_Pass(model, part) for part in (chunks[:middle], chunks[middle:])]
        first, second = (run.phases() for run in runs)
        # One half computes its attention while the other one's experts are read.
        next(first)
        while next(first, _OVER) is not _OVER:
            next(second)
        for _ in second:
            pass
    return [result for run in runs for result in run.results()]


def hidden_states(model: StreamingMoE, texts: Sequence[list[int]]) -> list[mx.array]:
    """Return the hidden states of unrelated texts, computed in one pass.

    Each expert is read once for all of the texts. A text has at most CHUNK_TOKENS tokens, and the
    bits that it has alone.

    Returns:
        (1, tokens, hidden) of each text, normed, which `StreamingMoE.head` takes.
    """
    if not model.layerwise:
        logits = [model(mx.array([text])) for text in texts]
        mx.eval(logits)
        return logits
    no_cache = [None] * len(model.layers)  # nothing comes after these texts
    run = _Pass(model, [Chunk(text, no_cache) for text in texts])
    for _ in run.phases():
        pass
    return run.all_hidden()


def _run_alone(model: StreamingMoE, chunk: Chunk) -> ChunkResult:
    """Take one chunk through a model whose layers are known to mlx-lm alone, by its own call."""
    logits = model.next_logits(list(chunk.tokens), chunk.cache)
    states = [c.state for c in chunk.cache]
    if chunk.step:
        mx.eval(logits, states)
    else:
        mx.eval(states)  # the logits of most chunks of a prompt are never asked for
        mx.clear_cache()
    return ChunkResult(chunk, logits[:, None], copy.deepcopy(chunk.cache) if chunk.keep else None)


_OVER = object()


def _in_halves(model: StreamingMoE, chunks: Sequence[Chunk]) -> bool:
    """Whether all are of answers, whose experts need not leave for each other's."""
    return (
        len(chunks) > 1
        and all(chunk.step for chunk in chunks)
        and sum(len(chunk.tokens) for chunk in chunks) * model.experts
        <= model.elastic_slots.per_layer
    )


class _Pass:
    """Chunks on their way through the layers, in groups that are one array each."""

    def __init__(self, model: StreamingMoE, chunks: Sequence[Chunk]):
        self._backend = model.backend
        self._inner = model.text.model
        self._chunks = chunks
        self._groups = _groups(chunks, model.backend.stacks_sequences)
        self._hidden = [
            self._inner.embed_tokens(mx.array([chunk.tokens for chunk in group]))
            for group in self._groups
        ]
        self._states: dict[Chunk, list[Any]] = {chunk: [] for chunk in chunks}
        self._started: Any = []

    def phases(self) -> Iterator[None]:
        """Yield thrice a layer: when attention is computed, reads are started, experts are done."""
        hidden, steps = self._hidden, [group[0].step for group in self._groups]
        for index, layer in enumerate(self._inner.layers):
            normed = [self._attend(i, index, layer) for i in range(len(hidden))]
            yield
            results = _through_block(layer.mlp, normed, hidden, steps)
            yield
            for i, y in enumerate(results):
                hidden[i] = y
                if not steps[i]:
                    self._settle(y)
            if not all(steps) and mx.get_cache_memory() > self._backend.kept_nbytes:
                mx.clear_cache()
            yield

    def _attend(self, i: int, index: int, layer: nn.Module) -> mx.array:
        """Run the attention of layer `index` for group `i`; return the normed hidden state."""
        chunk, *others = self._groups[i]
        c = chunk.cache[index]
        if others:
            caches = [chunk.cache[index] for chunk in self._groups[i]]
            self._hidden[i], normed = _attend_sequences(layer, self._hidden[i], caches)
            return normed
        self._hidden[i], normed = _attend_chunk(
            self._backend, layer, self._hidden[i], c, chunk.step
        )
        if not chunk.step:
            # One chunk at a time: its scores are what takes the memory.
            self._settle(self._hidden[i], normed, [] if c is None else c.state)
        if chunk.keep:
            self._states[chunk].append(copy.deepcopy(c))
        return normed

    def _settle(self, *arrays: Any) -> None:
        """Evaluate arrays of a prompt; where it pays, only start that and wait for those before."""
        if self._backend.kept_nbytes:
            mx.async_eval(arrays)
            mx.eval(self._started)
            self._started = arrays
        else:
            mx.eval(arrays)

    def all_hidden(self) -> list[mx.array]:
        """Return the hidden states of each chunk, (1, tokens, hidden), normed.

        Only for chunks that are groups of their own.
        """
        hidden = [self._inner.norm(h) for h in self._hidden]
        mx.eval(hidden)
        return hidden

    def results(self) -> list[ChunkResult]:
        """Return what the pass left of each chunk, in the order in which they were given."""
        ends: dict[Chunk, mx.array] = {}
        for group, h in zip(self._groups, self._hidden, strict=True):
            normed = self._inner.norm(h[:, -1:])
            ends |= {chunk: normed[i : i + 1] for i, chunk in enumerate(group)}
        mx.eval(
            list(ends.values()),
            [[c.state for c in chunk.cache] for chunk in self._chunks if chunk.step],
        )
        return [
            ChunkResult(chunk, ends[chunk], self._states[chunk] if chunk.keep else None)
            for chunk in self._chunks
        ]


def _groups(chunks: Sequence[Chunk], stacks: bool) -> list[list[Chunk]]:
    """Put answer chunks of one token into one group, the last, where they can be one array."""
    ones = [c for c in chunks if stacks and c.step and len(c.tokens) == 1 and not c.keep]
    groups = [[c] for c in chunks if c not in ones]
    return [*groups, ones] if ones else groups


def _attend_chunk(
    backend: Backend, layer: nn.Module, x: mx.array, cache: Any, step: bool
) -> tuple[mx.array, mx.array]:
    """Return x with what attention adds to it, and its norm."""
    attended = _attention(layer, x, cache)
    if step:
        return backend.add_and_norm(layer, x, attended)
    h = x + attended
    return h, layer.post_attention_layernorm(h)


def _attend_sequences(layer: nn.Module, x: mx.array, caches) -> tuple[mx.array, mx.array]:
    """Do the same for one token of each of several sequences, x (sequences, 1, hidden)."""
    attention = layer.linear_attn if getattr(layer, "is_linear", False) else layer.self_attn
    h = x + attention.attend_sequences(layer.input_layernorm(x), caches)
    return h, layer.post_attention_layernorm(h)


def _through_block(block: nn.Module, normed, hidden, steps: Sequence[bool]) -> Iterator[mx.array]:
    """Return hidden + block(normed) of each group, in turn. Starts the reads at once.

    steps: whether the groups are of answers. Those leave the last sum to a block that can do it in
    one launch.
    """
    if not isinstance(block, ExpertBlock):
        return (h + block(x) for h, x in zip(hidden, normed, strict=True))
    given = [
        h if step and block.fuses_residual else None for h, step in zip(hidden, steps, strict=True)
    ]
    outputs = block.run(normed, given)
    return (y if r is not None else h + y for h, r, y in zip(hidden, given, outputs, strict=True))


def _attention(layer: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """Return what attention adds to x. The masks are those that mlx-lm's models make."""
    if getattr(layer, "is_linear", False):
        return layer.linear_attn(layer.input_layernorm(x), create_ssm_mask(x, cache), cache)
    return layer.self_attn(layer.input_layernorm(x), create_attention_mask(x, cache), cache)
