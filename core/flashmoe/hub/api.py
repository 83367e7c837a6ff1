"""Ask the Hugging Face hub for the files of a repository: names, sizes and hashes.

Errors of huggingface_hub become texts for the user. This module imports huggingface_hub, so only a
download or a plan imports it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from ..errors import DownloadError, FlashMoEError

T = TypeVar("T")

#: How many attempts in a row may fail without a new byte.
MAX_FAILURES = 3
#: A file cannot be larger.
MAX_FILE_NBYTES = 2**62
#: The longest wait that a server may ask for, in seconds.
MAX_WAIT_SECONDS = 300
# Weights, configuration, chat templates, tokenizers; no code, no pickles. mlx-lm reads no other
# weights, and nothing in folders.
_NEEDED = re.compile(r"model[\w.+-]*\.safetensors|[\w+-][\w.+-]*\.(json|jinja|txt|model|tiktoken)")

# What huggingface_hub raises for answers whose JSON or headers have fields of wrong kinds.
_NOT_UNDERSTOOD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        etag: its name in the hub's cache: the sha256 of a large file, the git hash of a small one.
    """

    name: str
    nbytes: int
    etag: str
    url: str

    @property
    def is_sha256(self) -> bool:
        """Return whether `etag` is a sha256, not a git hash."""
        return len(self.etag) == 64

    def hasher(self) -> hashlib._Hash:
        """Return an empty hash that gives `etag` after it was updated with the complete file."""
        if self.is_sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a model needs, at one commit.

    Attributes:
        revision: the branch, tag or commit that was asked for.
        files: the files, the smallest first.
    """

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.nbytes for file in self.files)


class TruncatedError(OSError):
    """A response that ended before the file did, without an error of the connection."""


def fetch_listing(repo: str, revision: str | None = None, *, patient: bool = True) -> Listing:
    """Ask the hub which files of a repository a model needs.

    Args:
        revision: a branch, tag or commit. None: the repository's default branch.
        patient: whether to ask again after a temporary error.

    Raises:
        DownloadError: there is no such repository, it may not be read, it holds no checkpoint, or
            the answer is not a listing.
    """
    revision = revision or constants.DEFAULT_REVISION
    with translated_errors(repo, revision):
        info = with_retries(
            lambda: HfApi().model_info(repo, revision=revision, files_metadata=True),
            attempts=MAX_FAILURES if patient else 1,
        )
        commit = info.sha or ""
        if not constants.REGEX_COMMIT_OID.fullmatch(commit):  # it becomes the name of a directory
            raise DownloadError(f"{_endpoint()} gives no commit of {repo}: check HF_ENDPOINT")
        files = [
            _hub_file(repo, commit, sibling)
            for sibling in info.siblings or ()
            if _NEEDED.fullmatch(sibling.rfilename)
        ]
    names = {file.name for file in files}
    if len(names) < len(files):
        raise DownloadError(f"{_endpoint()} lists a file of {repo} twice: check HF_ENDPOINT")
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise DownloadError(
            f"{repo} at {revision} holds no config.json with model*.safetensors: only checkpoints "
            "in MLX format can be used, such as those of mlx-community"
        )
    return Listing(repo, revision, commit, tuple(sorted(files, key=lambda f: f.nbytes)))


def _hub_file(repo: str, commit: str, sibling: RepoSibling) -> HubFile:
    """Return a file of a listing, whose fields may have any kind."""
    etag: object = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    nbytes: object = sibling.lfs.size if sibling.lfs else sibling.size
    name = sibling.rfilename
    if not isinstance(etag, str) or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        raise DownloadError(
            f"{_endpoint()} gives no hash of {repo}/{name}, so it could not be verified: check "
            "HF_ENDPOINT"
        )
    if type(nbytes) is not int or not 0 <= nbytes <= MAX_FILE_NBYTES:
        raise DownloadError(
            f"{_endpoint()} gives no size of {repo}/{name}, but {str(nbytes)[:40]!r}: check "
            "HF_ENDPOINT"
        )
    return HubFile(name, nbytes, etag, hf_hub_url(repo, name, revision=commit))


def request_headers() -> dict[str, str]:
    """Return the HTTP headers of a request for a file, with the user's token.

    Compression is refused: a compressed response could not be resumed at a byte of the file.
    """
    headers = build_hf_headers(library_name="flashmoe", library_version=version("llm-flashmoe"))
    return headers | {"Accept-Encoding": "identity"}


def with_retries(
    call: Callable[[], T],
    progressed: Callable[[], bool] = lambda: False,
    attempts: int = MAX_FAILURES,
) -> T:
    """Return what `call` returns; call it again after temporary errors, with growing waits.

    Args:
        progressed: whether the call that has just failed got further than the one before; then the
            count of failures starts anew.

    Raises:
        OSError, HTTPError: the error is not temporary, or came `attempts` times in a row.
    """
    failures = 0
    while True:
        try:
            return call()
        except (HTTPError, OSError) as e:
            failures = 1 if progressed() else failures + 1
            wait = _wait(e, failures)
            if wait is None or failures >= attempts:
                raise
            time.sleep(wait)


def _wait(error: Exception, failures: int) -> float | None:
    """Return the seconds until the next attempt, or None when another one would not help."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        if error.response.status_code not in (408, 429, 500, 502, 503, 504):
            return None
        if re.fullmatch(r"[0-9]{1,9}", asked):
            return int(asked) if int(asked) <= MAX_WAIT_SECONDS else None
    elif not isinstance(error, HTTPError | TruncatedError):
        return None  # an error of the disk
    return 2.0 ** (failures - 1)


@contextmanager
def translated_errors(repo: str, revision: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub in this context into DownloadError, with a way out."""
    try:
        yield
    except OfflineModeIsEnabled as e:
        raise DownloadError(
            f"HF_HUB_OFFLINE is set, so {repo} is not fetched: unset it, or register a directory "
            "on this disk: flashmoe register DIR"
        ) from e
    except GatedRepoError as e:
        raise DownloadError(
            f"{repo} is gated: ask for access at {_endpoint()}/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN, and run this again"
        ) from e
    except RepositoryNotFoundError as e:
        raise DownloadError(
            f"{_endpoint()} has no repository {repo} that you may read: check the name; if it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from e
    except RevisionNotFoundError as e:
        raise DownloadError(
            f"{repo} has no revision {revision}: give a branch, a tag or a commit of it"
        ) from e
    except HFValidationError as e:
        raise DownloadError(f"{repo!r} is not the name of a repository: {_first_line(e)}") from e
    except HfHubHTTPError as e:
        raise DownloadError(_status_error(repo, e)) from e
    except (HTTPError, TruncatedError) as e:
        raise DownloadError(
            f"{repo} could not be fetched from {_endpoint()} ({_first_line(e)}): check the network "
            "and run this again; it continues where it stopped"
        ) from e
    except _NOT_UNDERSTOOD as e:
        if isinstance(e, FlashMoEError):
            raise
        raise DownloadError(
            f"{_endpoint()} answers about {repo} with something that huggingface_hub cannot read "
            f"({type(e).__name__}: {_first_line(e)}): check HF_ENDPOINT"
        ) from e


def _status_error(repo: str, error: HfHubHTTPError) -> str:
    """Return the error text for an HTTP status."""
    status, asked = error.response.status_code, error.response.headers.get("Retry-After")
    if status in (401, 403):
        return (
            f"{_endpoint()} refuses {repo} ({status}): ask for access on its page, log in with "
            "`hf auth login` or set HF_TOKEN, and run this again"
        )
    if status == 429:
        wait = f"wait {asked[:20]} s" if asked else "wait some minutes"
        return f"{_endpoint()} refuses more requests for now (429): {wait}, and run this again"
    return (
        f"{_endpoint()} answers {status} for {repo}: run this again later; it continues where it "
        "stopped"
    )


def _endpoint() -> str:
    return constants.ENDPOINT


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
