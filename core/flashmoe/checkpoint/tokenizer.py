"""Read the tokenizer of a checkpoint. mlx-lm is imported on first use, not with this module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def read_tokenizer(checkpoint: Checkpoint) -> TokenizerWrapper:
    """Return the tokenizer of a checkpoint, as mlx-lm wraps it. No code of the checkpoint is run.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, or it cannot be read.
    """
    from mlx_lm.utils import load_config, load_tokenizer

    try:
        # Without this file transformers would make up a tokenizer with a single token.
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
