"""Download checkpoints from the hub and verify them; only then they may be registered.

huggingface_hub's http_get fetches each file, with its ranges, waits and tokens. Its own
hf_hub_download is not used: recent versions give each partial file a new name and remove it, so
that a killed download starts its files again, and they compare sizes but no hashes.

    blobs/<etag>.flashmoe.incomplete    the bytes so far; http_get continues at its end
    blobs/<etag>                        complete and verified
    snapshots/<commit>/<name>           links to these, made when all are complete

`flashmoe.hub.cache_layout` says where these directories are.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import parse_text_config
from ..checkpoint.json_files import read_object
from ..checkpoint.quantization import parse_quantization
from ..errors import Cancelled, DownloadError
from ..files import disk_too_full, free_nbytes
from ..sizes import format_size
from . import api as hub
from .api import HubFile, Listing
from .cache_layout import DownloadPaths

#: Files that are fetched at the same time.
WORKERS = 4
#: Bytes of a file on disk that are hashed at once.
PIECE_NBYTES = 1 << 22
#: Bytes that a download leaves free on the disk: a full one troubles other programs.
MARGIN_NBYTES = 1 << 30

#: Called in any thread with the number of bytes that were just verified; negative: as many bytes
#: that were counted before must be fetched or verified again.
Advance = Callable[[int], None]


class Download:
    """A planned download; `fetch` performs it.

    Args:
        listing: the files, from `fetch_listing`.
        to: a directory, instead of the hub's cache.

    Attributes:
        paths: where the files go.
        present_nbytes: bytes that are on the disk already, judged by sizes.
        missing_nbytes: bytes to fetch.
        free_nbytes: bytes that are free on the disk of `paths`.
    """

    def __init__(self, listing: Listing, to: Path | None = None):
        self.listing = listing
        self.paths = DownloadPaths.for_listing(listing, to)
        self.present_nbytes = sum(map(self.paths.present_nbytes, listing.files))
        self.missing_nbytes = listing.nbytes - self.present_nbytes
        self.free_nbytes = free_nbytes(self.paths.blobs)
        self._cancel = threading.Event()

    def check_free_space(self) -> None:
        """Check that the missing files fit on the disk and leave a margin.

        Raises:
            DownloadError: they do not.
        """
        needed = self.missing_nbytes + MARGIN_NBYTES
        if self.missing_nbytes and needed > self.free_nbytes:
            way_out = "give a directory on another disk: --to DIR"
            raise DownloadError(
                f"{self.listing.repo} does not fit: {format_size(self.missing_nbytes)} are missing,"
                f" and {format_size(MARGIN_NBYTES)} must stay free for other programs. "
                + disk_too_full(self.paths.directory, needed, self.free_nbytes, way_out)
            )

    def fetch(self, advance: Advance = lambda nbytes: None) -> Path:
        """Fetch and verify all files, and return the checkpoint directory.

        Raises:
            DownloadError: a file cannot be fetched or written, or differs from the hub's hash.
            CheckpointError: flashmoe cannot run the checkpoint.
        """
        disable_progress_bars()
        hub_logging.set_verbosity_error()
        repo, revision = self.listing.repo, self.listing.revision
        with (
            hub.translated_errors(repo, revision),
            _translated_disk_errors(self.paths),
            self._locked(),
        ):
            self.paths.check_no_other_shards(self.listing)
            self.paths.remove_partials_of_other_files(self.listing)
            weights = [f for f in self.listing.files if f.name.endswith(".safetensors")]
            self._fetch_all([f for f in self.listing.files if f not in weights], advance)
            self._check_config()  # before hundreds of gigabytes that could not be used
            self._fetch_all(weights, advance)
            self.paths.move_into_place(self.listing)
        Checkpoint.open(self.paths.directory)
        return self.paths.directory

    def _fetch_all(self, files: list[HubFile], advance: Advance) -> None:
        files = list({self.paths.key(file): file for file in files}.values())
        waiting = iter(files)
        results: queue.Queue[BaseException | None] = queue.Queue()

        def work() -> None:
            for file in waiting:
                try:
                    self._fetch(file, advance)
                    results.put(None)
                except BaseException as e:
                    results.put(e)

        # Daemons: Ctrl-C need not wait for a silent server. The bytes that arrived are on the disk.
        for _ in range(min(WORKERS, len(files))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in files:
                if (error := results.get()) is not None:
                    raise error
        except BaseException:
            self._cancel.set()
            raise

    def _fetch(self, file: HubFile, advance: Advance) -> None:
        if self._is_complete(file, advance):
            return
        path = self.paths.partial(file)
        for resumed in (path.exists(), False):
            fault = self._fetch_missing(file, path, advance)
            if fault is None:
                os.replace(path, self.paths.blobs / self.paths.key(file))
                return
            path.unlink()
            if not resumed:
                break  # otherwise the bytes of an earlier download may be the wrong ones: once more
        raise DownloadError(
            f"{file.name} of {self.listing.repo} is not what the hub promises: {fault}. It was "
            "removed: run this again, and if that does not help, tell the owner of the repository"
        )

    def _is_complete(self, file: HubFile, advance: Advance) -> bool:
        """Return whether a file is on the disk and verified. A corrupt blob is removed."""
        path = self.paths.complete(file)
        if not path.is_file():
            return False
        with _HashedFile(path, file, advance, self._cancel, "rb") as present:
            if present.fault() is None:
                return True
            present.uncount()
        if path.parent == self.paths.blobs:
            path.unlink()
        return False

    def _fetch_missing(self, file: HubFile, path: Path, advance: Advance) -> str | None:
        """Fetch the bytes that a partial file lacks; return what is wrong with it then, or None."""
        mode = "r+b" if path.exists() else "w+b"
        with _HashedFile(path, file, advance, self._cancel, mode) as part:
            before = part.nbytes

            def progressed() -> bool:
                nonlocal before
                last, before = before, part.nbytes
                return part.nbytes > last

            def get() -> None:
                if self._cancel.is_set():
                    raise Cancelled
                if part.nbytes < file.nbytes:
                    headers = hub.request_headers()
                    # http_get uses nothing of a file but what _HashedFile has.
                    writer = cast(BinaryIO, part)
                    http_get(file.url, writer, resume_size=part.nbytes, headers=headers)
                if part.nbytes < file.nbytes:
                    raise hub.TruncatedError(
                        f"{file.name} ended after {part.nbytes} of {file.nbytes} bytes"
                    )

            with suppress(_TooLong):
                hub.with_retries(get, progressed)
            os.fsync(part)
            fault = part.fault()
            if fault is not None:
                part.uncount()
            return fault

    def _check_config(self) -> None:
        (file,) = (f for f in self.listing.files if f.name == "config.json")
        config = read_object(self.paths.complete(file))
        where = Path(self.listing.repo)
        parse_quantization(config, parse_text_config(config, where), where)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out: two writers would corrupt a file.

        The system releases the lock when a process is killed.
        """
        self.paths.blobs.mkdir(parents=True, exist_ok=True)
        with open(self.paths.blobs / ".flashmoe.lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DownloadError(
                    f"{self.listing.repo} is being downloaded by another process: wait for it"
                ) from e
            yield


class _TooLong(Exception):
    """The server sent more bytes than the file has."""


class _HashedFile:
    """The file that http_get writes to, hashed as it grows.

    The bytes that are in the file at first are hashed by the constructor.
    """

    def __init__(
        self, path: Path, file: HubFile, advance: Advance, cancel: threading.Event, mode: str
    ):
        self._file = open(path, mode)  # noqa: SIM115
        self._expected, self._advance, self._cancel = file, advance, cancel
        self.nbytes, self._hash = 0, file.hasher()
        while piece := self._file.read(PIECE_NBYTES):
            self._count(piece)

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._file.flush()  # a kill loses no byte that has arrived
        self._count(piece)
        if self.nbytes > self._expected.nbytes:
            raise _TooLong

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def truncate(self) -> None:
        """Drop all bytes. http_get does so only to start anew, when a server gives no ranges."""
        self._file.truncate()
        self.uncount()

    def uncount(self) -> None:
        """Take back what was counted: the bytes will be fetched or verified again."""
        self._advance(-self.nbytes)
        self.nbytes, self._hash = 0, self._expected.hasher()

    def fault(self) -> str | None:
        """Return what is wrong with the file if it is complete, or None."""
        if self.nbytes != self._expected.nbytes:
            return f"it has {self.nbytes} bytes or more, not {self._expected.nbytes}"
        digest, etag = self._hash.hexdigest(), self._expected.etag
        kind = "sha256" if self._expected.is_sha256 else "git hash"
        return None if digest == etag else f"its {kind} is {digest}, not {etag}"

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _count(self, piece: bytes) -> None:
        if self._cancel.is_set():
            raise Cancelled
        self._hash.update(piece)
        self.nbytes += len(piece)
        self._advance(len(piece))


@contextmanager
def _translated_disk_errors(paths: DownloadPaths) -> Iterator[None]:
    """Turn errors of a disk that is full or cannot be written into DownloadError."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        raise DownloadError(
            f"{paths.blobs} cannot be used: {e}. Fix that, or give another directory, --to DIR, "
            "and run this again; it continues where it stopped"
        ) from e
