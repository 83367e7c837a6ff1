"""Read generation_config.json: the tokens that end an answer, and how tokens are sampled."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .json_files import read_object
from .limits import check_sampling, end_tokens


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generation.

    Attributes:
        end_tokens: the ids that end an answer, besides those of the tokenizer.
        sampling: temperature, top_p, top_k and min_p, as far as the checkpoint has them.
    """

    end_tokens: list[int] = field(default_factory=list)
    sampling: dict[str, float] = field(default_factory=dict)


def read_generation_config(
    path: Path, config: dict[str, Any], text_config: dict[str, Any]
) -> GenerationConfig:
    """Read what generation_config.json of a checkpoint says; the file may be missing.

    Args:
        path: the checkpoint directory.
        config: the content of config.json, whose end tokens count where that file has none.
        text_config: from `parse_text_config`.

    Raises:
        CheckpointError: a value is impossible, or the file is damaged.
    """
    rows = text_config["vocab_size"]
    # Checked although mlx-lm does not read it: other programs do.
    end_tokens(text_config.get("eos_token_id"), rows, path / "config.json")
    ends = end_tokens(config.get("eos_token_id"), rows, path / "config.json")
    file = path / "generation_config.json"
    if not os.path.lexists(file):
        return GenerationConfig(ends)
    own = read_object(file)
    check_sampling(own, file)
    names = ("temperature", "top_p", "top_k", "min_p")
    sampling = {name: own[name] for name in names if own.get(name) is not None}
    return GenerationConfig(
        end_tokens(own.get("eos_token_id"), rows, file) or ends,
        {} if own.get("do_sample") is False else sampling,
    )
