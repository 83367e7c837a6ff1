"""Find the directories of the user's settings and caches, and change settings files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import files, locks
from .errors import SettingError

#: The environment variables with the directories of settings and of prompt cache files, instead of
#: the platform's.
SETTINGS_ENV = "FLASHMOE_CONFIG"
PROMPT_CACHE_ENV = "FLASHMOE_CACHE"


def settings_directory() -> Path:
    """Return the directory of settings, which may not exist yet.

    Not `click.get_app_dir`: it takes an empty XDG_CONFIG_HOME for the current directory, and
    `flashmoe.load` needs this directory without importing click.

    Raises:
        SettingError: it is not set, and the user has no home directory.
    """
    if SETTINGS_ENV in os.environ:
        return Path(os.environ[SETTINGS_ENV])
    if sys.platform == "darwin":
        return _home(SETTINGS_ENV) / "Library" / "Application Support" / "flashmoe"
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home(SETTINGS_ENV) / ".config") / "flashmoe"


@contextmanager
def changing(file: Path) -> Iterator[None]:
    """Let one process at a time read, change and write a settings file.

    The directory is made if needed.

    Raises:
        OSError: the directory cannot be written, or another process does not end its change.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with locks.locked(file.with_suffix(".lock")):
        yield


def write_settings(file: Path, content: dict) -> None:
    """Replace a settings file by `content` as JSON, inside of `changing`.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    files.write_json(file, content, concurrent=True)


def remove_partial_settings(file: Path) -> None:
    """Remove what killed processes left beside a settings file. Raises nothing."""
    locks.remove_partials(file.parent, locks.partial_name(re.escape(file.stem), file.suffix))


def prompt_cache() -> Path:
    """Return the directory of prompt cache files, which may not exist yet.

    Raises:
        SettingError: it is not set, and the user has no home directory.
    """
    if PROMPT_CACHE_ENV in os.environ:
        return Path(os.environ[PROMPT_CACHE_ENV])
    return _own_caches(PROMPT_CACHE_ENV) / "prompts"


def kernel_cache() -> Path:
    """Return the directory for compiled kernels, which may not exist yet.

    It is used where they cannot be kept beside the package.

    Raises:
        SettingError: the user has no home directory.
    """
    return _own_caches("NUMBA_CACHE_DIR") / "kernels"


def hub_cache() -> Path:
    """Return the directory in which huggingface_hub keeps downloads, without importing it.

    Raises:
        SettingError: it is not set, and the user has no home directory.
    """
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    path = cache or Path(home or _caches("HF_HOME") / "huggingface") / "hub"
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError as e:  # ~ without a home directory
        raise SettingError(f"{path} has no home directory to begin with: set HF_HUB_CACHE") from e


def _own_caches(variable: str) -> Path:
    if sys.platform == "darwin":
        return _home(variable) / "Library" / "Caches" / "flashmoe"
    return _caches(variable) / "flashmoe"


def _caches(variable: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or _home(variable) / ".cache")


def _home(variable: str) -> Path:
    """Return the user's home directory.

    Args:
        variable: the environment variable that makes it unnecessary.

    Raises:
        SettingError: there is none.
    """
    try:
        return Path.home()
    except RuntimeError as e:
        raise SettingError(
            f"the user {os.getuid()} of this process has no home directory: set HOME, or "
            f"{variable}, to a directory that this user may write"
        ) from e
