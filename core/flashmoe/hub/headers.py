"""Open a checkpoint of the hub without its weights, for `flashmoe plan`.

config.json, the index and the first bytes of each shard are fetched. They become files of the true
sizes with holes after the headers, so the same `Checkpoint.open`, with its checks of hostile input,
opens a model of 200 GB from some 100 kB.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import get_session, hf_raise_for_status

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.json_files import MAX_JSON_BYTES
from ..checkpoint.safetensors_header import INDEX_NAME
from ..errors import DownloadError
from ..locks import temporary_directory
from ..sizes import format_size
from . import api as hub
from .api import HubFile, Listing

#: Bytes of a shard that are requested first: most headers of a shard of 5 GB are not longer.
FIRST_NBYTES = 1 << 14
#: The limit for all that is fetched for one checkpoint.
MAX_NBYTES = 1 << 28
#: Requests at the same time.
WORKERS = 4
#: Seconds without a byte until a request fails.
TIMEOUT_SECONDS = 30


@contextmanager
def open_remote_checkpoint(listing: Listing) -> Iterator[Checkpoint]:
    """Open the checkpoint of a repository, whose files hold nothing but their headers.

    The files exist until the context ends.

    Raises:
        DownloadError: a header cannot be fetched, or is too long.
        CheckpointError: the repository holds no checkpoint that flashmoe runs.
    """
    small = [f for f in listing.files if f.name in ("config.json", INDEX_NAME)]
    shards = [f for f in listing.files if f.name.endswith(".safetensors")]
    with temporary_directory("flashmoe-headers-") as directory:
        fetcher = _HeaderFetcher(listing.repo, directory)
        with (
            hub.translated_errors(listing.repo, listing.revision),
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            for _ in pool.map(fetcher.fetch_small, small):
                pass
            for _ in pool.map(fetcher.fetch_header, shards):
                pass
        yield Checkpoint.open(directory)


class _HeaderFetcher:
    """Fetches files and headers of a repository into a directory."""

    def __init__(self, repo: str, directory: Path):
        self._repo = repo
        self._directory = directory
        self._left = MAX_NBYTES

    def fetch_small(self, file: HubFile) -> None:
        """Fetch all of a file."""
        if file.nbytes > MAX_JSON_BYTES:
            raise self._too_long(file, file.nbytes)
        content = self._bytes(file, 0, file.nbytes)
        hasher = file.hasher()
        hasher.update(content)
        if hasher.hexdigest() != file.etag:
            raise DownloadError(
                f"{file.name} of {self._repo} differs from the hash that the hub lists: run this "
                "again"
            )
        (self._directory / file.name).write_bytes(content)

    def fetch_header(self, file: HubFile) -> None:
        """Fetch the header of a shard; a hole as long as the weights follows it in the file."""
        content = self._bytes(file, 0, min(FIRST_NBYTES, file.nbytes))
        nbytes = 8 + int.from_bytes(content[:8], "little")
        if nbytes <= file.nbytes:  # else `Checkpoint.open` says what is wrong
            if nbytes > MAX_JSON_BYTES:
                raise self._too_long(file, nbytes)
            if nbytes > len(content):
                content += self._bytes(file, len(content), nbytes)
        path = self._directory / file.name
        try:
            with open(path, "wb") as f:
                f.write(content[:nbytes])
                f.truncate(file.nbytes)
        except OSError as e:
            raise DownloadError(
                f"{path} cannot be written with a hole of {format_size(file.nbytes)} in it "
                f"({e.strerror}): set TMPDIR to a directory on another file system"
            ) from e

    def _bytes(self, file: HubFile, start: int, stop: int) -> bytes:
        """Fetch bytes start..stop of a file of the repository, and no more than these."""
        self._left -= stop - start
        if self._left < 0:
            raise self._too_long(file, stop - start)

        def fetch() -> bytes:
            headers = hub.request_headers() | {"Range": f"bytes={start}-{stop - 1}"}
            stream = get_session().stream("GET", file.url, headers=headers, timeout=TIMEOUT_SECONDS)
            with stream as response:
                hf_raise_for_status(response)
                if response.status_code != 206 and (start or stop != file.nbytes):
                    raise DownloadError(
                        f"the server of {self._repo} answers with all of {file.name}, "
                        f"{format_size(file.nbytes)}, to a request for "
                        f"{format_size(stop - start)}: a plan needs a server with byte ranges; "
                        "check HF_ENDPOINT"
                    )
                content = b""
                for piece in response.iter_raw():
                    content += piece
                    if len(content) >= stop - start:
                        break
            if len(content) < stop - start:
                raise hub.TruncatedError(f"{file.name} ends after {start + len(content)} bytes")
            return content[: stop - start]

        return hub.with_retries(fetch) if stop > start else b""

    def _too_long(self, file: HubFile, nbytes: int) -> DownloadError:
        return DownloadError(
            f"{file.name} of {self._repo} wants {format_size(nbytes)} of headers read: it is not a "
            "checkpoint in MLX format, or it is corrupt"
        )
