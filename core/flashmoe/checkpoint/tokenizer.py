"""Read the tokenizer of a checkpoint. mlx-lm is imported on first use, not with this module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .json_files import is_file, show

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

    file = checkpoint.path / "tokenizer.json"
    # Without this file transformers would make up a tokenizer with a single token.
    if not is_file(file):
        raise _unreadable(checkpoint, f"{file} is missing")
    try:
        tokenizer = load_tokenizer(
            checkpoint.path,
            {"trust_remote_code": False},
            eos_token_ids=checkpoint.generation.end_tokens or None,
        )
        _check_tokens(tokenizer, checkpoint)
        _fill_holes(tokenizer, checkpoint.text_config["vocab_size"])
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # of many kinds; a panic in Rust is no Exception
        raise _unreadable(checkpoint, f"{type(e).__name__}: {show(str(e))}") from e
    return tokenizer


def _unreadable(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} has no tokenizer that can be read ({why}): it needs tokenizer.json and "
        "tokenizer_config.json; download the model again"
    )


def _check_tokens(tokenizer: TokenizerWrapper, checkpoint: Checkpoint) -> None:
    """Check that each token that can be encoded, banned or penalised has its rows."""
    rows = checkpoint.text_config["vocab_size"]
    vocabulary = tokenizer.get_vocab()
    # The template of special tokens gives ids that no vocabulary needs to have.
    around = tokenizer.encode("a", "b")
    highest = max((*around, *tokenizer.eos_token_ids, max(vocabulary.values(), default=0)))
    if highest >= rows:
        text = next((text for text, token in vocabulary.items() if token == highest), None)
        raise CheckpointError(
            f"{checkpoint.path / 'tokenizer.json'} has token {highest}, {show(text)}, but the "
            f"model has rows for {rows} tokens (vocab_size): the two are from two checkpoints; "
            "download the model again"
        )


def _fill_holes(tokenizer: TokenizerWrapper, rows: int) -> None:
    """Give each row that has no token a text: a model may answer with it.

    mlx-lm's table of texts has as many entries as there are tokens, with None for an id that is
    left out before the last one.
    """
    texts = getattr(tokenizer.detokenizer, "tokenmap", [])
    if texts and isinstance(texts[0], bytes):
        texts += [b""] * (rows - len(texts))
    elif None in texts:
        texts[:] = [text or "" for text in tokenizer.convert_ids_to_tokens(range(rows))]
