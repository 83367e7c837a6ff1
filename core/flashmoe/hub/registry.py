"""The checkpoints that the user has registered: a JSON file that all front ends share.

    {"version": 1, "models": {"name": {"path": "/models/x", "aliases": ["y"]}}}

One that was downloaded has its "repo" and the commit, "revision", too. Reading never raises: a
file that is broken must not break every command that lists models.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from .. import user_dirs
from ..errors import RegistryError

log = logging.getLogger("flashmoe")

_NAME = re.compile(r"[A-Za-z0-9][\w.:@+-]*(/[\w.:@+-]+)*")
_ORIGIN = ("repo", "revision")


@dataclass(frozen=True)
class Registered:
    """A checkpoint directory under a name; repo and revision: what of the hub it was made from."""

    name: str
    path: Path
    aliases: tuple[str, ...] = ()
    repo: str | None = None
    revision: str | None = None


def file() -> Path:
    """The registry's file."""
    return user_dirs.settings_directory() / "models.json"


def models() -> list[Registered]:
    """The registered checkpoints, by name. Entries that cannot be are left out, with a warning."""
    try:
        found = _read()
    except RegistryError as e:
        log.warning("%s", e)
        return []
    models = []
    for name, entry in sorted(found.items()):
        try:
            aliases = tuple(a for a in entry.get("aliases", ()) if is_name(a))
            if not is_name(name):
                raise ValueError
            origin = {k: v for k in _ORIGIN if isinstance(v := entry.get(k), str)}
            models.append(Registered(name, Path(entry["path"]), aliases, **origin))
        except (AttributeError, KeyError, TypeError, ValueError):
            log.warning("%s: the entry of %r is not one: it is ignored", file(), name)
    return models


def is_name(name: object) -> bool:
    """Whether a model may be called so: something to type, that no shell would change."""
    return isinstance(name, str) and len(name) <= 100 and bool(_NAME.fullmatch(name))


def add(name: str, path: Path, aliases: tuple[str, ...] = (), **origin: str) -> Registered:
    """Register a directory, in place of what had that name.

    Args:
        origin: the `repo` and `revision` of a download.

    Raises:
        RegistryError: a name cannot be one, or is another model's; the file cannot be changed.
    """
    check(name, aliases)
    found = _read()
    found[name] = {"path": str(path.absolute()), "aliases": list(aliases), **origin}
    _write(found)
    return Registered(name, path.absolute(), aliases, **origin)


def check(name: str, aliases: tuple[str, ...] = ()) -> None:
    """
    Raises:
        RegistryError: a name cannot be one, or is another model's.
    """
    for new in (name, *aliases):
        if not is_name(new):
            raise RegistryError(
                f"{new!r} cannot be a name: use letters, digits and . _ - : @ + /, 100 at most"
            )
        for other in models():
            if other.name != name and new in (other.name, *other.aliases):
                raise RegistryError(
                    f"{new!r} is taken by {other.name}, which is {other.path}: choose another "
                    f"name, or run: flashmoe remove {other.name}"
                )


def remove(name: str) -> Registered:
    """Forget the checkpoint of that name or alias. Its files stay.

    Raises:
        RegistryError: there is none, or the file cannot be changed.
    """
    for model in models():
        if name in (model.name, *model.aliases):
            found = _read()
            del found[model.name]
            _write(found)
            return model
    known = ", ".join(m.name for m in models()) or "none"
    raise RegistryError(f"{name!r} is not registered; registered are: {known}")


def _read() -> dict:
    try:
        found = json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise RegistryError(
            f"{file()} cannot be read ({e}): mend it, or remove it and register again"
        ) from e
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, dict):
        raise RegistryError(f"{file()} holds no models: mend it, or remove it and register again")
    return models


def _write(models: dict) -> None:
    try:
        user_dirs.write_settings(file(), {"version": 1, "models": models})
    except OSError as e:
        raise RegistryError(f"{file()} cannot be written: {e}") from e
