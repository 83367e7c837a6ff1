"""Names that people type, and the checkpoints behind them. Imports nothing heavy.

A name is the bundled demo, one that the user registered, or one of the catalogue. The latter is
here once its checkpoint is: registered under any name, or in the cache of the Hugging Face hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import registry
from .errors import CheckpointError

DEMO = "flashmoe-demo"


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub. nbytes: what a download takes, about; experts: K, when the name
    stands for a pruned router."""

    repo: str
    nbytes: int
    experts: int | None = None


_397B = "mlx-community/Qwen3.5-397B-A17B-4bit"
CATALOGUE = {
    "qwen3.5-397b-flash": Published(_397B, 224 * 10**9, experts=4),
    "qwen3.5-397b": Published(_397B, 224 * 10**9),
    "qwen3.5-122b": Published("mlx-community/Qwen3.5-122B-A10B-4bit", 69 * 10**9),
    "qwen3.5-35b": Published("mlx-community/Qwen3.5-35B-A3B-4bit", 20 * 10**9),
    "qwen3-next-80b": Published("mlx-community/Qwen3-Next-80B-A3B-Instruct-4bit", 45 * 10**9),
    "qwen3-30b": Published("mlx-community/Qwen3-30B-A3B-4bit", 17 * 10**9),
}


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
        """The commands that bring it here."""
        directory = self.published.repo.partition("/")[2]
        return (
            f"hf download {self.published.repo} --local-dir {directory} && "
            f"flashmoe register {directory}"
        )


def models() -> list[Model]:
    """All names, each once: the demo, what is registered, then the catalogue. Never raises."""
    registered = registry.models()
    found = [Model(DEMO, Path(__file__).parent / "demo", source="bundled")]
    found += [Model(m.name, m.path, m.aliases) for m in registered if m.name != DEMO]
    taken = {name for m in found for name in (m.name, *m.aliases)}
    for name, published in CATALOGUE.items():
        if name not in taken:
            path = _downloaded(published.repo, registered)
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
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return Model(name, path, source="directory")
    except (OSError, ValueError, RuntimeError):
        pass  # too long for a path, a zero byte, a home that is not there
    raise CheckpointError(
        f"{str(name)[:200]!r} is no model name ({', '.join(m.name for m in models())}) and no "
        "directory: give the directory of an MLX checkpoint, or register it: flashmoe register DIR"
    )


def find(name: str) -> Path:
    """The checkpoint directory of a name, or of a path to one.

    Raises:
        CheckpointError: there is none, or it is not on this disk; says how to get it.
    """
    found = model(name)
    if found.path is None:
        raise CheckpointError(
            f"{name} is not on this disk: it takes about {found.published.nbytes / 1e9:.0f} GB. "
            f"To get it, run: {found.how_to_get}"
        )
    if not found.path.is_dir():
        raise CheckpointError(
            f"{found.path}, which is registered as {found.name}, is not there any more: put it "
            f"back, or run: flashmoe remove {found.name}"
        )
    return found.path


def _downloaded(repo: str, registered: list[registry.Registered]) -> Path | None:
    """The directory of a repository of the hub: registered, or in the hub's own cache."""
    name = repo.partition("/")[2]
    for entry in registered:
        if entry.path.name == name and entry.path.is_dir():
            return entry.path
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    try:
        revision = (cache / f"models--{repo.replace('/', '--')}" / "refs" / "main").read_text()
        path = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision.strip()
        return path if (path / "config.json").is_file() else None
    except (OSError, ValueError):
        return None
