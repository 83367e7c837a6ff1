"""Read the tokenizer of a checkpoint. mlx-lm is imported on first use, not with this module."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..process_limits import check_threads
from .checkpoint import Checkpoint
from .json_files import is_file, show
from .tokenizer_growth import check_growth, check_lengths

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def read_tokenizer(checkpoint: Checkpoint) -> TokenizerWrapper:
    """Return the tokenizer of a checkpoint, as mlx-lm wraps it. No code of the checkpoint is run.

    Each token that it can give has a row in the embedding and in the head.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, it cannot be read, or it has tokens that
            the model does not have.
    """
    from mlx_lm.utils import load_tokenizer

    check_threads()
    file = checkpoint.path / "tokenizer.json"
    # Without this file transformers would make up a tokenizer with a single token.
    if not is_file(file):
        raise _unreadable(checkpoint, f"{file} is missing")
    try:
        with _quiet():
            tokenizer = load_tokenizer(
                checkpoint.path,
                {"trust_remote_code": False},
                eos_token_ids=checkpoint.generation.end_tokens or None,
            )
        _check_tokens(tokenizer, checkpoint)
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # of many kinds; a panic in Rust is no Exception
        raise _unreadable(checkpoint, f"{type(e).__name__}: {show(str(e))}") from e
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of model types that it does not know: only mlx-lm has to."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _unreadable(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} has no tokenizer that can be read ({why}): it needs tokenizer.json and "
        "tokenizer_config.json; download the model again"
    )


def _check_tokens(tokenizer: TokenizerWrapper, checkpoint: Checkpoint) -> None:
    """Check that each token that can be encoded, banned or penalised has rows, and its own id.

    Each row that has no token gets a text, because a model may answer with it.
    """
    where, rows = checkpoint.path / "tokenizer.json", checkpoint.text_config["vocab_size"]
    check_growth(getattr(tokenizer, "backend_tokenizer", None), where)
    # The templates of special tokens, for one text and for two, may give ids of no token.
    around = (*tokenizer.encode("a"), *tokenizer.encode("a", "b"))
    for token in (*around, *tokenizer.eos_token_ids, *tokenizer.all_special_ids):
        if token is not None and token >= rows:
            raise _too_high(where, token, tokenizer.convert_ids_to_tokens(token), rows)
    for letter in string.ascii_letters + string.digits:
        if not tokenizer.encode(letter, add_special_tokens=False):
            raise CheckpointError(
                f"{where} has no token for {letter!r}, and would leave it out of prompts: the file "
                "is corrupt; download it again"
            )
    # mlx-lm's table of texts has an entry for as many ids as there are tokens. With each of them in
    # use, no token is higher and no two are equal: a vocabulary takes a fifth of a second to read.
    texts: list | None = getattr(tokenizer.detokenizer, "tokenmap", None)
    if not texts or None in texts or len(texts) > rows:
        vocabulary = tokenizer.get_vocab()
        check_lengths(vocabulary, where)
        _check_vocabulary(vocabulary, where, rows)
    if not texts:
        return
    check_lengths(texts, where)
    if isinstance(texts[0], bytes):
        texts += [b""] * (rows - len(texts))
    elif None in texts:
        texts[:] = [text or "" for text in tokenizer.convert_ids_to_tokens(range(rows))]


def _check_vocabulary(vocabulary: dict[str, int], where: Path, rows: int) -> None:
    owners: dict[int, str] = {}
    for text, token in vocabulary.items():
        if token >= rows:
            raise _too_high(where, token, text, rows)
        if token in owners:
            raise CheckpointError(
                f"{where} gives both {show(owners[token])} and {show(text)} the id {token}: the "
                "file is corrupt; download it again"
            )
        owners[token] = text


def _too_high(where: Path, token: int, text: str | None, rows: int) -> CheckpointError:
    return CheckpointError(
        f"{where} has token {token}, {show(text)}, but the model has rows for {rows} tokens "
        "(vocab_size): the two are from two checkpoints; download the model again"
    )
