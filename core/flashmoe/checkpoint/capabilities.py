"""What a checkpoint can do, read from its small files alone. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from .config import check_text_config
from .safetensors_header import read_object


@dataclass(frozen=True)
class Capabilities:
    """context: tokens of prompt and answer together. tools, thoughts: its chat template has them,
    marked as Qwen marks them."""

    context: int
    tools: bool
    thoughts: bool


def capabilities(path: Path) -> Capabilities:
    """Of the checkpoint in a directory.

    Raises:
        CheckpointError: config.json is missing, or not one that flashmoe runs.
    """
    config = check_text_config(read_object(path / "config.json"), path)
    template = chat_template(path) or ""
    return Capabilities(
        context=config["max_position_embeddings"],
        tools="<tool_call>" in template,
        thoughts="<think>" in template,
    )


def chat_template(path: Path) -> str | None:
    """The chat template among the files of a checkpoint."""
    try:
        return (path / "chat_template.jinja").read_text()
    except (OSError, ValueError):
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = json.loads((path / name).read_text())["chat_template"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found
    return None


def fingerprint(path: Path) -> str:
    """Changes when a file of the checkpoint does: a hash of their names, sizes and times."""
    files = sorted(path.iterdir(), key=lambda file: file.name)
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
