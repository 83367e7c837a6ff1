"""Checkpoints from the hub: fetched, verified, and only then registered.

huggingface_hub's http_get fetches each file, with its ranges, waits and tokens. Its own
hf_hub_download is not used: of late it names each partial file anew and removes it, so that a
download that was killed starts its files again, and it compares sizes but no hashes.

    blobs/<etag>.flashmoe.incomplete    what came so far; http_get goes on at its end
    blobs/<etag>                        whole and verified
    snapshots/<commit>/<name>           links to these, made when all are there; then the registry

Where these are: hub_place.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import parse_quantization, parse_text_config
from ..checkpoint.safetensors_header import read_object
from ..errors import Cancelled, DownloadError
from ..files import disk_too_full, free_nbytes
from ..sizes import format_size
from . import api as hub
from .api import HubFile, Listing
from .cache_layout import Place

#: Files at once, and bytes read at once.
WORKERS, PIECE = 4, 1 << 22
#: Left free on the disk: a full one troubles other programs.
MARGIN = 1 << 30


class Download:
    """A download that is planned; `run` makes it.

    Args:
        to: a directory, instead of the hub's cache.
    """

    def __init__(self, listing: Listing, to: Path | None = None):
        self.listing = listing
        self.place = Place.of(listing, to)
        self.here = sum(map(self.place.here, listing.files))
        self.missing = listing.nbytes - self.here
        self.free = free_nbytes(self.place.blobs)
        self._cancel = threading.Event()

    def check_room(self) -> None:
        """
        Raises:
            DownloadError: the disk is too small.
        """
        needed = self.missing + MARGIN
        if self.missing and needed > self.free:
            way_out = "give a directory on another disk: --to DIR"
            raise DownloadError(
                f"{self.listing.repo} does not fit: {format_size(self.missing)} are missing, and "
                f"{format_size(MARGIN)} must stay free for other programs. "
                + disk_too_full(self.place.directory, needed, self.free, way_out)
            )

    def run(self, advance: Callable[[int], None] = lambda nbytes: None) -> Path:
        """Fetch and verify all files, and return their directory.

        Args:
            advance: called in any thread with bytes that are verified, newly or again; less than
                0 takes some back.

        Raises:
            DownloadError, CheckpointError
        """
        disable_progress_bars()
        hub_logging.set_verbosity_error()
        repo, revision = self.listing.repo, self.listing.revision
        with hub.explained(repo, revision), _explained_disk(self.place), self._locked():
            self.place.check(self.listing)
            weights = [f for f in self.listing.files if f.name.endswith(".safetensors")]
            self._fetch_all([f for f in self.listing.files if f not in weights], advance)
            self._check_config()  # before hundreds of gigabytes of what cannot be used
            self._fetch_all(weights, advance)
            self.place.finish(self.listing)
        Checkpoint.open(self.place.directory)
        return self.place.directory

    def _fetch_all(self, files: list[HubFile], advance: Callable[[int], None]) -> None:
        files = list({self.place.key(file): file for file in files}.values())
        left, ended = iter(files), queue.Queue()

        def work() -> None:
            for file in left:
                try:
                    self._fetch(file, advance)
                    ended.put(None)
                except BaseException as e:
                    ended.put(e)

        # Daemons: Ctrl-C need not wait for a server that says nothing. What came is on the disk.
        for _ in range(min(WORKERS, len(files))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in files:
                if (error := ended.get()) is not None:
                    raise error
        except BaseException:
            self._cancel.set()
            raise

    def _fetch(self, file: HubFile, advance: Callable[[int], None]) -> None:
        if self._is_whole(file, advance):
            return
        path = self.place.part(file)
        for resumed in (path.exists(), False):
            fault = self._fetch_part(file, path, advance)
            if fault is None:
                os.replace(path, self.place.blobs / self.place.key(file))
                return
            path.unlink()
            if not resumed:
                break  # else what was there may be what is wrong
        raise DownloadError(
            f"{file.name} of {self.listing.repo} is not what the hub promises: {fault}. It was "
            "removed: run this again, and if that does not help, tell the owner of the repository"
        )

    def _is_whole(self, file: HubFile, advance: Callable[[int], None]) -> bool:
        """Whether a file is there and verified; one of the cache that is spoilt is removed."""
        path = self.place.blob(file)
        if not path.is_file():
            return False
        with _Part(path, file, advance, self._cancel, "rb") as found:
            if found.fault() is None:
                return True
            found.take_back()
        if path.parent == self.place.blobs:
            path.unlink()
        return False

    def _fetch_part(self, file: HubFile, path: Path, advance: Callable[[int], None]) -> str | None:
        """Fetch what is missing of a file; what is wrong with it then."""
        mode = "r+b" if path.exists() else "w+b"
        with _Part(path, file, advance, self._cancel, mode) as part:
            before = part.nbytes

            def progressed() -> bool:
                nonlocal before
                last, before = before, part.nbytes
                return part.nbytes > last

            def get() -> None:
                if self._cancel.is_set():
                    raise Cancelled
                if part.nbytes < file.nbytes:
                    http_get(file.url, part, resume_size=part.nbytes, headers=hub.headers())
                if part.nbytes < file.nbytes:
                    raise hub.Short(f"{file.name} ended after {part.nbytes} of {file.nbytes} bytes")

            with suppress(_TooLong):
                hub.patiently(get, progressed)
            os.fsync(part)
            fault = part.fault()
            if fault is not None:
                part.take_back()
            return fault

    def _check_config(self) -> None:
        (file,) = (f for f in self.listing.files if f.name == "config.json")
        config = read_object(self.place.blob(file))
        where = Path(self.listing.repo)
        parse_quantization(config, parse_text_config(config, where), where)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two processes at one file would spoil it. The system opens the lock of a killed one."""
        self.place.blobs.mkdir(parents=True, exist_ok=True)
        with open(self.place.blobs / ".flashmoe.lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DownloadError(
                    f"{self.listing.repo} is being downloaded by another process: wait for it"
                ) from e
            yield


class _TooLong(Exception):
    """More came than the file has."""


class _Part:
    """The file that http_get writes to, hashed as it grows. What is there is hashed first."""

    def __init__(self, path, file: HubFile, advance, cancel: threading.Event, mode: str):
        self._file = open(path, mode)  # noqa: SIM115
        self._of, self._advance, self._cancel = file, advance, cancel
        self.nbytes, self._hash = 0, file.hasher()
        while piece := self._file.read(PIECE):
            self._count(piece)

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._file.flush()  # a kill loses nothing that has come
        self._count(piece)
        if self.nbytes > self._of.nbytes:
            raise _TooLong

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def truncate(self) -> None:
        """http_get does so only to start anew, when a server gives no ranges."""
        self._file.truncate()
        self.take_back()

    def take_back(self) -> None:
        """Forget what was counted."""
        self._advance(-self.nbytes)
        self.nbytes, self._hash = 0, self._of.hasher()

    def fault(self) -> str | None:
        """What is wrong with the file, if it is to be whole."""
        if self.nbytes != self._of.nbytes:
            return f"it has {self.nbytes} bytes or more, not {self._of.nbytes}"
        found, kind = self._hash.hexdigest(), "sha256" if self._of.is_sha256 else "git hash"
        return None if found == self._of.etag else f"its {kind} is {found}, not {self._of.etag}"

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *exc) -> None:
        self._file.close()

    def _count(self, piece: bytes) -> None:
        if self._cancel.is_set():
            raise Cancelled
        self._hash.update(piece)
        self.nbytes += len(piece)
        self._advance(len(piece))


@contextmanager
def _explained_disk(place: Place) -> Iterator[None]:
    """A disk that is full, or where nothing can be written."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        raise DownloadError(
            f"{place.blobs} cannot be used: {e}. Mend that, or give another directory, --to DIR, "
            "and run this again; it goes on where it stopped"
        ) from e
