"""Keep the states of prompts that were prefilled, in memory and on disk: a longer prompt continues.

An entry is mlx-lm's prompt cache (keys and values, recurrent states, whatever a model type has) at
one position of a token sequence. Recurrent states and sliding windows cannot be trimmed, so such an
entry serves prompts that begin with exactly its tokens and is found by their hash; mlx-lm's
LRUPromptCache, which trims to the longest common prefix, does not apply. Where all that a model
keeps is keys and values, an entry in memory also serves prompts that share a part of its tokens,
up to a place where both are split. Entries of many conversations may be kept side by side.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import private_dirs, user_dirs
from ..checkpoint.safetensors_header import read_header
from ..errors import CheckpointError, SettingError
from ..files import replacing
from ..locks import partial_name, remove_partials
from ..options import PROMPT_STORE_NBYTES

log = logging.getLogger("flashmoe")

_NAME = re.compile(r"(?P<digest>[0-9a-f]{40})-(?P<tokens>\d{1,9})\.safetensors")
_SUFFIX = ".safetensors"
_PARTIAL = partial_name(r"[0-9a-f]{40}-\d{1,9}", _SUFFIX)
_DIGEST = "flashmoe_sha256"


def entry_name(identity: str, tokens: list[int]) -> str:
    """Return the name of an entry, from what made it and from its tokens.

    Args:
        identity: of the model and settings; see `prompt.state_identity`.
    """
    digest = hashlib.sha256(identity.encode())
    digest.update(np.array(tokens, np.int64).tobytes())
    return f"{digest.hexdigest()[:40]}-{len(tokens)}"


def entry_nbytes(cache: list[Any]) -> int:
    """Return the bytes of an entry's arrays."""
    return sum(c.nbytes for c in cache)


def can_trim(cache: list[Any]) -> bool:
    """Return whether the last tokens can be taken out of caches without changing a bit.

    Keys and values of a token lie in a place of their own. Other caches that mlx-lm trims move
    theirs, or have forgotten some.
    """
    from mlx_lm.models.cache import CacheList, KVCache

    return all(
        type(c) is KVCache or (type(c) is CacheList and can_trim(list(c.caches))) for c in cache
    )


@dataclass(frozen=True)
class Trail:
    """What an entry in memory was made of, to find it by a part of that.

    Attributes:
        identity: as for `entry_name`.
        tokens: all of its tokens.
        cuts: where the prompt was split, ascending, as far as the entry goes.
    """

    identity: str
    tokens: tuple[int, ...]
    cuts: tuple[int, ...]

    def serves(self, identity: str, tokens: list[int], cuts: tuple[int, ...], cut: int) -> bool:
        """Return whether a prompt has these tokens, and is split as these were, up to a cut."""
        return (
            self.identity == identity
            and cut < len(self.tokens)
            and self.tokens[:cut] == tuple(tokens[:cut])
            and [c for c in self.cuts if c <= cut] == [c for c in cuts if c <= cut]
        )


@dataclass(frozen=True)
class _Entry:
    cache: list[Any]
    nbytes: int
    trail: Trail | None = None


class PromptCache:
    """The entries in memory; the least recently used leaves first.

    Args:
        budget: bytes of all entries together.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(e.nbytes for e in self._entries.values())

    def get(self, name: str) -> list[Any] | None:
        """Return a copy of an entry, or None. Generation changes the cache that it is given."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        self._entries.move_to_end(name)
        # Cheap: MLX copies an array when one of its owners first writes to it.
        return copy.deepcopy(entry.cache)

    def get_trimmed(
        self, identity: str, tokens: list[int], cuts: tuple[int, ...], cut: int
    ) -> list[Any] | None:
        """Return a copy of a longer entry, trimmed to the first `cut` tokens of a prompt, or None.

        Its bits are those of an entry at that place, because a prompt is split in the same way
        before a cut whatever follows.

        Args:
            identity: as for `entry_name`.
            tokens, cuts: of the prompt; `cut` is one of `cuts`.
        """
        for name, entry in reversed(self._entries.items()):
            trail = entry.trail
            if trail is not None and trail.serves(identity, tokens, cuts, cut):
                if not can_trim(entry.cache):
                    return None  # none of this model can be
                self._entries.move_to_end(name)
                cache = copy.deepcopy(entry.cache)
                for one in cache:
                    one.trim(len(trail.tokens) - cut)
                return cache
        return None

    def put(self, name: str, cache: list[Any], trail: Trail | None = None) -> None:
        """Keep an evaluated cache, to which nobody else writes.

        One that is larger than the budget is not kept.

        Args:
            trail: to find it by a part of its tokens too.
        """
        self._entries.pop(name, None)
        entry = _Entry(cache, entry_nbytes(cache), trail)
        if entry.nbytes > self.budget:
            return
        self._entries[name] = entry
        while self.nbytes > self.budget:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()


@dataclass(frozen=True)
class StoredEntry:
    """A file of the store.

    Attributes:
        tokens: the number of its tokens.
        nbytes: its size.
        used: when it was last used, in seconds of Unix time.
    """

    path: Path
    tokens: int
    nbytes: int
    used: float


class PromptStore:
    """The entries on disk, so that another process continues a conversation.

    Each is one safetensors file, written by mlx-lm and named by `entry_name`. A file is written
    under another name and renamed, the least recently used leaves first, and a file that is not
    complete, or not flashmoe's, is left alone with a warning. Files hold conversations, so only
    their owner may read them, and a directory that others may write is not used. No method raises
    for what the disk does: a cache that does not work costs time, not answers.

    Args:
        directory: made when the first entry is written. None: `user_dirs.prompt_cache`.
        limit: bytes of all files together.
    """

    def __init__(self, directory: Path | None = None, limit: int = PROMPT_STORE_NBYTES):
        self.directory = directory or user_dirs.prompt_cache()
        self.limit = limit
        self._unsafe = _other_writer(self.directory)
        if self._unsafe is not None:
            log.warning(
                "conversations are not kept in %s: %s; change that, or set %s to another directory",
                *(self.directory, self._unsafe, user_dirs.PROMPT_CACHE_ENV),
            )
        remove_partials(self.directory, _PARTIAL)

    def entries(self) -> list[StoredEntry]:
        """Return the files, the least recently used first."""
        entries = []
        with contextlib.suppress(OSError):
            for file in os.scandir(self.directory):
                match = _NAME.fullmatch(file.name)
                if match:
                    with contextlib.suppress(OSError):  # another process removed it
                        stat = file.stat()
                        path, tokens = Path(file.path), int(match["tokens"])
                        entries.append(StoredEntry(path, tokens, stat.st_size, stat.st_mtime))
        return sorted(entries, key=lambda e: e.used)

    def get(self, name: str, like: list[Any]) -> list[Any] | None:
        """Return the entry of that name, or None.

        Args:
            like: the model's own empty cache: an entry of other classes or another length does not
                belong to this model.
        """
        path = self.directory / f"{name}{_SUFFIX}"
        if self._unsafe is not None or not os.path.exists(path):
            return None
        try:
            cache = _read(path, like)
        except Exception as e:  # whatever a file holds, it must not cost the answer
            log.warning("%s is not a usable prompt cache (%s): it is ignored", path, e)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return cache

    def put(self, name: str, cache: list[Any]) -> None:
        """Write an entry, unless there is a file of that name, and keep to the limit."""
        path = self.directory / f"{name}{_SUFFIX}"
        if self._unsafe is not None or entry_nbytes(cache) > self.limit or not _can_save(cache):
            return
        try:
            if path.exists():
                os.utime(path)
                return
            private_dirs.make(self.directory)
            self._write(path, cache)
            self.trim()
        except (OSError, RuntimeError) as e:
            log.warning("the prompt cache could not be written to %s: %s", path, e)

    def trim(self) -> None:
        """Remove the least recently used files until all fit, and what killed writers left."""
        entries = self.entries()
        total = sum(e.nbytes for e in entries)
        for entry in entries:
            if total <= self.limit:
                break
            entry.path.unlink(missing_ok=True)
            total -= entry.nbytes
        remove_partials(self.directory, _PARTIAL)

    def clear(self) -> int:
        """Remove all files; return the bytes that were freed."""
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        remove_partials(self.directory, _PARTIAL)
        return sum(e.nbytes for e in entries)

    def _write(self, path: Path, cache: list[Any]) -> None:
        from mlx_lm.models.cache import save_prompt_cache

        # Not durable: a file that a crash left incomplete fails its digest and is ignored.
        with replacing(path, concurrent=True, durable=False) as partial:
            save_prompt_cache(str(partial), cache, {_DIGEST: _digest(cache)})
            os.chmod(partial, 0o600)


def open_store(directory: Path | None, limit: int) -> PromptStore | None:
    """Return the store; None for a limit of 0, and with a warning where there is no directory.

    Args:
        directory, limit: as for `PromptStore`.
    """
    if not limit:
        return None
    try:
        return PromptStore(directory, limit)
    except SettingError as e:
        log.warning("conversations are not kept: %s", e)
        return None


def _can_save(cache: list[Any]) -> bool:
    """Return whether mlx-lm can read what it writes of these caches: only classes of one module."""
    return all(type(c).__module__ == "mlx_lm.models.cache" for c in cache)


def _other_writer(directory: Path) -> str | None:
    try:
        return private_dirs.other_writer(directory)
    except OSError as e:
        return str(e)


def _read(path: Path, like: list[Any]) -> list[Any]:
    from mlx_lm.models.cache import load_prompt_cache

    read_header(path)  # complete, and its ranges inside the file, before anything trusts it
    cache, metadata = load_prompt_cache(str(path), return_metadata=True)
    if [type(c) for c in cache] != [type(c) for c in like]:
        raise CheckpointError("it belongs to another model")
    if metadata.get(_DIGEST) != _digest(cache):
        raise CheckpointError("its bytes are not those that were written")
    return cache


def _digest(cache: list[Any]) -> str:
    """Return a hash of the arrays of an entry, with their shapes and dtypes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    digest = hashlib.sha256()
    arrays: Any = tree_flatten([c.state for c in cache])  # MLX's stubs allow a dict too
    for name, value in arrays:
        if isinstance(value, mx.array):
            digest.update(f"{name} {value.dtype} {value.shape};".encode())
            flat = mx.contiguous(value).reshape(-1)  # MLX cannot view a scalar as bytes
            digest.update(memoryview(flat.view(mx.uint8)))  # type: ignore[arg-type]
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()
