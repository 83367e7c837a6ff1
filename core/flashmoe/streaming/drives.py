"""How each drive is read best, as `flashmoe bench disk` found, kept for the next load.

{"version": 1, "drives": {"254:0": {"io": "direct", "depth": 8, "split": 0}}}
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import user_dirs
from .io_modes import BLOCK, IO_MODES

log = logging.getLogger("flashmoe")


@dataclass(frozen=True)
class Drive:
    """io: of `IO_MODES`. depth: reads in flight. split: bytes of the pieces into which larger
    ranges are cut; 0: they are not."""

    io: str
    depth: int = 8
    split: int = 0

    def __post_init__(self):
        depth, split = self.depth, self.split
        whole = type(depth) is int and type(split) is int
        if self.io not in IO_MODES or not whole or not 1 <= depth <= 256:
            raise ValueError(self)
        if split and split < BLOCK:
            raise ValueError(self)


#: Where nothing was measured. On Linux direct reads gave 1.6 to 2 times the tokens a second of
#: buffered ones when memory was short (docs/experiments.md). On macOS nobody measured yet; there
#: F_NOCACHE is the like of it.
DEFAULT = Drive("uncached" if sys.platform == "darwin" else "direct")


def file() -> Path:
    """The file of what was measured."""
    return user_dirs.settings_directory() / "drives.json"


def drive_of(path: Path) -> Drive:
    """How the drive that holds `path` is read. Never raises: a broken file is as none."""
    return measured(path) or DEFAULT


def measured(path: Path) -> Drive | None:
    """What was found for the drive that holds `path`; None: nothing."""
    found = _read().get(_key(path))
    if found is None:
        return None
    try:
        return Drive(**found)
    except (TypeError, ValueError):
        log.warning("%s: the entry of %s is not one: it is ignored", file(), _key(path))
        return None


def remember(path: Path, drive: Drive) -> None:
    """Keep how the drive that holds `path` is read. Raises OSError."""
    drives = _read() | {_key(path): asdict(drive)}
    user_dirs.write_settings(file(), {"version": 1, "drives": drives})


def _key(path: Path) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _read() -> dict:
    try:
        found = json.loads(file().read_text())
        return dict(found["drives"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        log.warning("%s cannot be read (%s): it is ignored", file(), e)
        return {}
