"""Read what a checkpoint can do from its small files alone. MLX is not imported."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .config import parse_text_config
from .json_files import read_object, read_text


@dataclass(frozen=True)
class Capabilities:
    """What a checkpoint can do.

    Attributes:
        context: the limit for tokens of prompt and answer together.
        tools: the chat template has tool calls, marked as Qwen marks them.
        reasoning: the chat template has reasoning, marked as Qwen marks it.
    """

    context: int
    tools: bool
    reasoning: bool


def capabilities(path: Path) -> Capabilities:
    """Return what the checkpoint in a directory can do.

    Raises:
        CheckpointError: config.json is missing, or describes a model that flashmoe does not run; or
            a file that may hold the template is damaged.
    """
    config = parse_text_config(read_object(path / "config.json"), path)
    template = chat_template(path) or ""
    return Capabilities(
        context=config["max_position_embeddings"],
        tools="<tool_call>" in template,
        reasoning="<think>" in template,
    )


def chat_template(path: Path) -> str | None:
    """Return the chat template of the checkpoint in a directory, or None when it has none.

    Raises:
        CheckpointError: a file that may hold it is damaged.
    """
    if (template := read_text(path / "chat_template.jinja")) is not None:
        return template
    for file in (path / "chat_template.json", path / "tokenizer_config.json"):
        if os.path.lexists(file):
            template = read_object(file).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def directory_fingerprint(path: Path) -> str:
    """Return a short hash that changes when any file of a checkpoint directory does.

    It covers names, sizes and times of all files. `Checkpoint.files_identity` covers shards alone,
    and opens the checkpoint; here a changed tokenizer or chat template counts too, because it
    changes answers.

    Raises:
        OSError: the directory cannot be read.
    """
    files = sorted(path.iterdir(), key=lambda file: file.name)
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
