"""Measures how far a version of a model is from the exact model on the same text.

The logits of the exact model are stored in a file as float32 (tokens, vocabulary), 1 MB per token
for a large vocabulary, and all versions are compared with them. Memory holds a few rows of logits
at a time, and the hidden states of the tokens of one pass, for which the memory plan keeps space.
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
from ..models.streaming_moe import StreamingMoE
from .documents import EvalDocument

#: Bytes of a block of logits in float64. A few blocks exist at the same time.
BLOCK_NBYTES = 32 * 2**20


@dataclass(frozen=True)
class Fidelity:
    """Means over the predicted tokens, in nats, and their standard errors.

    Standard errors are from the differences between documents; None if there is only one document.

    Attributes:
        tokens: number of predicted tokens.
        nll: -log p of the tokens of the text.
        excess: difference of `nll` to that of the exact model.
        excess_error: its standard error.
        kl: KL divergence of the version's distribution from the exact one.
        kl_error: its standard error.
        same_top: share of tokens at which both models have the same most likely token.
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
        """exp of `nll`."""
        return math.exp(self.nll)


def exact_logits_nbytes(tokens: int, vocabulary: int) -> int:
    """Return the size of the file that `save_exact_logits` writes."""
    return tokens * vocabulary * 4


def save_exact_logits(
    model: StreamingMoE,
    documents: list[EvalDocument],
    file: Path,
    advance: Callable[[int], None] = lambda documents: None,
) -> None:
    """Write the logits of the exact model. The file gets its name only when it is complete.

    Args:
        advance: called with 1 after each document.

    Raises:
        CheckpointError: logits are not finite.
    """
    with replacing(file) as partial, open(partial, "wb") as f:
        for _, rows in _logits(model, documents, advance):
            f.write(rows.data)


def compare_with_exact(
    model: StreamingMoE,
    documents: list[EvalDocument],
    file: Path,
    advance: Callable[[int], None] = lambda documents: None,
) -> Fidelity:
    """Compare a model, with its current K, with the exact logits in a file.

    Args:
        file: written by `save_exact_logits` for the same documents.
        advance: called with 1 after each document.

    Raises:
        CheckpointError: logits are not finite.
    """
    # Sums over each document: -log p, its excess, KL, and equal most likely tokens.
    sums = np.zeros((len(documents), 4))
    counts = np.array([len(d.predicted) for d in documents])
    targets = np.array([token for d in documents for token in d.predicted])
    owners = np.repeat(np.arange(len(documents)), counts)
    width = model.checkpoint.text_config["vocab_size"]
    with open(file, "rb") as f:
        for start, rows in _logits(model, documents, advance):
            f.seek(exact_logits_nbytes(start, width))
            exact = np.frombuffer(f.read(rows.nbytes), np.float32).reshape(rows.shape)
            here = slice(start, start + len(rows))
            np.add.at(sums, owners[here], token_differences(exact, rows, targets[here]))
    mean, error = mean_and_error(sums, counts)
    return Fidelity(
        tokens=int(counts.sum()),
        nll=float(mean[0]),
        excess=float(mean[1]),
        excess_error=None if error is None else error[1],
        kl=float(mean[2]),
        kl_error=None if error is None else error[2],
        same_top=float(mean[3]),
    )


def token_differences(exact: np.ndarray, other: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compare two models at each token.

    Args:
        exact, other: logits (rows, vocabulary).
        targets: the tokens of the text, (rows,).

    Returns:
        float64 (rows, 4): -log p of the token by `other`, its excess over that by `exact`,
        KL(exact || other), and 1 if both have the same most likely token.
    """
    p, q = _log_softmax(exact), _log_softmax(other)
    rows = np.arange(len(targets))
    nll = -q[rows, targets]
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = exact.argmax(axis=1) == other.argmax(axis=1)
    return np.stack([nll, nll + p[rows, targets], kl, same], axis=1)


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, list[float] | None]:
    """Return means per token and their standard errors, which are None for one document.

    The tokens of a document are similar to each other, so the sample consists of documents: the
    mean is a ratio of two sums over documents, and the error is the standard error of that ratio.

    Args:
        sums: (documents, n), sums over the tokens of each document.
        counts: (documents,), tokens of each document.
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
    model: StreamingMoE, documents: list[EvalDocument], advance: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield logits of predicted tokens: (index of the first row, float32 (rows, vocabulary))."""
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
                        f"{model.checkpoint.path} computes logits that are not finite numbers: it "
                        "is corrupt or of an unsupported kind, download it again"
                    )
                yield done, rows
                done += len(rows)
            advance(1)


def _groups(model: StreamingMoE, documents: list[EvalDocument]) -> Iterator[list[EvalDocument]]:
    """Yield the documents of each pass through the layers: as many as fit into memory."""
    total, longest = sum(len(d.tokens) for d in documents), max(len(d.tokens) for d in documents)
    limit = model.elastic_slots.fit_prefill(total, [longest], model.experts)
    group: list[EvalDocument] = []
    size = 0
    for document in documents:
        if group and size + len(document.tokens) > limit:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.tokens)
    yield group
