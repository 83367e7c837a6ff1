"""Reads the tokenizer of a checkpoint. mlx-lm is imported on first use, not with the module."""

from __future__ import annotations

from ..errors import CheckpointError
from .checkpoint import Checkpoint


def read_tokenizer(checkpoint: Checkpoint):
    """The checkpoint's tokenizer, as mlx-lm wraps it. None of its code is ever run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from mlx_lm.utils import load_config, load_tokenizer

    try:
        # transformers makes one of a single token where there is none.
        (checkpoint.path / "tokenizer.json").stat()
        return load_tokenizer(
            checkpoint.path,
            {"trust_remote_code": False},
            eos_token_ids=load_config(checkpoint.path).get("eos_token_id"),
        )
    except Exception as e:  # transformers raises many kinds for a broken file
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer that can be read ({type(e).__name__}: {e}): it "
            "needs tokenizer.json and tokenizer_config.json; download the model again"
        ) from e
