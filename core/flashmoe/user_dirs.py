"""Where the user's settings lie, and how a file of them is changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import files

#: The directory of settings, when it is not the platform's.
ENV = "FLASHMOE_CONFIG"


def directory() -> Path:
    """The directory of settings; it may not exist."""
    if ENV in os.environ:
        return Path(os.environ[ENV])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "flashmoe"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "flashmoe"


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads; without importing it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    home = os.environ.get("HF_HOME") or home
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(cache or Path(home) / "hub")).expanduser()


def write_json(file: Path, content: dict) -> None:
    """Put `content` in place of a file at once. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, content, concurrent=True)
