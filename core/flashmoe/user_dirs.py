"""Find the directories of the user's settings and caches, and write settings files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import files

#: The environment variables with the directories of settings and of prompt cache files, instead of
#: the platform's.
SETTINGS_ENV = "FLASHMOE_CONFIG"
PROMPT_CACHE_ENV = "FLASHMOE_CACHE"


def settings_directory() -> Path:
    """Return the directory of settings, which may not exist yet.

    Not `click.get_app_dir`: it takes an empty XDG_CONFIG_HOME for the current directory, and
    `flashmoe.load` needs this directory without importing click.
    """
    if SETTINGS_ENV in os.environ:
        return Path(os.environ[SETTINGS_ENV])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "flashmoe"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "flashmoe"


def write_settings(file: Path, content: dict) -> None:
    """Replace a settings file by `content` as JSON, and make its directory if needed.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, content, concurrent=True)


def prompt_cache() -> Path:
    """Return the directory of prompt cache files, which may not exist yet."""
    if PROMPT_CACHE_ENV in os.environ:
        return Path(os.environ[PROMPT_CACHE_ENV])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flashmoe" / "prompts"
    return _caches() / "flashmoe" / "prompts"


def hub_cache() -> Path:
    """Return the directory in which huggingface_hub keeps downloads, without importing it."""
    home = os.environ.get("HF_HOME") or _caches() / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(cache or Path(home) / "hub")).expanduser()


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
