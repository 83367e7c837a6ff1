"""Names that people type, and the checkpoints behind them. Imports nothing heavy.

A name is the bundled demo, one that the user registered, one of the catalogue, or a repository
of the Hugging Face hub, hub:owner/name. The last two are here once their checkpoint is: registered
under any name, or in the hub's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CheckpointError
from .hub import registry
from .hub.known_models import CATALOGUE, HUB, Published, from_hub_name
from .user_dirs import hub_cache

__all__ = ["CATALOGUE", "DEMO", "Model", "Published", "find", "model", "models"]

DEMO = "flashmoe-demo"


@dataclass(frozen=True)
class Model:
    """What a name stands for. path is None when it is not on this disk; experts is K, when the
    name prunes the router; published is where it can be had."""

    name: str
    path: Path | None
    aliases: tuple[str, ...] = ()
    experts: int | None = None
    published: Published | None = None
    source: str = "registered"

    @property
    def how_to_get(self) -> str:
        """The command that brings it here."""
        return f"flashmoe download {self.name}"


def models() -> list[Model]:
    """All names, each once: the demo, what is registered, then the catalogue. Never raises."""
    registered = registry.models()
    found = [Model(DEMO, Path(__file__).parent / "demo", source="bundled")]
    found += [_registered(m) for m in registered if m.name != DEMO]
    taken = {name for m in found for name in (m.name, *m.aliases)}
    for name, published in CATALOGUE.items():
        if name not in taken:
            path = _downloaded(published, registered)
            source = "catalogue" if path is None else "downloaded"
            found.append(Model(name, path, (), published.experts, published, source))
    return found


def model(name: str) -> Model:
    """What a name, an alias or the path of a checkpoint directory stands for.

    Raises:
        CheckpointError: nothing.
    """
    for found in models():
        if name in (found.name, *found.aliases):
            return found
    if (published := from_hub_name(str(name))) is not None:
        path = _downloaded(published, registry.models())
        source = "hub" if path is None else "downloaded"
        return Model(name, path, published=published, source=source)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return Model(name, path, source="directory")
    except (OSError, ValueError, RuntimeError):
        pass  # too long for a path, a zero byte, a home that is not there
    raise CheckpointError(
        f"{str(name)[:200]!r} is no model name ({', '.join(m.name for m in models())}) and no "
        f"directory: give the directory of an MLX checkpoint, or {HUB}OWNER/NAME for one of the "
        "Hugging Face hub, or register one: flashmoe register DIR"
    )


def find(name: str) -> Path:
    """The checkpoint directory of a name, or of a path to one.

    Raises:
        CheckpointError: there is none, or it is not on this disk; says how to get it.
    """
    found = model(name)
    if found.path is None:
        raise CheckpointError(
            f"{name} is not on this disk: it is {found.published.size}. "
            f"To get it, run: {found.how_to_get}"
        )
    if not found.path.is_dir():
        raise CheckpointError(
            f"{found.path}, which is registered as {found.name}, is not there any more: put it "
            f"back, or run: flashmoe remove {found.name}"
        )
    return found.path


def _registered(entry: registry.Registered) -> Model:
    if entry.repo is None:
        return Model(entry.name, entry.path, entry.aliases)
    published = CATALOGUE.get(entry.name)
    if published is None or published.repo != entry.repo:
        published = Published(entry.repo)
    published = replace(published, revision=entry.revision)
    return Model(entry.name, entry.path, entry.aliases, published.experts, published, "downloaded")


def _downloaded(published: Published, registered: list[registry.Registered]) -> Path | None:
    """The directory of a repository of the hub: registered, or in the hub's own cache."""
    repo, revision = published.repo, published.revision or ""
    for entry in registered:
        same = entry.repo == repo and (entry.revision or "").startswith(revision)
        if entry.repo is None and not revision:
            same = entry.path.name == repo.partition("/")[2]
        if same and entry.path.is_dir():
            return entry.path
    cache = hub_cache() / f"models--{repo.replace('/', '--')}"
    try:
        ref = cache / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else revision
        path = cache / "snapshots" / commit
        return path if commit and (path / "config.json").is_file() else None
    except (OSError, ValueError):
        return None
