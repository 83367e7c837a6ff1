"""Keep the list of checkpoints that the user has registered: a JSON file that all plugins share.

    {"version": 1, "models": {"name": {"path": "/models/x", "aliases": ["y"]}}}

A downloaded one also has its "repo" and the commit, "revision". `models` never raises: a file that
is broken must not break every command that lists models.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import user_dirs
from ..errors import RegistryError, SettingError

log = logging.getLogger("flashmoe")

_NAME = re.compile(r"[A-Za-z0-9][\w.:@+-]*(/[\w.:@+-]+)*")
_ORIGIN = ("repo", "revision")


@dataclass(frozen=True)
class RegisteredModel:
    """A checkpoint directory with a name.

    Attributes:
        repo, revision: the repository of the hub and its commit, if it was downloaded.
    """

    name: str
    path: Path
    aliases: tuple[str, ...] = ()
    repo: str | None = None
    revision: str | None = None


def file() -> Path:
    """Return the path of the registry's file."""
    return user_dirs.settings_directory() / "models.json"


def models() -> list[RegisteredModel]:
    """Return the registered checkpoints, sorted by name.

    Invalid entries are left out, with a warning. A user without a home directory has none.
    """
    try:
        user_dirs.remove_partial_settings(file())
    except SettingError:
        return []
    try:
        entries = _read()
    except RegistryError as e:
        log.warning("%s", e)
        return []
    models = []
    for name, entry in sorted(entries.items()):
        try:
            aliases = tuple(a for a in entry.get("aliases", ()) if is_valid_name(a))
            if not is_valid_name(name):
                raise ValueError
            origin = {k: v for k in _ORIGIN if isinstance(v := entry.get(k), str)}
            models.append(RegisteredModel(name, Path(entry["path"]), aliases, **origin))
        except (AttributeError, KeyError, TypeError, ValueError):
            log.warning("%s: the entry of %r is not valid and is ignored: fix it", file(), name)
    return models


def is_valid_name(name: object) -> bool:
    """Return whether a model may have this name: easy to type, and no shell would change it."""
    return isinstance(name, str) and len(name) <= 100 and bool(_NAME.fullmatch(name))


def add(
    name: str,
    path: Path,
    aliases: tuple[str, ...] = (),
    repo: str | None = None,
    revision: str | None = None,
) -> RegisteredModel:
    """Register a directory; an entry of the same name is replaced.

    Args:
        repo, revision: the repository and commit of a download.

    Raises:
        RegistryError: a name is not valid or belongs to another model, or the file cannot be
            written.
    """
    model = RegisteredModel(name, path.absolute(), aliases, repo, revision)
    origin = {k: v for k in _ORIGIN if (v := getattr(model, k)) is not None}
    entry = {"path": str(model.path), "aliases": list(aliases), **origin}
    with _changing():
        check_names(name, aliases)
        _write(_read() | {name: entry})
    return model


def check_names(name: str, aliases: tuple[str, ...] = ()) -> None:
    """Check that a model may be registered under these names.

    Raises:
        RegistryError: a name is not valid, or belongs to another model.
    """
    for new in (name, *aliases):
        if not is_valid_name(new):
            raise RegistryError(
                f"{new!r} cannot be a name: use at most 100 letters, digits and . _ - : @ + /"
            )
        for other in models():
            if other.name != name and new in (other.name, *other.aliases):
                raise RegistryError(
                    f"{new!r} is taken by {other.name}, which is {other.path}: choose another "
                    f"name, or run: flashmoe remove {other.name}"
                )


def remove(name: str) -> RegisteredModel:
    """Remove the entry with this name or alias, and return it. The files of the checkpoint stay.

    Raises:
        RegistryError: there is no such entry, or the file cannot be written.
    """
    with _changing():
        registered = models()
        for model in registered:
            if name in (model.name, *model.aliases):
                entries = _read()
                del entries[model.name]
                _write(entries)
                return model
    known = ", ".join(m.name for m in registered) or "none"
    raise RegistryError(f"{name!r} is not registered; registered are: {known}")


def _read() -> dict[str, Any]:
    """Return the entries by name; any JSON value may be an entry."""
    try:
        content = json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise RegistryError(
            f"{file()} cannot be read ({e}): fix it, or remove it and register the models again"
        ) from e
    entries = content.get("models") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise RegistryError(
            f"{file()} holds no models: fix it, or remove it and register the models again"
        )
    return entries


def _write(entries: dict[str, Any]) -> None:
    user_dirs.write_settings(file(), {"version": 1, "models": entries})


@contextmanager
def _changing() -> Iterator[None]:
    """Let one process at a time change the file; OSError becomes RegistryError."""
    try:
        with user_dirs.changing(file()):
            yield
    except OSError as e:
        raise RegistryError(f"{file()} cannot be written: {e}") from e
