"""States of prompts on disk, so that another process goes on with a conversation.

One safetensors file a state, written by mlx-lm, named by `prompt_cache.key`. Files are written
aside and renamed, the oldest used leave first, and one that is not whole, or not ours, is left
alone with a warning. They hold conversations, so only their owner may read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_header import read_header
from ..errors import CheckpointError

log = logging.getLogger("flashmoe")

#: The directory, when it is not given.
ENV = "FLASHMOE_CACHE"
#: Bytes of all files together, when it is not given.
DEFAULT_LIMIT = 4 * 10**9

_NAME = re.compile(r"(?P<digest>[0-9a-f]{40})-(?P<tokens>\d{1,9})\.safetensors")
_SUFFIX = ".safetensors"
_DIGEST = "flashmoe_sha256"
#: Of files left by a process that died while writing.
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class StoredState:
    """A file of the store: its tokens, bytes, and when it was last used (seconds of Unix time)."""

    path: Path
    tokens: int
    nbytes: int
    used: float


def default_directory() -> Path:
    """$FLASHMOE_CACHE, or the platform's place for caches."""
    if ENV in os.environ:
        return Path(os.environ[ENV])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flashmoe" / "prompts"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flashmoe" / "prompts"


class PromptStore:
    """The states in one directory. Nothing here raises for what the disk does: a cache that does
    not work costs time, not answers.

    Args:
        directory: made when the first state is written.
        limit: bytes of all files together.
    """

    def __init__(self, directory: Path | None = None, limit: int = DEFAULT_LIMIT):
        self.directory = directory or default_directory()
        self.limit = limit

    def states(self) -> list[StoredState]:
        """The files, the oldest used first."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory):
                match = _NAME.fullmatch(entry.name)
                if match:
                    with contextlib.suppress(OSError):  # another process took it away
                        stat = entry.stat()
                        path, tokens = Path(entry.path), int(match["tokens"])
                        found.append(StoredState(path, tokens, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda s: s.used)

    def get(self, name: str, like: list[Any]) -> list[Any] | None:
        """The state of that name, or None.

        Args:
            like: the model's own empty cache: a state of other classes or another length is not
                of this model.
        """
        path = self.directory / f"{name}{_SUFFIX}"
        if not path.exists():
            return None
        try:
            cache = _read(path, like)
        except Exception as e:  # whatever a file holds, it must not cost the answer
            log.warning("%s is no usable prompt cache (%s): it is ignored", path, e)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return cache

    def put(self, name: str, cache: list[Any]) -> None:
        """Write a state, if it is not there, and make room for it."""
        path = self.directory / f"{name}{_SUFFIX}"
        if sum(c.nbytes for c in cache) > self.limit:
            return
        try:
            if path.exists():
                os.utime(path)
                return
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._write(path, cache)
            self.trim()
        except (OSError, RuntimeError) as e:
            log.warning("the prompt cache could not be written to %s: %s", path, e)

    def trim(self) -> None:
        """Remove the oldest used files until all fit the limit, and what writers left behind."""
        states = self.states()
        total = sum(s.nbytes for s in states)
        for state in states:
            if total <= self.limit:
                break
            state.path.unlink(missing_ok=True)
            total -= state.nbytes
        newest = max((s.used for s in states), default=0)
        for path in self.directory.glob(f".*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < newest - _STALE_SECONDS:
                    path.unlink()

    def clear(self) -> int:
        """Remove all files; the bytes that were freed."""
        states = self.states()
        for state in states:
            state.path.unlink(missing_ok=True)
        return sum(s.nbytes for s in states)

    def _write(self, path: Path, cache: list[Any]) -> None:
        from mlx_lm.models.cache import save_prompt_cache

        # mkstemp: readable by the owner alone.
        file, aside = tempfile.mkstemp(_SUFFIX, f".{path.stem}-", self.directory)
        os.close(file)
        try:
            save_prompt_cache(aside, cache, {_DIGEST: _digest(cache)})
            os.chmod(aside, 0o600)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise


def _read(path: Path, like: list[Any]) -> list[Any]:
    from mlx_lm.models.cache import load_prompt_cache

    read_header(path)  # whole, and its ranges inside the file, before anything trusts it
    cache, metadata = load_prompt_cache(str(path), return_metadata=True)
    if [type(c) for c in cache] != [type(c) for c in like]:
        raise CheckpointError("it is of another model")
    if metadata.get(_DIGEST) != _digest(cache):
        raise CheckpointError("its bytes are not those that were written")
    return cache


def _digest(cache: list[Any]) -> str:
    """A hash of the arrays of a state, with their shapes and dtypes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    for name, value in tree_flatten([c.state for c in cache]):
        if isinstance(value, mx.array):
            digest.update(f"{name} {value.dtype} {value.shape};".encode())
            digest.update(memoryview(mx.contiguous(value).view(mx.uint8)))
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()
