"""Read the small files of a checkpoint, JSON and templates, as hostile input.

Only regular files, or links to one, are opened: a FIFO would hang, and a device may have no end.
What a file may hold is bounded before anything parses it:

| file                                                 | bytes       | levels of JSON |
|------------------------------------------------------|-------------|----------------|
| header of a shard, model.safetensors.index.json      | 100,000,000 | 64             |
| tokenizer.json and other files of a tokenizer        | 100,000,000 | that library's |
| config.json, generation_ and tokenizer_config.json   | 10,000,000  | 64             |
| chat_template.jinja, additional_chat_templates/*     | 1,000,000   |                |

The first limit is the safetensors format's own. A real config.json has up to 0.3 MB and 6 levels, a
real tokenizer.json 20 MB, a real template 20 kB.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path

from ..errors import CheckpointError

#: The limit of the safetensors format for a header; also that of an index and of a tokenizer.
MAX_JSON_BYTES = 100_000_000
MAX_CONFIG_BYTES = 10_000_000
MAX_TEMPLATE_BYTES = 1_000_000
MAX_LEVELS = 64
#: The way out in the errors for files that end too early.
DOWNLOAD_AGAIN = "the download is incomplete; download it again"

_LIMITS = {
    "config.json": MAX_CONFIG_BYTES,
    "generation_config.json": MAX_CONFIG_BYTES,
    "tokenizer_config.json": MAX_CONFIG_BYTES,
    ".jinja": MAX_TEMPLATE_BYTES,
    ".json": MAX_JSON_BYTES,
    ".model": MAX_JSON_BYTES,
    ".txt": MAX_JSON_BYTES,
}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120
_repr.maxlevel = 2


def show(value: object) -> str:
    """Return the repr of a value from a file for an error text.

    Control characters are escaped, and hostile lengths and depths are cut.
    """
    return _repr.repr(value)


def is_int(value: object, low: int, high: int) -> bool:
    """Return whether a value is an int in low..high; JSON's true and false are not ints."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file or a link to one: opening a FIFO would hang.

    It never raises: what cannot be examined is not a file.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_files(directory: Path) -> None:
    """Check what a checkpoint directory holds, before any library opens one of its files.

    mlx-lm, transformers and MLX open files by names of their own; a FIFO among them would hang.

    Raises:
        CheckpointError: an entry is a FIFO, a socket or a device; or a file that is read is a
            directory or too long.
    """
    try:
        entries = sorted(directory.iterdir())
        templates = directory / "additional_chat_templates"
        if templates.is_dir():
            entries += sorted(templates.iterdir())
    except OSError as e:
        raise CheckpointError(f"cannot read {directory}: {e.strerror}") from e
    for entry in entries:
        _check_entry(entry)


def _check_entry(entry: Path) -> None:
    limit = _limit(entry)
    try:
        found = entry.stat()
    except (OSError, ValueError):
        return  # a link that leads nowhere: whoever needs the file says that it is missing
    if stat.S_ISDIR(found.st_mode) and limit is None and entry.suffix != ".safetensors":
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{entry} is not a regular file: remove it, or download the checkpoint again"
        )
    if limit is not None and found.st_size > limit:
        raise CheckpointError(
            f"{entry} has {found.st_size} bytes, the limit is {limit}: it is corrupt; download it "
            "again"
        )


def _limit(file: Path) -> int | None:
    return _LIMITS.get(file.name, _LIMITS.get(file.suffix))


def parse_object(text: bytes, what: str) -> dict:
    """Parse one JSON object, which must not repeat a key, nor nest more than MAX_LEVELS deep.

    Args:
        what: names the text in errors.

    Raises:
        CheckpointError: the text is no such object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        entries: dict[str, object] = {}
        for name, value in pairs:
            if name in entries:
                raise CheckpointError(f"{what} holds the key {show(name)} twice: it is corrupt")
            entries[name] = value
        return entries

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as e:
        raise CheckpointError(
            f"{what} is not UTF-8 ({e.reason} at byte {e.start}); {DOWNLOAD_AGAIN}"
        ) from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{what} is not valid JSON ({e}); {DOWNLOAD_AGAIN}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object, it holds {show(value)}")
    _check_levels(value, what)
    return value


def _check_levels(value: dict, what: str) -> None:
    """Go through the levels one by one, so that depth costs no stack."""
    level: list[object] = [value]
    for _ in range(MAX_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)  # type: ignore[attr-defined]
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise CheckpointError(
        f"{what} nests more than {MAX_LEVELS} levels deep: it is corrupt; download it again"
    )


def read_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict:
    """Read a JSON file that must hold one object.

    Raises:
        CheckpointError: the file is missing, longer than `limit` bytes, or holds something else.
    """
    if not is_file(path):
        raise CheckpointError(
            f"{path} is missing or not a regular file: give the directory of a complete MLX "
            "checkpoint"
        )
    return parse_object(_read(path, limit), str(path))


def read_text(path: Path, limit: int = MAX_TEMPLATE_BYTES) -> str | None:
    """Return the text of a file, or None where there is no such file.

    Raises:
        CheckpointError: it is not a regular file, longer than `limit` bytes, or not UTF-8.
    """
    if not os.path.lexists(path):
        return None
    if not is_file(path):
        raise CheckpointError(f"{path} is not a regular file: download the checkpoint again")
    try:
        return _read(path, limit).decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(
            f"{path} is not UTF-8 ({e.reason} at byte {e.start}); {DOWNLOAD_AGAIN}"
        ) from e


def _read(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as f:
            text = f.read(limit + 1)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    if len(text) > limit:
        raise CheckpointError(f"{path} is longer than {limit} bytes: it is corrupt")
    return text
