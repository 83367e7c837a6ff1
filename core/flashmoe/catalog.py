"""Find the checkpoints behind the names that people type. Imports nothing heavy.

A name is the bundled demo, one that the user registered, one of the catalogue, or a repository
of the Hugging Face hub, hub:owner/name. The checkpoint of the last two is on this disk if it is
registered under any name, or in the hub's cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CheckpointError
from .hub import registry
from .hub.known_models import CATALOGUE, HUB_PREFIX, Published, parse_hub_name
from .user_dirs import hub_cache

__all__ = ["CATALOGUE", "DEMO", "Model", "Published", "find", "model", "models"]

#: The name of the bundled demo model.
DEMO = "flashmoe-demo"


@dataclass(frozen=True)
class Model:
    """The model that a name stands for.

    Attributes:
        path: its checkpoint directory; None when it is not on this disk.
        experts: K, when the name stands for a model with a pruned router.
        published: the checkpoint on the hub that it is, or could be downloaded from.
        source: where the name is from: "bundled", "registered", "downloaded", "catalogue", "hub" or
            "directory".
    """

    name: str
    path: Path | None
    aliases: tuple[str, ...] = ()
    experts: int | None = None
    published: Published | None = None
    source: str = "registered"

    @property
    def how_to_get(self) -> str:
        """Return the command that downloads it."""
        return f"flashmoe download {self.name}"


def models() -> list[Model]:
    """Return the demo, the registered models, then those of the catalogue whose name is not taken.

    It never raises.
    """
    registered = registry.models()
    result = [Model(DEMO, Path(__file__).parent / "demo", source="bundled")]
    result += [_registered(m) for m in registered if m.name != DEMO]
    taken = {name for m in result for name in (m.name, *m.aliases)}
    for name, published in CATALOGUE.items():
        if name not in taken:
            path = _downloaded(published, registered)
            source = "catalogue" if path is None else "downloaded"
            result.append(Model(name, path, (), published.experts, published, source))
    return result


def model(name: str) -> Model:
    """Return the model with a name or alias, or of the path of a checkpoint directory.

    Raises:
        CheckpointError: the name is none of these.
    """
    for known in models():
        if name in (known.name, *known.aliases):
            return known
    if (published := parse_hub_name(str(name))) is not None:
        path = _downloaded(published, registry.models())
        source = "hub" if path is None else "downloaded"
        return Model(name, path, published=published, source=source)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return Model(name, path, source="directory")
    except (OSError, ValueError, RuntimeError):
        pass  # too long for a path, a zero byte, a home directory that does not exist
    raise CheckpointError(
        f"{str(name)[:200]!r} is no model name and no directory: give a name that `flashmoe list` "
        f"shows, the directory of an MLX checkpoint, or {HUB_PREFIX}OWNER/NAME for a repository of "
        "the Hugging Face hub"
    )


def find(name: str) -> Path:
    """Return the checkpoint directory of a name, alias or path.

    Raises:
        CheckpointError: the name is unknown, or its checkpoint is not on this disk; says how to get
            it.
    """
    known = model(name)
    if known.path is None:
        size = "" if known.published is None else f": it is {known.published.size}"
        raise CheckpointError(
            f"{name} is not on this disk{size}. To get it, run: {known.how_to_get}"
        )
    if not os.path.isdir(known.path):
        raise CheckpointError(
            f"{known.path}, which is registered as {known.name}, is not there any more: put it "
            f"back, or run: flashmoe remove {known.name}"
        )
    return known.path


def _registered(entry: registry.RegisteredModel) -> Model:
    if entry.repo is None:
        return Model(entry.name, entry.path, entry.aliases)
    published = CATALOGUE.get(entry.name)
    if published is None or published.repo != entry.repo:
        published = Published(entry.repo)
    published = replace(published, revision=entry.revision)
    return Model(entry.name, entry.path, entry.aliases, published.experts, published, "downloaded")


def _downloaded(published: Published, registered: list[registry.RegisteredModel]) -> Path | None:
    """Return the directory of a published checkpoint: registered, or in the hub's own cache."""
    repo, revision = published.repo, published.revision or ""
    for entry in registered:
        same = entry.repo == repo and (entry.revision or "").startswith(revision)
        if entry.repo is None and not revision:
            # By the name of the directory, or by a name of the catalogue that the user gave it.
            known = CATALOGUE.get(entry.name)
            same = entry.path.name == repo.partition("/")[2]
            same = same or (known is not None and known.repo == repo)
        if same and os.path.isdir(entry.path):
            return entry.path
    try:
        cache = hub_cache() / f"models--{repo.replace('/', '--')}"
        ref = cache / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else revision
        path = cache / "snapshots" / commit
        return path if commit and (path / "config.json").is_file() else None
    except (OSError, ValueError):  # it may not be read; the user has no home directory
        return None
