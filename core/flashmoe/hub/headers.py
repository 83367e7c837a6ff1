"""A checkpoint of the hub, opened without its weights: what its headers say, for `flashmoe plan`.

config.json, the index and the first bytes of each shard are fetched, and become files of the true
sizes with nothing behind the headers. So the same `Checkpoint.open`, with its checks of hostile
input, reads a model of 200 GB for some 100 kB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import get_session, hf_raise_for_status

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.safetensors_header import INDEX_NAME, MAX_JSON_BYTES
from ..errors import DownloadError
from ..sizes import format_size
from . import api as hub
from .api import HubFile, Listing

#: Bytes of a shard that are asked for first: most headers of a shard of 5 GB are not longer.
FIRST_NBYTES = 1 << 14
#: All that is fetched for one checkpoint at most.
MOST_NBYTES = 1 << 28
#: Requests at one time, and seconds that each may say nothing.
WORKERS, TIMEOUT = 4, 30


@contextmanager
def checkpoint(listing: Listing) -> Iterator[Checkpoint]:
    """The checkpoint of a repository, with files that hold their headers only, while it is entered.

    Raises:
        DownloadError, CheckpointError
    """
    small = [f for f in listing.files if f.name in ("config.json", INDEX_NAME)]
    shards = [f for f in listing.files if f.name.endswith(".safetensors")]
    with tempfile.TemporaryDirectory(prefix="flashmoe-headers-") as directory:
        headers = _Headers(listing.repo, Path(directory))
        with hub.explained(listing.repo, listing.revision), ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(headers.whole, small):
                pass
            for _ in pool.map(headers.shard, shards):
                pass
        yield Checkpoint.open(directory)


class _Headers:
    """What was fetched of a repository, into a directory."""

    def __init__(self, repo: str, directory: Path):
        self._repo = repo
        self._directory = directory
        self._left = MOST_NBYTES

    def whole(self, file: HubFile) -> None:
        """Fetch a small file."""
        if file.nbytes > MAX_JSON_BYTES:
            self._too_long(file, file.nbytes)
        content = self._bytes(file, 0, file.nbytes)
        hasher = file.hasher()
        hasher.update(content)
        if hasher.hexdigest() != file.etag:
            raise DownloadError(
                f"{file.name} of {self._repo} came with another content than the hub lists: run "
                "this again"
            )
        (self._directory / file.name).write_bytes(content)

    def shard(self, file: HubFile) -> None:
        """Fetch the header of a shard; behind it there is a hole as long as the weights."""
        content = self._bytes(file, 0, min(FIRST_NBYTES, file.nbytes))
        nbytes = 8 + int.from_bytes(content[:8], "little")
        if nbytes <= file.nbytes:  # else `Checkpoint.open` says what is wrong
            if nbytes > MAX_JSON_BYTES:
                self._too_long(file, nbytes)
            if nbytes > len(content):
                content += self._bytes(file, len(content), nbytes)
        path = self._directory / file.name
        try:
            with open(path, "wb") as f:
                f.write(content[:nbytes])
                f.truncate(file.nbytes)
        except OSError as e:
            raise DownloadError(
                f"{path} cannot be made, with a hole of {format_size(file.nbytes)} in it "
                f"({e.strerror}): set TMPDIR to a directory on another file system"
            ) from e

    def _bytes(self, file: HubFile, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file of the repository, and not one more."""
        self._left -= stop - start
        if self._left < 0:
            self._too_long(file, stop - start)

        def fetch() -> bytes:
            asked = hub.headers() | {"Range": f"bytes={start}-{stop - 1}"}
            session = get_session()
            with session.stream("GET", file.url, headers=asked, timeout=TIMEOUT) as answer:
                hf_raise_for_status(answer)
                if answer.status_code != 206 and (start or stop != file.nbytes):
                    raise DownloadError(
                        f"the server of {self._repo} answers with all of {file.name}, "
                        f"{format_size(file.nbytes)}, where {format_size(stop - start)} were asked "
                        "for: a plan needs a server with byte ranges; check HF_ENDPOINT"
                    )
                found = b""
                for piece in answer.iter_raw():
                    found += piece
                    if len(found) >= stop - start:
                        break
            if len(found) < stop - start:
                raise hub.Short(f"{file.name} ends after {start + len(found)} bytes")
            return found[: stop - start]

        return hub.patiently(fetch) if stop > start else b""

    def _too_long(self, file: HubFile, nbytes: int) -> None:
        raise DownloadError(
            f"{file.name} of {self._repo} wants {format_size(nbytes)} of headers read: it is no "
            "checkpoint in MLX's format, or corrupt"
        )
