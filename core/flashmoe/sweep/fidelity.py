"""How far a version of a model is from the exact one, on text that both are made to say.

The logits of the exact model lie in a file, float32 (tokens, vocabulary): 1 MB a token for a large
vocabulary, and all versions are held against it. Memory holds a few rows of logits at a time and
the hidden states of the tokens of a sweep, which the memory plan has room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..files import replacing
from ..models.layerwise import hidden_states
from ..models.qwen_moe import StreamingMoE
from .documents import Document

#: Bytes of a block of logits, in float64. There are a few of them.
BLOCK_NBYTES = 32 * 2**20


@dataclass(frozen=True)
class Fidelity:
    """Means over `tokens` predicted tokens, in nats; errors are standard errors of them, from how
    documents differ, None for one document.

    nll: -log p of the text's tokens. excess: by how much that is above the exact model's.
    kl: of the version's distribution from the exact one. same_top: share of tokens whose likeliest
    token is the exact model's.
    """

    tokens: int
    nll: float
    excess: float
    excess_error: float | None
    kl: float
    kl_error: float | None
    same_top: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def exact_nbytes(tokens: int, vocabulary: int) -> int:
    """Bytes of the file that `keep_exact` writes."""
    return tokens * vocabulary * 4


def keep_exact(
    model: StreamingMoE,
    documents: list[Document],
    file: Path,
    advance: Callable[[int], None] = lambda documents: None,
) -> None:
    """Write the logits of the exact model. The file has its name when it is whole."""
    with replacing(file) as partial, open(partial, "wb") as f:
        for _, rows in _logits(model, documents, advance):
            f.write(rows.data)


def compare(
    model: StreamingMoE,
    documents: list[Document],
    file: Path,
    advance: Callable[[int], None] = lambda documents: None,
) -> Fidelity:
    """A model, with the K that it has now, against the exact logits in a file.

    Raises:
        CheckpointError: it gives logits that are no finite numbers.
    """
    # Sums over each document: of -log p, of its excess, of KL, of equal likeliest tokens.
    sums = np.zeros((len(documents), 4))
    counts = np.array([len(d.predicted) for d in documents])
    targets = np.array([token for d in documents for token in d.predicted])
    owners = np.repeat(np.arange(len(documents)), counts)
    width = model.checkpoint.text_config["vocab_size"]
    with open(file, "rb") as f:
        for start, rows in _logits(model, documents, advance):
            f.seek(exact_nbytes(start, width))
            exact = np.frombuffer(f.read(rows.nbytes), np.float32).reshape(rows.shape)
            here = slice(start, start + len(rows))
            np.add.at(sums, owners[here], differences(exact, rows, targets[here]))
    mean, error = means(sums, counts)
    return Fidelity(
        tokens=int(counts.sum()),
        nll=float(mean[0]),
        excess=float(mean[1]),
        excess_error=error and error[1],
        kl=float(mean[2]),
        kl_error=error and error[2],
        same_top=float(mean[3]),
    )


def differences(exact: np.ndarray, found: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of logits (rows, vocabulary) and tokens (rows,): (rows, 4) of -log p by `found`, its excess
    over that by `exact`, KL(exact || found), 1 where both have the same likeliest token."""
    p, q = _log_softmax(exact), _log_softmax(found)
    rows = np.arange(len(targets))
    nll = -q[rows, targets]
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = exact.argmax(axis=1) == found.argmax(axis=1)
    return np.stack([nll, nll + p[rows, targets], kl, same], axis=1)


def means(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, list[float] | None]:
    """The means a token of sums (documents, n), and their standard errors.

    Tokens of a document are alike, so the documents are what was drawn: a ratio of two sums.
    """
    total, documents = counts.sum(), len(counts)
    mean = sums.sum(axis=0) / total
    if documents < 2:
        return mean, None
    spread = np.square(sums - counts[:, None] * mean).sum(axis=0) * documents / (documents - 1)
    return mean, [float(x) for x in np.sqrt(spread) / total]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _logits(
    model: StreamingMoE, documents: list[Document], advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row among all, float32 (rows, vocabulary)) of the predicted tokens."""
    most = max(1, BLOCK_NBYTES // (8 * model.checkpoint.text_config["vocab_size"]))
    done = 0
    for group in _groups(model, documents):
        states = hidden_states(model, [d.tokens for d in group])
        for document, hidden in zip(group, states, strict=True):
            for start in range(document.first - 1, len(document.tokens) - 1, most):
                stop = min(start + most, len(document.tokens) - 1)
                logits = model.head(hidden[:, start:stop])[0].astype(mx.float32)
                rows = np.array(logits)
                if not np.isfinite(rows).all():
                    raise CheckpointError(
                        f"{model.checkpoint.path} gives logits that are no finite numbers: it is "
                        "corrupt, or not of this kind; download it again"
                    )
                yield done, rows
                done += len(rows)
            advance(1)


def _groups(model: StreamingMoE, documents: list[Document]) -> Iterator[list[Document]]:
    """The documents of each sweep: as many as memory has room for."""
    total, longest = sum(len(d.tokens) for d in documents), max(len(d.tokens) for d in documents)
    limit = model.elastic_slots.fit_prefill(total, [longest], model.experts)
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and size + len(document.tokens) > limit:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.tokens)
    yield group
