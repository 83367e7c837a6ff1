"""Remember how each drive is read fastest, as `flashmoe bench disk` measured it.

The file is {"version": 1, "drives": {"254:0": {"io": "direct", "depth": 8, "split": 0}}}, by device
number, on macOS by the UUID of the volume.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import macos, user_dirs
from ..errors import SettingError
from .io_modes import BLOCK, IO_MODES

log = logging.getLogger("flashmoe")


@dataclass(frozen=True)
class Drive:
    """How a drive is read.

    Attributes:
        io: one of `IO_MODES`.
        depth: reads in flight.
        split: bytes of the pieces into which larger ranges are cut; 0: no range is cut.

    Raises:
        ValueError: a value is impossible.
    """

    io: str
    depth: int = 8
    split: int = 0

    def __post_init__(self) -> None:
        depth, split = self.depth, self.split
        whole = type(depth) is int and type(split) is int
        if self.io not in IO_MODES or not whole or not 1 <= depth <= 256:
            raise ValueError(self)
        if split and split < BLOCK:
            raise ValueError(self)


#: The default where nothing was measured. On Linux direct reads gave 1.6 to 2 times the tokens per
#: second of buffered ones when memory was short (docs/experiments.md). Nobody has measured macOS.
DEFAULT = Drive("direct")


def file() -> Path:
    """Return the path of the file that holds the measurements."""
    return user_dirs.settings_directory() / "drives.json"


def drive_of(path: Path) -> Drive:
    """Return how the drive that holds `path` is read.

    The default where nothing was measured, and where the file of measurements is broken.
    """
    return measured(path) or DEFAULT


def measured(path: Path) -> Drive | None:
    """Return what was measured for the drive that holds `path`, or None."""
    drives = _read()
    if not drives:
        return None
    key = _key(path)
    try:
        return Drive(**drives[key]) if key in drives else None
    except (TypeError, ValueError):
        log.warning("%s: the entry of %s is not valid and is ignored: remove it", file(), key)
        return None


def remember(path: Path, drive: Drive) -> None:
    """Store how the drive that holds `path` is read.

    Raises:
        OSError: the file cannot be written.
    """
    with user_dirs.changing(file()):
        drives = _read() | {_key(path): asdict(drive)}
        user_dirs.write_settings(file(), {"version": 1, "drives": drives})


def _key(path: Path) -> str:
    if sys.platform == "darwin" and (uuid := macos.volume_id(path)):
        return uuid
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _read() -> dict:
    try:
        user_dirs.remove_partial_settings(file())
        return dict(json.loads(file().read_text())["drives"])
    except (FileNotFoundError, SettingError):  # not measured; no home directory
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        log.warning("%s cannot be read (%s) and is ignored: fix it, or remove it", file(), e)
        return {}
