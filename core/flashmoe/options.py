"""Define the options for loading a model and running an engine, checked when they are set.

`flashmoe.load`, `flashmoe.Engine`, the workers of a cluster, the commands and both plugins share
these, so a misspelt or impossible option fails where it is given and not in the first request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .errors import SettingError
from .sizes import parse_size

#: Bytes of prompt cache files on disk, unless another limit is given.
PROMPT_STORE_NBYTES = 4 * 10**9

#: The highest `depth`: each read in flight takes a thread.
MAX_DEPTH = 256

#: The values of `activations`; `flashmoe.ops.activations` says what they mean.
ACTIVATIONS = ("float32", "int8")

#: The values of `io`; `flashmoe.streaming.io_modes` says what they mean.
IO_MODES = ("buffered", "uncached", "direct")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint is loaded.

    Attributes:
        memory: limit for the peak memory of the whole process, such as "8GB" or a number of bytes;
            on a GPU with memory of its own, the limit for that memory. None: what the machine can
            spare.
        slots: expert slots per layer, instead of as many as fit into `memory`.
        context: tokens of prompt and answer that memory is kept for. None: what is usual, or what
            there is memory for. On a CPU longer ones take memory from the slots; on a GPU they are
            refused if they do not fit.
        experts: K, the number of experts per token. None: the K that the model was trained with. A
            smaller K prunes the router and is not exact.
        depth: how many reads may be in flight at the drive, at most `MAX_DEPTH`. None: what
            `flashmoe bench disk` measured for this drive, or 8.
        io: how experts are read, one of `IO_MODES`. None: what `flashmoe bench disk` measured for
            this drive, or a default for the platform. Where all experts fit into slots the default
            is "buffered", so that the next process finds them in the page cache.
        activations: one of `ACTIVATIONS`. "int8" is faster on a CPU and not exact.
        prompt_cache: bytes of memory for prompt cache entries, or a size such as "1GB"; 0: none.
            None: the bytes of one conversation of the planned length.

    Raises:
        SettingError: a value is impossible; the text says what is possible.
    """

    memory: str | int | None = None
    slots: int | None = None
    context: int | None = None
    experts: int | None = None
    depth: int | None = None
    io: str | None = None
    activations: str = "float32"
    prompt_cache: str | int | None = 0

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory)
            if self.slots is not None:
                raise SettingError(
                    f"give memory={self.memory!r} or slots={self.slots!r}, not both: slots follow "
                    "from memory"
                )
        _check_count("slots", self.slots, "a number of experts per layer")
        _check_count("context", self.context, "a number of tokens")
        _check_count("experts", self.experts, "a number of experts per token")
        _check_count("depth", self.depth, "a number of reads in flight")
        if self.depth is not None and self.depth > MAX_DEPTH:
            raise SettingError(
                f"depth={self.depth} is out of range: each read in flight takes a thread, so depth "
                f"must be between 1 and {MAX_DEPTH}"
            )
        _check_choice("io", self.io, IO_MODES)
        _check_choice("activations", self.activations, ACTIVATIONS)
        _ = self.prompt_cache_nbytes

    @property
    def memory_nbytes(self) -> int | None:
        """`memory` as a number of bytes."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def prompt_cache_nbytes(self) -> int | None:
        """`prompt_cache` as a number of bytes."""
        return _limit(self.prompt_cache)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(LoadOptions):
    """How an engine loads its checkpoint and answers requests.

    Attributes:
        batch: the largest number of requests that are answered together; 1 answers one after the
            other. None: `flashmoe.generation.batch.DEFAULT_BATCH`. Memory may allow fewer.
        prompt_store: bytes of prompt cache files on disk, or a size such as "1GB"; 0: none.
        prompt_store_path: the directory of these files. None: the platform's directory for caches.
        cluster: which share of the experts each machine holds; see `flashmoe.cluster.placement`.
            None: this machine holds all of them.
    """

    prompt_cache: str | int | None = None
    batch: int | None = None
    prompt_store: str | int = PROMPT_STORE_NBYTES
    prompt_store_path: str | Path | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("batch", self.batch, "a number of requests")
        _ = self.prompt_store_nbytes

    @property
    def prompt_store_nbytes(self) -> int:
        """`prompt_store` as a number of bytes."""
        return _limit(self.prompt_store) or 0


OptionsType = TypeVar("OptionsType", bound=LoadOptions)


def with_settings(options: OptionsType, settings: dict[str, Any]) -> OptionsType:
    """Return `options` with the given fields changed.

    Raises:
        TypeError: a name is not a field; the text lists the fields.
        SettingError: a value is impossible.
    """
    unknown = sorted(set(settings) - set(vars(options)))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}: options are {', '.join(vars(options))}")
    return replace(options, **settings)


def _limit(size: str | int | None) -> int | None:
    return parse_size(size) if size else (None if size is None else 0)


def _check_count(name: str, value: int | None, meaning: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SettingError(f"{name}={value!r} must be 1 or more: it is {meaning}")


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise SettingError(f"{name}={value!r} must be one of {', '.join(choices)}")
